"""Every policy on every cell of the suite, against the clairvoyant bound.

    python bench/policies.py [--only 'h100-uniform-*'] [--policies ilp edf bound] [--seeds 0 1] [--again]

Each run is kept in <out>/<cell>.json as soon as it is done; a later call only makes what is missing, so it can be
stopped and resumed at any time, and two calls for different cells can run side by side. `--again` makes the named
runs anew (after a change to a policy). Every call ends by writing `policies.md`, `policies.json` and plots of all
cells, over the seeds of the call.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from policy_report import write_report
from suite import COLUMNS, SUITE, VARIANTS, Cell, Variant
from tqdm import tqdm

from solver.bound import Known, clairvoyant_bound
from tetriserve.profile import Profile
from tetriserve.simulation.result import result_of, write_json
from tetriserve.simulation.simulate import Disturbance, Simulation, named_policy, simulate

HERE = Path(__file__).parent
PLAN_LIMIT_S = 1.0
"""Never reached, so that outcomes do not depend on the load of this machine; planning times are in the tables."""
BOUND_LIMIT_S = 30.0


def run_variant(cell: Cell, variant: Variant, seed: int) -> dict[str, Any] | None:
    """The figures of one run; None where the policy makes no sense on the cell."""
    if variant.policy in ("sp1", "sp2", "sp4", "sp8") and int(variant.policy[2:]) > cell.n_gpus:
        return None
    done = play(cell, variant, seed)
    summary = result_of(variant.policy, cell.n_gpus, done.outcomes, done.schedule, done.plan_ms)["summary"]
    met = [o.latency_s for o in done.outcomes if o.met and o.latency_s is not None]
    late = sorted(o.latency_s for o in done.outcomes if not o.met and o.latency_s is not None)
    return {
        **{key: value for key, value in summary.items() if key != "by_shape"},
        "gpu_seconds_per_met": summary["gpu_seconds"] / len(met) if met else None,
        "mean_met_s": statistics.fmean(met) if met else None,
        "late_p99_s": late[int(0.99 * (len(late) - 1))] if late else None,
        "plan_ms_max": max(done.plan_s) * 1000,
    }


def play(cell: Cell, variant: Variant, seed: int) -> Simulation:
    """A trace of a cell under a policy, simulated."""
    profile = Profile.load(HERE / "profiles" / f"{cell.profile}.yaml")
    policy = named_policy(variant.policy, cell.n_gpus, PLAN_LIMIT_S, variant.round_steps)
    if variant.events:
        policy = replace(cast(Any, policy), replans_on_arrival=True)
    disturbance = Disturbance(variant.switch_s, variant.jitter, seed)
    return simulate(cell.trace(seed, profile), profile, policy, cell.n_gpus, disturbance=disturbance)


def run_bound(cell: Cell, seed: int) -> dict[str, Any]:
    profile = Profile.load(HERE / "profiles" / f"{cell.profile}.yaml")
    known = [
        Known(r.arrival_s, r.deadline_s, r.chain(profile, cell.n_gpus)) for r in cell.trace(seed, profile)
    ]
    best = clairvoyant_bound(known, cell.n_gpus, time_limit_s=BOUND_LIMIT_S)
    return {
        "slo_attainment": best.slo_attainment,
        "gpu_seconds_per_met": best.gpu_seconds / best.found if best.found else None,
        "optimal": best.is_optimal,
    }


def kept_runs(file: Path) -> dict[str, Any]:
    """What earlier calls kept, by run."""
    runs: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return runs


def keep_runs(file: Path, runs: dict[str, Any]) -> None:
    """Written beside and moved, so that a call that is cut off leaves the file whole."""
    write_json(file.with_suffix(".part"), runs)
    file.with_suffix(".part").replace(file)


def made_runs(
    file: Path, todo: Sequence[tuple[Any, ...]], make: Callable[..., Any], *, again: bool
) -> dict[str, Any]:
    """The runs in `file`, those of `todo` that are missing made by `make(*one)`, each kept as soon as it is done.

    A run's name is its parts in a row. With `again` all of `todo` are made anew.
    """
    for one in (bar := tqdm(todo, unit="run")):
        name = " ".join(map(str, one))
        bar.set_description(name)
        runs = kept_runs(file)
        if name not in runs or again:
            runs[name] = make(*one)
            keep_runs(file, runs)
    return kept_runs(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [variant.name for variant in VARIANTS] + ["bound"]
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cells, like 'l20-*'")
    parser.add_argument(
        "--policies", nargs="+", choices=[*names, "dp", "dp+events"], default=names, metavar="POLICY"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the three or five of each cell")
    parser.add_argument("--again", action="store_true", help="make the named runs anew")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "policies")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [
        (cell, seed, name)
        for cell in SUITE
        if any(fnmatch(cell.name, pattern) for pattern in options.only)
        for seed in options.seeds or cell.seeds
        for name in names
        if name in options.policies or name.partition("@")[0] in options.policies
    ]
    variants = {variant.name: variant for variant in VARIANTS}
    for cell, seed, name in (bar := tqdm(jobs, unit="run")):
        bar.set_description(f"{cell.name} {name} seed {seed}")
        file = options.out / f"{cell.name}.json"
        runs = kept_runs(file)
        key = f"{name} {seed}"
        if key in runs and not options.again:
            continue
        runs[key] = run_bound(cell, seed) if name == "bound" else run_variant(cell, variants[name], seed)
        keep_runs(file, dict(sorted(runs.items())))

    write_report(options.out, SUITE, VARIANTS, COLUMNS, options.seeds)


if __name__ == "__main__":
    main()
