"""Step time by shape and sequence-parallel degree on this machine, as a table and a plot.

    python bench/sp_scaling.py [--config cluster_configs/cpu_local.yaml] [--rounds 5]

Runs the config's own GPU replicas (real actors, real groups), one degree at a time with the other GPUs idle;
degrees take turns within a round, so that a slow minute of the machine hits all of them. Medians over rounds.
Writes `sp_scaling.md`, `.json` and `.png` to --out.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import ray
from tqdm import tqdm

from deployments.cell.fleet import Fleet
from deployments.cell.replica import boxed
from deployments.cluster_file import load_config
from deployments.local import start_ray
from tetriserve.request import GenerateRequest, Shape
from tetriserve.scheduler.assignment import Assignment

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="cluster_configs/cpu_local.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"))
    options = parser.parse_args()

    _, _, args = load_config(options.config)
    gpus, degrees, shapes = args.cell.gpus, args.cell.all_degrees, args.profile.all_shapes
    bundles = args.cell.bundles
    start_ray(sum(bundle["CPU"] for bundle in bundles))
    try:
        fleet = Fleet(args, ray.util.placement_group(bundles, strategy="STRICT_PACK"))
        asyncio.run(fleet.start())
        pairs, rehearsals = fleet.measurable(), itertools.count(-10_000)  # below all that the fleet has used
        samples: dict[tuple[Shape, int], list[float]] = {pair: [] for pair in pairs}
        for _ in tqdm(range(options.rounds), unit="round"):
            for shape, degree in pairs:
                members = tuple(range(degree))
                seq = next(rehearsals)
                calls = [fleet[gpu].measure.remote(shape, members, seq, 1, 3) for gpu in members]
                samples[shape, degree].append(max(seconds["denoise"] for seconds in ray.get(calls)))
        switch_s = switching(fleet, shapes[0], degrees) if gpus > 1 else []
    finally:
        ray.shutdown()

    medians = {pair: statistics.median(times) for pair, times in samples.items()}
    lines = [
        "| shape | " + " | ".join(f"SP {d} ms" for d in degrees) + " | "
        + " | ".join(f"speed-up SP {d}" for d in degrees[1:]) + " |",
        "|---" * (2 * len(degrees)) + "|",
    ]  # fmt: skip
    for shape in shapes:
        alone_s = medians[shape, 1]
        times = [medians.get((shape, degree)) for degree in degrees]
        cells = ["-" if t is None else f"{1000 * t:.1f}" for t in times]
        cells += ["-" if t is None else f"{alone_s / t:.2f}" for t in times[1:]]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    if switch_s:
        lines.append("")
        lines.append(
            f"Switching the degree where the latents are held: median {1e3 * statistics.median(switch_s):.3f} ms, "
            f"worst {1e3 * max(switch_s):.3f} ms of {len(switch_s)} switches."
        )
    table = "\n".join(lines)
    print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    title = f"{fleet.info.name} on {gpus} x {fleet.device}"
    (options.out / "sp_scaling.md").write_text(
        f"`python bench/sp_scaling.py --config {options.config}`: {title}\n\n{table}\n"
    )
    rows = [
        {"shape": str(shape), "degree": degree, "median_s": medians[shape, degree], "samples_s": times}
        for (shape, degree), times in samples.items()
    ]
    (options.out / "sp_scaling.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(medians, degrees, shapes, title, options.out / "sp_scaling.png")


def switching(fleet: Fleet, shape: Shape, degrees: tuple[int, ...], switches: int = 40) -> list[float]:
    """Seconds from the start of a range to its first step on GPU 0, which holds the latents, while one
    request changes its degree at every step."""
    request = GenerateRequest("a star", shape.height, shape.width, num_inference_steps=switches, seed=0)
    last = dict.fromkeys(range(len(fleet)), -1)

    def run(seq: int, kind: str, members: tuple[int, ...], conditioning: Any, latents: Any) -> list[Any]:
        after = tuple(last[gpu] for gpu in members)
        assignment = Assignment(seq, ("switch",), kind, members, (max(seq - 1, 0),), 1, 0.0, 0.0, after)
        last.update(dict.fromkeys(members, seq))
        holds = seq > 0 and 0 in members
        return ray.get(
            [
                fleet[gpu].run.remote(
                    assignment,
                    request,
                    [
                        (
                            boxed(None if gpu == 0 and holds else conditioning),
                            boxed(None if gpu == 0 and holds else latents),
                        )
                    ],
                )
                for gpu in members
            ]
        )

    ((_, packed, latents),) = run(0, "encode", (0,), None, None)
    conditioning = ray.put(packed)
    times = []
    for seq in range(1, switches + 1):
        members = tuple(range(degrees[seq % len(degrees)]))
        (report, latents), *_ = run(seq, "denoise", members, conditioning, ray.put(latents))
        times.append(report.switch_s)
    ray.get([fleet[gpu].release.remote("switch") for gpu in range(len(fleet))])
    return times


def plot(
    medians: dict[tuple[Shape, int], float],
    degrees: tuple[int, ...],
    shapes: tuple[Shape, ...],
    title: str,
    path: Path,
) -> None:
    """Speed-up over SP 1 against the degree, one line per shape."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for shape in shapes:
        known = [degree for degree in degrees if (shape, degree) in medians]
        speedup = [medians[shape, 1] / medians[shape, degree] for degree in known]
        axes.plot(known, speedup, marker="o", label=f"{shape.width}x{shape.height}")
    axes.plot(degrees, degrees, color="0.6", linestyle="--", label="ideal")
    axes.axhline(1.0, color="0.8", linewidth=0.8)
    axes.set(xlabel="sequence-parallel degree", ylabel="speed-up of a denoising step", title=title)
    axes.set_xticks(degrees)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
