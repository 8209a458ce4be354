"""What the gap between `ilp` and the clairvoyant bound is made of.

    python bench/gap.py [--cells l20-uniform-9 ...] [--seeds 0 1 2]

Gives `ilp` what the bound has, one thing after the other: the bound's own choice of requests (all others are taken
out of the trace), then their arrivals, known the longest SLO ahead instead of a forecast, with a look-ahead as exact
far ahead as near. What is left then is what whole steps on GPU sets cost, and what list schedules do not find: the
bound splits steps, moves them between GPUs at any instant and never waits for a step to end. Writes `gap.md` and
`gap.json`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

from policies import BOUND_LIMIT_S, HERE, PLAN_LIMIT_S
from policy_report import markdown_table
from suite import SUITE, Cell
from tqdm import tqdm

from solver import listing
from solver.bound import Known, clairvoyant_bound
from solver.problem import Job, Packing, Policy, Snapshot
from tetriserve.profile import Profile
from tetriserve.simulation.result import write_json
from tetriserve.simulation.simulate import named_policy, simulate
from tetriserve.simulation.trace import TraceRequest

ROWS = ("ilp", "ilp, the bound's choice", "the same, arrivals known", "bound")


class Foreseeing:
    """A policy that is told of requests before they arrive, and has no forecast of others.

    Long segments in the far future would hold up the small requests that it is told of, so there are none.
    """

    def __init__(self, policy: Policy, future: Sequence[Job]) -> None:
        self.name = policy.name
        self.round_steps = policy.round_steps
        self.replans_on_arrival = policy.replans_on_arrival
        self._policy = policy
        self._future = future
        self._ahead_s = max((job.slo_s for job in future), default=0.0)

    def __call__(self, snapshot: Snapshot) -> Packing:
        soon = [j for j in self._future if 0 < j.arrival_s - snapshot.now_s <= self._ahead_s]
        with mock.patch.object(listing, "GROWTH", 0.0):
            packing = self._policy(replace(snapshot, jobs=(*snapshot.jobs, *soon), expected=()))
        here = {job.id for job in snapshot.jobs}
        entries = tuple(entry for entry in packing.entries if entry.job_ids[0] in here)
        return replace(packing, entries=entries, set_aside=packing.set_aside & here)


def measure(cell: Cell, seed: int) -> dict[str, float]:
    """SLO attainment per row of the table, over all requests of the trace."""
    profile = Profile.load(HERE / "profiles" / f"{cell.profile}.yaml")
    trace = cell.trace(seed, profile)
    chains = {request.id: request.chain(profile, cell.n_gpus) for request in trace}
    known = [Known(r.arrival_s, r.deadline_s, chains[r.id]) for r in trace]
    bound = clairvoyant_bound(known, cell.n_gpus, time_limit_s=BOUND_LIMIT_S)
    kept = {id(one) for one in bound.chosen}
    chosen = [request for request, one in zip(trace, known, strict=True) if id(one) in kept]
    future = [
        Job(r.id, r.arrival_s, r.deadline_s, r.arrival_s, chains[r.id], slo_s=r.deadline_s - r.arrival_s)
        for r in chosen
    ]
    policy = named_policy("ilp", cell.n_gpus, PLAN_LIMIT_S)

    def met(requests: list[TraceRequest], by: Policy) -> float:
        return sum(outcome.met for outcome in simulate(requests, profile, by, cell.n_gpus).outcomes) / len(
            trace
        )

    reached = (met(trace, policy), met(chosen, policy), met(chosen, Foreseeing(policy, future)))
    return dict(zip(ROWS, (*reached, bound.slo_attainment), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cells = {cell.name: cell for cell in SUITE}
    default = ["h100-uniform-36", "h100-skewed-36", "l20-uniform-9", "l20-uniform-18", "l20-skewed-9"]
    parser.add_argument("--cells", nargs="+", default=default, choices=cells, metavar="CELL")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "policies")
    options = parser.parse_args()
    table: dict[str, dict[str, float]] = {}
    for name in (bar := tqdm(options.cells, unit="cell")):
        bar.set_description(name)
        runs = [measure(cells[name], seed) for seed in options.seeds]
        table[name] = {row: statistics.fmean(run[row] for run in runs) for row in ROWS}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "gap.json", table)
    body = [[row, *(f"{cell[row]:.3f}" for cell in table.values())] for row in ROWS]
    text = f"`python bench/gap.py`: SLO attainment, mean of {len(options.seeds)} seeds"
    (options.out / "gap.md").write_text(f"{text}\n\n{markdown_table(['', *table], body)}\n")


if __name__ == "__main__":
    main()
