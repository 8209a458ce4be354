"""The same trace against the live server and through the simulator, once per policy.

    python bench/live.py [--repeats 3] [--policies ilp sp1 sp2 rssp ...] [--requests 60] [--rate 50]

Measures this machine's profile first (`tetriserve profile`), gives it to every server and plays a mixed 256/512/1024
trace with deadlines. The simulator gets the profile as the server has it at the end of the run: a replica is slower
while its neighbour is busy. Writes `live.md` and `live.json` to --out after every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from server import MIX, local_setup, running_server
from tqdm import tqdm

from deployments.config import AppArgs, SchedulerArgs
from tetriserve.client import live_profile
from tetriserve.profile import Profile
from tetriserve.simulation.replay import replay
from tetriserve.simulation.result import result_of
from tetriserve.simulation.simulate import named_policy, simulate
from tetriserve.simulation.trace import TraceRequest

POLICIES = ("ilp", "dp", "edf", "rssp", "sp1", "sp2")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), metavar="POLICY")
    parser.add_argument("--repeats", type=int, default=3, help="traces of different seeds")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rate", type=float, default=50.0, metavar="PER_MINUTE")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--shapes", default=MIX, help="with weights")
    parser.add_argument("--slo", default="5x", help="deadline, times the best time alone")
    parser.add_argument("--out", type=Path, default=Path("bench/results/live"))
    options = parser.parse_args()

    rows: list[dict[str, Any]] = []
    with local_setup() as setup:
        scheduler = AppArgs.parse(setup.args).scheduler
        n_gpus = setup.n_gpus
        runs = [(seed, policy) for seed in range(options.repeats) for policy in options.policies]
        for seed, policy in (bar := tqdm(runs, unit="run")):
            bar.set_description(f"{policy} seed {seed}")
            trace = setup.mixed_trace(
                options.rate,
                options.requests,
                shapes=options.shapes,
                slo=options.slo,
                steps=options.steps,
                seed=seed,
            )
            with running_server(setup.config, policy) as server:
                live = replay(server.url, trace, lambda: None)
                profile = live_profile(server.url)
            rows.append(
                {
                    "policy": policy,
                    "seed": seed,
                    "live": result_of(policy, n_gpus, live.outcomes, live.schedule, live.plan_ms)["summary"],
                    "simulated": simulated(trace, profile, policy, n_gpus, scheduler),
                    "errors": live.errors,
                }
            )
            write_report(options.out, rows, options)


def simulated(
    trace: list[TraceRequest], profile: Profile, policy: str, n_gpus: int, scheduler: SchedulerArgs
) -> dict[str, Any]:
    """The summary of the same trace in the simulator, under the scheduler settings of the server."""
    done = simulate(
        trace,
        profile,
        named_policy(policy, n_gpus, scheduler.solver_time_limit_s),
        n_gpus,
        min_round_s=scheduler.min_round_s,
        lead_s=scheduler.lead_s,
    )
    summary: dict[str, Any] = result_of(policy, n_gpus, done.outcomes, done.schedule, done.plan_ms)["summary"]
    return summary


def write_report(folder: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """`live.json` and the table of `live.md`, from the runs so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "live.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        f"`python bench/live.py --rate {options.rate:g} --requests {options.requests} --steps {options.steps} "
        f"--shapes {options.shapes} --slo {options.slo}`",
        "",
        "| policy | live | simulated | live per trace | live mean s | simulated mean s | plan p99 ms | errors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for policy in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == policy]

        def mean(side: str, key: str, mine: list[dict[str, Any]] = mine) -> float:
            return statistics.fmean(row[side][key] for row in mine)

        each = " ".join(f"{row['live']['slo_attainment']:.3f}" for row in mine)
        lines.append(
            f"| {policy} | {mean('live', 'slo_attainment'):.3f} | {mean('simulated', 'slo_attainment'):.3f} | {each} "
            f"| {mean('live', 'mean_s'):.2f} | {mean('simulated', 'mean_s'):.2f} "
            f"| {mean('live', 'plan_ms_p99'):.1f} | {sum(len(row['errors']) for row in mine)} |"
        )
    (folder / "live.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
