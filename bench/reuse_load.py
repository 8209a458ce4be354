"""What reuse of steps brings where not all can be on time: simulated loads, every step computed against steps
extrapolated of requests that would be late (`args.reuse.when: late`).

    python bench/reuse_load.py [--cells h100-skewed-36 ...] [--seeds 0 1 2] [--again]

Each run is kept in <out>/load.json as soon as it is done. Prints SLO attainment, mean latency, and the share of
requests whose steps were not all computed; means over the seeds. Writes `load.md`.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from policies import PLAN_LIMIT_S, made_runs
from suite import SUITE

from tetriserve.profile import Profile
from tetriserve.simulation.result import result_of
from tetriserve.simulation.simulate import Reuse, named_policy, simulate

HERE = Path(__file__).parent
CELLS = (
    "h100-uniform-24",
    "h100-uniform-36",
    "h100-skewed-24",
    "h100-skewed-36",
    "l20-uniform-9",
    "l20-uniform-18",
)
WAYS = {"never": Reuse(), "late, low": Reuse("late", 2), "late, high": Reuse("late", 3)}


def run(name: str, way: str, seed: int) -> dict[str, Any]:
    cell = next(cell for cell in SUITE if cell.name == name)
    profile = Profile.load(HERE / "profiles" / f"{cell.profile}.yaml")
    policy = named_policy("ilp", cell.n_gpus, PLAN_LIMIT_S)
    trace = cell.trace(seed, profile)
    done = simulate(trace, profile, policy, cell.n_gpus, reuse=WAYS[way])
    summary = result_of("ilp", cell.n_gpus, done.outcomes, done.schedule, done.plan_ms)["summary"]
    steps: dict[str, int] = {}
    for ran in done.schedule:
        if ran.kind == "denoise":
            (request_id,) = ran.request_ids
            steps[request_id] = steps.get(request_id, 0) + ran.steps
    reused = sum(steps.get(one.id, one.num_inference_steps) < one.num_inference_steps for one in trace)
    return {
        "attainment": summary["slo_attainment"],
        "mean_s": summary["mean_s"],
        "plan_ms_p99": summary["plan_ms_p99"],
        "reused": reused / len(trace),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--again", action="store_true", help="make the named runs anew")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "reuse")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    todo = [(cell, way, seed) for cell in options.cells for way in WAYS for seed in options.seeds]
    runs = made_runs(options.out / "load.json", todo, run, again=options.again)
    lines = ["| load | reuse | on time | mean s | reused | plan ms, p99 |", "|---" * 6 + "|"]
    for cell in options.cells:
        for way in WAYS:
            rows = [runs[f"{cell} {way} {seed}"] for seed in options.seeds]
            mean = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
            lines.append(
                f"| {cell} | {way} | {mean['attainment']:.3f} | {mean['mean_s']:.2f} | "
                f"{100 * mean['reused']:.0f} % | {mean['plan_ms_p99']:.0f} |"
            )
    text = "\n".join(lines)
    (options.out / "load.md").write_text(f"`python bench/reuse_load.py`, seeds {options.seeds}\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
