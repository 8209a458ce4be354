"""The ILP packer (`ilp`): choose whom to serve on time, then prove it by an exact list schedule (packing.md).

In nine of ten decisions everybody can be on time and a list schedule of all shows it; the ILP is only asked
otherwise. Whatever happens to the solver or the clock, the best schedule found so far is a valid packing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from solver.board import Board, OpenJob, longest_starving, waiting_order
from solver.listing import fill_gaps, schedule_on_time
from solver.problem import Packing, Snapshot
from solver.schedule import Rule, Run, Schedule
from solver.selection import Demand, select

RULES = (
    Rule(single_degree=True),
    Rule(),
    Rule(hold=True),
    Rule(single_degree=True, hold=True),
)
"""Variants of the exact completion, best first; all are tried while the clock allows."""
MAX_CUTS = 3
MAX_DROPS = 6
SAFE_SHARE = 0.2
"""Slack at the end, as a share of the budget, beyond which a plan counts as safe."""


@dataclass
class _Search:
    """The best completion so far, within a limit on the clock."""

    board: Board
    end_s: float
    spare: int
    starving: OpenJob | None
    best: Schedule | None = None
    best_served: frozenset[int] = frozenset()
    best_starving: Run | None = None
    info: dict[str, float] = field(default_factory=lambda: {"completions": 0.0, "ilps": 0.0})

    def is_over(self) -> bool:
        return time.perf_counter() >= self.end_s

    def complete(self, jobs: Sequence[OpenJob], served: Collection[int]) -> Schedule:
        """The best completion of a choice of requests; remembered when it is the best of all."""
        found: Schedule | None = None
        for rule in RULES:
            if found is not None and self.is_over():
                break
            starving = None if self.starving is None else Run(self.starving)
            runs = [Run(jobs[i]) for i in served]
            schedule = schedule_on_time(self.board, runs, rule, spare=self.spare, starving=starving)
            self.info["completions"] += 1
            if found is None or _worth(schedule) > _worth(found):
                found = schedule
            if self.best is None or _worth(schedule) > _worth(self.best):
                self.best, self.best_served, self.best_starving = schedule, frozenset(served), starving
        assert found is not None
        return found


def _worth(schedule: Schedule) -> tuple[int, float, float]:
    """More on time; then not on the edge, since the next arrival is not in the plan; then lower mean finish."""
    return schedule.on_time, min(schedule.safety, SAFE_SHARE), -schedule.finish_sum_s


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
        jobs = [job for job in board.jobs if not job.is_late and job.job.deadline_s < math.inf]
        late = sorted((job for job in board.jobs if job.is_late), key=waiting_order)
        patient = sorted((job for job in board.jobs if job.job.deadline_s == math.inf), key=waiting_order)
        starving = longest_starving(snapshot.now_s, [*patient, *late])
        end_s = time.perf_counter() + self.time_limit_s
        # a request without deadline is no reason to be late, but comes before widening others beyond their need
        search = _Search(board, end_s, spare=len(patient), starving=starving)
        if search.complete(jobs, range(len(jobs))).missed:
            self._improve(search, jobs)
        schedule = search.best
        assert schedule is not None
        set_aside = schedule.missed + [Run(job) for i, job in enumerate(jobs) if i not in search.best_served]
        rest = [search.best_starving if job is starving else Run(job) for job in [*patient, *late]]
        fill_gaps(board, schedule, set_aside + [run for run in rest if run is not None])
        return Packing(tuple(schedule.entries), frozenset(run.open.job.id for run in set_aside), search.info)

    def _improve(self, search: _Search, jobs: Sequence[OpenJob]) -> None:
        """Set requests aside as the ILP says, cut by cut; then one by one by hand."""
        demands = [_demand(job) for job in jobs]
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
            served = sorted(selection.chosen)
            schedule = search.complete(jobs, served)
            if not schedule.missed:
                return
            first_s = schedule.missed[0].open.job.deadline_s
            cuts.append(frozenset(i for i in served if demands[i].deadline_s <= first_s))
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
