"""Every policy on every cell of the suite, against the clairvoyant bound.

    python bench/policies.py [--only 'h100-uniform-*'] [--policies ilp edf bound] [--seeds 0 1] [--again]

Each run is kept in <out>/<cell>.json as soon as it is done; a later call only makes what is missing, so it can be
stopped and resumed at any time, and two calls for different cells can run side by side. `--again` makes the named
runs anew (after a change to a policy). Every call ends by writing `policies.md`, `policies.json` and plots from all
that is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from solver.bound import Known, clairvoyant_bound
from tetriserve.metrics import result_of, write_json
from tetriserve.profile import Profile
from tetriserve.simulate import Disturbance, named_policy, simulate
from tetriserve.trace import TraceRequest
from tetriserve.workload import SloRule, Workload, parse_shapes

HERE = Path(__file__).parent
PAPER_SHAPES = "256x256,512x512,1024x1024,2048x2048"
PAPER_SLO = "256x256=1.5,512x512=2,1024x1024=3,2048x2048=5"
BEST_ALONE = "2.5x"
RATES = (6, 12, 18, 24, 36)
SCALES = (1.1, 1.2, 1.3, 1.4, 1.5)
FIVE_SEEDS = frozenset("h100-uniform-12 h100-skewed-12 h100-uniform-24 h100-uniform-36 l20-uniform-9".split())
"""The cells of design.md section 5; the others get three seeds."""
PLAN_LIMIT_S = 1.0
"""Never reached, so that outcomes do not depend on the load of this machine; planning times are in the tables."""
BOUND_LIMIT_S = 60.0


@dataclass(frozen=True)
class Cell:
    """One workload on one machine."""

    name: str
    profile: str
    mix: str
    rate_per_min: float
    shapes: str = PAPER_SHAPES
    slo: str = PAPER_SLO
    slo_scale: float = 1.0
    n_gpus: int = 8
    n_requests: int = 300

    @property
    def seeds(self) -> range:
        return range(5 if self.name in FIVE_SEEDS else 3)

    def trace(self, seed: int, profile: Profile) -> list[TraceRequest]:
        return Workload(
            self.mix,
            self.rate_per_min,
            self.n_requests,
            shapes=parse_shapes(self.shapes),
            slo=SloRule.parse(self.slo),
            slo_scale=self.slo_scale,
            seed=seed,
            profile=profile,
            n_gpus=self.n_gpus,
        ).generate()


def _suite() -> Iterator[Cell]:
    h100, l20, sd3 = "flux_h100_derived", "flux_l20", "sd3_l20"
    sd3_shapes = "256x256,512x512,1024x1024,1536x1536"
    for mix in ("uniform", "skewed"):
        for rate in RATES:
            yield Cell(f"h100-{mix}-{rate}", h100, mix, rate)
        for scale in SCALES:
            yield Cell(f"h100-{mix}-12-slo{scale}", h100, mix, 12, slo_scale=scale)
        for rate in (6, 9, 12, 18, 36):
            yield Cell(f"l20-{mix}-{rate}", l20, mix, rate, slo=BEST_ALONE)
        yield Cell(f"l20-{mix}-9-slo1.5", l20, mix, 9, slo=BEST_ALONE, slo_scale=1.5)
        for rate in (12, 24, 36):
            yield Cell(f"sd3-{mix}-{rate}", sd3, mix, rate, sd3_shapes, BEST_ALONE, n_gpus=4)
        yield Cell(f"sd3-{mix}-24-slo1.5", sd3, mix, 24, sd3_shapes, BEST_ALONE, slo_scale=1.5, n_gpus=4)
    yield Cell("h100-bursty-12", h100, "bursty", 12)
    yield Cell("h100-bursty-24", h100, "bursty", 24)
    yield Cell("l20-bursty-9", l20, "bursty", 9, slo=BEST_ALONE)
    yield Cell("sd3-bursty-24", sd3, "bursty", 24, sd3_shapes, BEST_ALONE, n_gpus=4)
    # rates at which the cheapest degrees alone would keep about half to nine tenths of the GPUs busy
    for shape, rate in (("512x512", 240), ("1024x1024", 72), ("2048x2048", 12)):
        yield Cell(f"h100-homogeneous-{shape}", h100, "homogeneous", rate, shape)
    yield Cell("h100-flood-256x256", h100, "uniform", 480, "256x256=60,512x512=2,1024x1024,2048x2048")


SUITE: tuple[Cell, ...] = tuple(_suite())


@dataclass(frozen=True)
class Variant:
    """A policy under conditions.

    Attributes:
        events: a policy of rounds decides at arrivals and freed GPUs as well.
        swept: the column in which the best of several round lengths is reported, per cell.
    """

    name: str
    policy: str
    round_steps: float | None = None
    events: bool = False
    switch_s: float = 0.0
    jitter: float = 0.0
    swept: str | None = None


DP_ROUND_STEPS = (0.2, 0.6, 0.8, 1.0, 1.25, 2.0, 5.0)
DP_EVENTS_ROUND_STEPS = (0.8, 1.5, 3.0, 5.0)
"""Steps of the largest open shape at its fastest; `dp` is the paper as written, `dp+events` a stronger reading."""
VARIANTS: tuple[Variant, ...] = (
    *(Variant(name, name) for name in ("sp1", "sp2", "sp4", "sp8", "rssp", "edf", "ilp")),
    *(Variant(f"dp@{steps:g}", "dp", steps, swept="dp") for steps in DP_ROUND_STEPS),
    *(
        Variant(f"dp+events@{steps:g}", "dp", steps, events=True, swept="dp+events")
        for steps in DP_EVENTS_ROUND_STEPS
    ),
    Variant("ilp+noise", "ilp", switch_s=0.002, jitter=0.03),
)
COLUMNS = ("sp1", "sp2", "sp4", "sp8", "rssp", "edf", "dp", "dp+events", "ilp", "ilp+noise")


def run_variant(cell: Cell, variant: Variant, seed: int) -> dict[str, Any] | None:
    """The figures of one run; None where the policy makes no sense on the cell."""
    if variant.policy in ("sp1", "sp2", "sp4", "sp8") and int(variant.policy[2:]) > cell.n_gpus:
        return None
    profile = Profile.load(HERE / "profiles" / f"{cell.profile}.yaml")
    policy = named_policy(variant.policy, cell.n_gpus, PLAN_LIMIT_S, variant.round_steps)
    if variant.events:
        policy = replace(cast(Any, policy), replans_on_arrival=True)
    disturbance = Disturbance(variant.switch_s, variant.jitter, seed)
    done = simulate(cell.trace(seed, profile), profile, policy, cell.n_gpus, disturbance=disturbance)
    summary = result_of(policy.name, cell.n_gpus, done.outcomes, done.schedule, done.plan_s)["summary"]
    met = [o.latency_s for o in done.outcomes if o.met and o.latency_s is not None]
    late = sorted(o.latency_s for o in done.outcomes if not o.met and o.latency_s is not None)
    return {
        **{key: value for key, value in summary.items() if key != "by_shape"},
        "gpu_seconds_per_met": summary["gpu_seconds"] / len(met) if met else None,
        "mean_met_s": statistics.fmean(met) if met else None,
        "late_p99_s": late[int(0.99 * (len(late) - 1))] if late else None,
        "plan_ms_max": max(done.plan_s) * 1000,
    }


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
        runs = json.loads(file.read_text()) if file.exists() else {}
        key = f"{name} {seed}"
        if key in runs and not options.again:
            continue
        runs[key] = run_bound(cell, seed) if name == "bound" else run_variant(cell, variants[name], seed)
        # written beside and moved, so that a run that is cut off leaves the file whole
        write_json(file.with_suffix(".part"), dict(sorted(runs.items())))
        file.with_suffix(".part").replace(file)

    from policy_report import write_report

    write_report(options.out, SUITE, VARIANTS, COLUMNS)


if __name__ == "__main__":
    main()
