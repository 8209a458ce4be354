"""What sharing steps brings in simulated loads of Qwen-Image on an H200: `ilp` with and without batches,
PatchedServe's scheduler, the paper's `dp` with its selective batching, one GPU each, and the clairvoyant bound.

    python bench/batches_load.py [--cells flood-512-2x ...] [--seeds 0 1 2] [--again]

Loads are multiples of the rate that saturates eight GPUs one by one. Each run is kept in <out>/load.json as soon as
it is done. Prints SLO attainment, mean latency, the share of ranges that were shared, and planning times; means over
the seeds. Writes `load.md`.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from policies import BOUND_LIMIT_S, made_runs
from suite import Cell

from solver.bound import Known, clairvoyant_bound
from solver.problem import least_work_s
from tetriserve.profile import Profile
from tetriserve.request import Shape
from tetriserve.simulation.result import result_of
from tetriserve.simulation.simulate import named_policy, simulate
from tetriserve.simulation.trace import TraceRequest

HERE = Path(__file__).parent
QWEN = "qwen_h200_batches"
THREE = "512x512,768x768,1024x1024"
FOUR = "256x256,512x512,1024x1024,1536x1536"
REQUESTS = 150
PLAN_LIMIT_S = 0.02
"""That of a server: what a decision may not think about to its end is part of the figures."""


def saturating_per_min(shapes: str, n_gpus: int = 8) -> float:
    """The rate at which requests of these shapes, equally many, keep the GPUs busy one by one at degree 1."""
    profile = Profile.load(HERE / "profiles" / f"{QWEN}.yaml")
    alone_s = [
        sum(phase.steps * phase.step_s[1] for phase in _request(shape).chain(profile, n_gpus))
        for shape in map(Shape.parse, shapes.split(","))
    ]
    return 60 * n_gpus / statistics.fmean(alone_s)


def _request(shape: Shape) -> TraceRequest:
    return TraceRequest("r", 0.0, shape.height, shape.width, num_inference_steps=28)


def _cell(name: str, mix: str, shapes: str, load: float, slo: str) -> Cell:
    rate = load * saturating_per_min(shapes)
    return Cell(name, QWEN, mix, rate, shapes, slo, n_requests=REQUESTS)


CELLS = (
    _cell("flood-512-1x", "homogeneous", "512x512", 1.0, "2.5x"),
    _cell("flood-512-2x", "homogeneous", "512x512", 2.0, "2.5x"),
    _cell("uniform-0.7x", "uniform", FOUR, 0.7, "2.5x"),
    _cell("uniform-1x", "uniform", FOUR, 1.0, "2.5x"),
    _cell("skewed-0.7x", "skewed", FOUR, 0.7, "2.5x"),
    _cell("patched-1x", "uniform", THREE, 1.0, "5x"),
    _cell("patched-1.5x", "uniform", THREE, 1.5, "5x"),
)
WAYS = {
    "ilp, alone": ("ilp", 1),
    "ilp": ("ilp", 8),
    "slack": ("slack", 8),
    "dp": ("dp", 8),
    "sp1": ("sp1", 1),
}


def run(name: str, way: str, seed: int) -> dict[str, Any]:
    cell = next(cell for cell in CELLS if cell.name == name)
    profile = Profile.load(HERE / "profiles" / f"{cell.profile}.yaml")
    trace = cell.trace(seed, profile)
    if way == "bound":
        known = [Known(r.arrival_s, r.deadline_s, r.chain(profile, cell.n_gpus)) for r in trace]
        best = clairvoyant_bound(known, cell.n_gpus, time_limit_s=BOUND_LIMIT_S)
        return {"attainment": best.slo_attainment}
    policy, max_batch = WAYS[way]
    done = simulate(
        trace, profile, named_policy(policy, cell.n_gpus, PLAN_LIMIT_S), cell.n_gpus, max_batch=max_batch
    )
    summary = result_of(policy, cell.n_gpus, done.outcomes, done.schedule, done.plan_ms)["summary"]
    return {
        "attainment": summary["slo_attainment"],
        "mean_s": summary["mean_s"],
        "shared": statistics.fmean(len(ran.request_ids) > 1 for ran in done.schedule),
        "plan_ms_p50": summary["plan_ms_p50"],
        "plan_ms_p99": summary["plan_ms_p99"],
        "alone_s": statistics.fmean(least_work_s(r.chain(profile, cell.n_gpus)) for r in trace),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [cell.name for cell in CELLS]
    parser.add_argument("--cells", nargs="+", default=names, choices=names, metavar="CELL")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--again", action="store_true", help="make the named runs anew")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "batches")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    ways = [*WAYS, "bound"]
    todo = [(cell, way, seed) for seed in options.seeds for cell in options.cells for way in ways]
    runs = made_runs(options.out / "load.json", todo, run, again=options.again)
    lines = ["| load | policy | on time | mean s | ranges shared | plan ms, p50 and p99 |", "|---" * 6 + "|"]
    for cell in options.cells:
        for way in ways:
            rows = [runs[f"{cell} {way} {seed}"] for seed in options.seeds]
            mean = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
            lines.append(f"| {cell} | {way} | {mean['attainment']:.3f} | {_rest(mean)} |")
    text = "\n".join(lines)
    (options.out / "load.md").write_text(f"`python bench/batches_load.py`, seeds {options.seeds}\n\n{text}\n")
    print(text)


def _rest(mean: dict[str, float]) -> str:
    if "mean_s" not in mean:
        return " | | "
    shared = f"{100 * mean['shared']:.0f} %"
    return f"{mean['mean_s']:.2f} | {shared} | {mean['plan_ms_p50']:.1f}, {mean['plan_ms_p99']:.0f}"


if __name__ == "__main__":
    main()
