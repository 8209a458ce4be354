"""What becomes of late requests: simulated loads of small tight requests beside long patient ones, the README's five
cells, and deep overload.

    python bench/late.py [--only 'h100-*'] [--seeds 0 1 2] [--again]

Each run is kept in <out>/late.json as soon as it is done; a later call only makes what is missing. Prints, for each
load, SLO attainment, how late the late ones are, how much longer requests take than alone, the time of a decision;
means over the seeds. Writes `late.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from policies import PLAN_LIMIT_S, made_runs
from suite import FIVE_SEEDS, SUITE, Cell

from tetriserve.profile import Profile
from tetriserve.request import Shape
from tetriserve.simulation.result import result_of
from tetriserve.simulation.simulate import named_policy, simulate
from tetriserve.simulation.trace import TraceRequest

HERE = Path(__file__).parent
N_GPUS = 8
STEPS = 28


@dataclass(frozen=True)
class Kind:
    """Requests of a shape: how often they come relative to the others, and their deadline, as a multiple of the
    fastest time alone; None for none."""

    shape: Shape
    weight: float
    slo_scale: float | None


@dataclass(frozen=True)
class Mix:
    """A load on one machine.

    Attributes:
        load: GPU-seconds that arrive in a second at the cheapest degrees, by GPU.
    """

    name: str
    profile: str
    kinds: tuple[Kind, ...]
    load: float
    n_requests: int = 300

    def trace(self, seed: int, profile: Profile) -> list[TraceRequest]:
        rng = np.random.default_rng(seed)
        weights = np.array([kind.weight for kind in self.kinds])
        shares = weights / weights.sum()
        cheapest = [min(d * s for d, s in profile.step_s(kind.shape).items()) for kind in self.kinds]
        rate = self.load * N_GPUS / (STEPS * float(np.dot(shares, cheapest)))
        arrivals_s = np.cumsum(rng.exponential(1 / rate, self.n_requests))
        requests = []
        for index, arrival_s in enumerate(arrivals_s):
            kind = self.kinds[rng.choice(len(shares), p=shares)]
            alone_s = STEPS * min(profile.step_s(kind.shape).values())
            slo_s = None if kind.slo_scale is None else round(kind.slo_scale * alone_s, 6)
            shape = kind.shape
            requests.append(
                TraceRequest(
                    f"r{index}", round(float(arrival_s), 6), shape.height, shape.width, STEPS, slo_s=slo_s
                )
            )
        return requests


def beside(side: int, scale: float | None) -> tuple[Kind, ...]:
    """Small ones with tight deadlines, and long ones."""
    small = (Kind(Shape(256, 256), 4, 1.8), Kind(Shape(512, 512), 4, 1.8), Kind(Shape(1024, 1024), 2, 1.8))
    return (*small, Kind(Shape(side, side), 2, scale))


MIXES: list[Mix | Cell] = [
    *(
        Mix(f"{name}-beside-{load}", profile, beside(side, 10), load / 100)
        for name, profile, side in (("h100", "flux_h100_derived", 2048), ("l20", "flux_l20", 2048))
        for load in (70, 85, 95)
    ),
    Mix("h100-patient-85", "flux_h100_derived", beside(2048, None), 0.85),
    *(
        Mix(f"{name}-overload-{load}", profile, beside(2048, 5), load / 100)
        for name, profile in (("h100", "flux_h100_derived"), ("l20", "flux_l20"))
        for load in (130, 200)
    ),
    *(cell for cell in SUITE if cell.name in FIVE_SEEDS),
]
COLUMNS = {
    "slo_attainment": ".3f",
    "lateness_mean_s": ".2f",
    "lateness_p99_s": ".2f",
    "allowed_s": ".2f",
    "slowdown_mean": ".2f",
    "slowdown_p99": ".1f",
    "mean_s": ".2f",
    "gpu_utilisation": ".3f",
    "plan_ms_p50": ".2f",
    "plan_ms_p99": ".1f",
}


def run(name: str, seed: int) -> dict[str, Any]:
    mix = next(mix for mix in MIXES if mix.name == name)
    profile = Profile.load(HERE / "profiles" / f"{mix.profile}.yaml")
    policy = named_policy("ilp", N_GPUS, PLAN_LIMIT_S)
    done = simulate(mix.trace(seed, profile), profile, policy, N_GPUS)
    summary = result_of("ilp", N_GPUS, done.outcomes, done.schedule, done.plan_ms)["summary"]
    late = [o.alone_s for o in done.outcomes if o.lateness_s is not None and o.alone_s]
    longest = max((o.latency_s for o in done.outcomes if o.latency_s is not None), default=0.0)
    allowed_s = max(2 * max(late, default=0.0), 0.05 * longest)
    return {name: summary.get(name, allowed_s) for name in COLUMNS}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--again", action="store_true", help="make the named runs anew")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "late")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    mixes = [mix for mix in MIXES if any(fnmatch(mix.name, pattern) for pattern in options.only)]
    todo = [(mix.name, seed) for mix in mixes for seed in options.seeds]
    runs = made_runs(options.out / "late.json", todo, run, again=options.again)
    lines = [f"| load | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for mix in mixes:
        rows = [runs[f"{mix.name} {seed}"] for seed in options.seeds]
        cells = []
        for name, form in COLUMNS.items():
            values = [row[name] for row in rows if row[name] is not None]
            cells.append(format(statistics.fmean(values), form) if values else "-")
        lines.append(f"| {mix.name} | {' | '.join(cells)} |")
    text = "\n".join(lines)
    (options.out / "late.md").write_text(f"Means of seeds {json.dumps(options.seeds)}.\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
