"""The ILP packer (`ilp`): choose whom to serve on time, then prove it by an exact list schedule (packing.md).

In nine of ten decisions everybody can be on time and plain deadline order shows it; the ILP is only asked
otherwise. Whatever happens to the solver or the clock, the best schedule found so far is a valid packing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from solver.board import Board, OpenJob
from solver.listing import Rule, Run, Schedule, fill_gaps, schedule_on_time
from solver.problem import Packing, Snapshot
from solver.selection import Demand, select

RULES = (Rule(), Rule(least_laxity=True), Rule(hold=True))
"""Orders of the exact completion, tried in turn; four more bring little (packing.md)."""
MAX_CUTS = 3
MAX_DROPS = 6


@dataclass
class _Search:
    """The best completion so far, within a limit on the clock."""

    board: Board
    end_s: float
    best: Schedule | None = None
    best_served: frozenset[int] = frozenset()
    info: dict[str, float] = field(default_factory=lambda: {"completions": 0.0, "ilps": 0.0})

    def is_over(self) -> bool:
        return time.perf_counter() >= self.end_s

    def complete(self, jobs: Sequence[OpenJob], served: Collection[int]) -> Schedule:
        """Complete a choice in every order until one has them all on time; returns its best schedule."""
        best: Schedule | None = None
        for rule in RULES:
            schedule = schedule_on_time(self.board, [Run(jobs[i]) for i in served], rule)
            self.info["completions"] += 1
            if best is None or _worth(schedule) > _worth(best):
                best = schedule
            if not best.missed or self.is_over():
                break
        assert best is not None
        if self.best is None or _worth(best) > _worth(self.best):
            self.best, self.best_served = best, frozenset(served)
        return best


def _worth(schedule: Schedule) -> tuple[int, float]:
    """More on time; ties by lower mean finish (packing.md)."""
    return schedule.on_time, -schedule.finish_sum_s


@dataclass(frozen=True)
class IlpPolicy:
    """Our packer.

    Attributes:
        time_limit_s: when to stop improving; the plan is ready soon after.
    """

    time_limit_s: float = 0.05
    name: str = "ilp"
    round_steps: float = 1.0
    replans_on_arrival: bool = True

    def __call__(self, snapshot: Snapshot) -> Packing:
        board = Board(snapshot)
        jobs = [job for job in board.jobs if not job.is_late]
        late = [Run(job) for job in board.jobs if job.is_late]
        search = _Search(board, time.perf_counter() + self.time_limit_s)
        if search.complete(jobs, range(len(jobs))).missed:
            self._improve(search, jobs)
        schedule = search.best
        assert schedule is not None
        set_aside = [Run(job) for i, job in enumerate(jobs) if i not in search.best_served]
        given_up = frozenset(run.open.job.id for run in schedule.missed + set_aside)
        late.sort(key=lambda run: run.open.job.arrival_s)
        fill_gaps(board, schedule, schedule.missed + set_aside + late)
        return Packing(tuple(schedule.entries), given_up, search.info)

    def _improve(self, search: _Search, jobs: Sequence[OpenJob]) -> None:
        """Set requests aside as the ILP says, cut by cut; then one by one by hand."""
        bounded = [i for i, job in enumerate(jobs) if job.job.deadline_s < math.inf]
        unbounded = [i for i in range(len(jobs)) if i not in set(bounded)]
        demands = [_demand(jobs[i]) for i in bounded]
        cuts: list[frozenset[int]] = []
        served = list(range(len(jobs)))
        schedule = search.best
        assert schedule is not None
        while len(cuts) < MAX_CUTS and not search.is_over():
            left_s = max(search.end_s - time.perf_counter(), 1e-3)
            selection = select(demands, search.board.capacity, cuts=cuts, time_limit_s=left_s)
            search.info["ilps"] += 1
            if selection is None:
                break
            served = sorted([bounded[k] for k in selection.chosen] + unbounded)
            schedule = search.complete(jobs, served)
            if not schedule.missed:
                return
            first_s = schedule.missed[0].open.job.deadline_s
            cuts.append(frozenset(k for k in selection.chosen if demands[k].deadline_s <= first_s))
        for _ in range(MAX_DROPS):
            if not schedule.missed or search.is_over():
                return
            served, schedule = self._drop_one(search, jobs, served, schedule)

    def _drop_one(
        self, search: _Search, jobs: Sequence[OpenJob], served: list[int], schedule: Schedule
    ) -> tuple[list[int], Schedule]:
        """Set aside the first that is late, or the dearest of those due until then, whichever ends better."""
        first = schedule.missed[0].open
        due = [i for i in served if jobs[i].job.deadline_s <= first.job.deadline_s]
        dearest = max(due, key=lambda i: _demand(jobs[i]).gpu_seconds)
        options = []
        for victim in {next(i for i in due if jobs[i] is first), dearest}:
            rest = [i for i in served if i != victim]
            options.append((rest, search.complete(jobs, rest)))
        return max(options, key=lambda option: _worth(option[1]))


def _demand(job: OpenJob) -> Demand:
    """GPU-seconds of the cheapest way to be on time: all slack goes to the first phase with a choice."""
    gpu_seconds = 0.0
    slack_s = job.slack_s
    for work in job.work:
        budget_s = work.steps * work.table.fastest_s + max(0.0, slack_s)
        mix = work.table.cheapest(work.steps, budget_s)
        assert mix is not None, "the fastest degree fits its own time"
        gpu_seconds += mix.gpu_seconds
        slack_s -= mix.seconds - work.steps * work.table.fastest_s
    return Demand(job.job.deadline_s, gpu_seconds, job.job.set_aside, job.job.priority)
