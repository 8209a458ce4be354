"""The ILP packer (`ilp`): choose whom to serve on time, then prove it by an exact list schedule (packing.md).

In nine of ten decisions everybody can be on time and a list schedule of all shows it; the ILP is only asked
otherwise. Whatever happens to the solver or the clock, the best schedule found so far is a valid packing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from solver.allocation import least_gpu_seconds
from solver.board import Board, OpenJob, first_starving, waiting_order
from solver.completion import fill_gaps, schedule_on_time
from solver.fairness import fair_weights
from solver.forecast import with_room_for_newcomers
from solver.problem import Packing, Snapshot
from solver.schedule import Rule, Run, Schedule, by_laxity, by_work, entries_of, total_weight
from solver.selection import Demand, fits_all, select

RULES = (
    Rule(single_degree=True),
    Rule(),
    Rule(hold=True),
    Rule(single_degree=True, hold=True),
    Rule(by_laxity, single_degree=True),
    Rule(by_work, single_degree=True),
)
"""Variants of the exact completion, best first; all are tried while the clock allows."""
MAX_DROPS = 3
SAFE_SHARE = 0.2
"""Slack at the end, as a share of the budget, beyond which a plan counts as safe."""


@dataclass
class _Search:
    """The best completion so far, within a limit on the clock."""

    board: Board
    weights: Sequence[float]
    stop_s: float
    spare: int
    starving: OpenJob | None
    best: Schedule | None = None
    best_served: frozenset[int] = frozenset()
    best_starving: Run | None = None
    info: dict[str, float] = field(default_factory=lambda: {"completions": 0.0, "ilps": 0.0})

    @property
    def left_s(self) -> float:
        return self.stop_s - time.perf_counter()

    def is_over(self) -> bool:
        return self.left_s <= 0

    def complete(self, jobs: Sequence[OpenJob], served: Collection[int], rules: Sequence[Rule]) -> Schedule:
        """The best completion of a choice of requests; remembered when it is the best of all."""
        found: Schedule | None = None
        for rule in rules:
            if found is not None and (self.is_over() or _is_good(found)):
                break
            starving = None if self.starving is None else Run(self.starving)
            runs = [Run(jobs[i], self.weights[i]) for i in served]
            schedule = schedule_on_time(
                self.board,
                runs,
                rule,
                spare=self.spare,
                starving=starving,
                may_miss=math.inf if self.best is None else total_weight(runs) - self.best.on_time,
                stop_s=self.stop_s,
            )
            self.info["completions"] += 1
            if found is None or _worth(schedule) > _worth(found):
                found = schedule
            if self.best is None or _worth(schedule) > _worth(self.best):
                self.best, self.best_served, self.best_starving = schedule, frozenset(served), starving
        assert found is not None
        return found


def _is_good(schedule: Schedule) -> bool:
    """Nothing that another rule could do better is worth its time."""
    return not schedule.is_cut and not schedule.missed and schedule.safety >= SAFE_SHARE


def _worth(schedule: Schedule) -> tuple[float, float, float]:
    """More on time; then not on the edge, since the next arrival is not in the plan; then lower mean finish.

    What was left off early has shown nothing.
    """
    if schedule.is_cut:
        return (-1, 0.0, 0.0)
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
        stop_s = time.perf_counter() + self.time_limit_s
        board = Board(with_room_for_newcomers(snapshot))
        jobs = [job for job in board.jobs if not job.is_late and job.job.deadline_s < math.inf]
        late = sorted((job for job in board.jobs if job.is_late), key=waiting_order)
        patient = sorted((job for job in board.jobs if job.job.deadline_s == math.inf), key=waiting_order)
        starving = first_starving(board, [*patient, *late])
        # while nobody is late for it, requests without deadline come before widening others beyond their need
        demands = _demands(board, jobs)
        weights = [demand.weight for demand in demands]
        search = _Search(board, weights, stop_s, spare=len(patient), starving=starving)
        everybody = range(len(jobs))
        if fits_all(demands, board.capacity):
            search.complete(jobs, everybody, RULES[:1])
            if search.best and not search.best.missed and not _is_good(search.best):
                search.complete(jobs, everybody, RULES[1:])
        if search.best is None or search.best.missed:
            search.spare = 0  # those without deadline wait rather than make somebody late
            self._improve(search, jobs, demands)
        if search.best is None:
            search.complete(jobs, everybody, RULES[:1])
        schedule = search.best
        assert schedule is not None
        set_aside = schedule.missed + [Run(job) for i, job in enumerate(jobs) if i not in search.best_served]
        rest = [search.best_starving if job is starving else Run(job) for job in [*patient, *late]]
        best_effort = set_aside + [run for run in rest if run is not None]
        # nobody waits for these, and what starts later is decided later
        fill_gaps(board, schedule, best_effort, until_s=snapshot.boundary_s + snapshot.round_s, stop_s=stop_s)
        entries = tuple(entries_of(schedule.segments))
        return Packing(entries, frozenset(run.open.job.id for run in set_aside), search.info)

    def _improve(self, search: _Search, jobs: Sequence[OpenJob], demands: Sequence[Demand]) -> None:
        """Set requests aside as the ILP says; then one by one, as far as whole steps show that it asks too much."""
        served, schedule = list(range(len(jobs))), search.best
        if not search.is_over():
            selection = select(demands, search.board.capacity, time_limit_s=search.left_s)
            search.info["ilps"] += 1
            if selection is not None:
                served = sorted(selection.chosen)
                schedule = search.complete(jobs, served, RULES)
        for _ in range(MAX_DROPS):
            if schedule is None or not schedule.missed or search.is_over():
                return
            served, schedule = self._drop_one(search, jobs, demands, served, schedule)

    def _drop_one(
        self,
        search: _Search,
        jobs: Sequence[OpenJob],
        demands: Sequence[Demand],
        served: list[int],
        schedule: Schedule,
    ) -> tuple[list[int], Schedule]:
        """Set aside the first that is late, or the dearest of those due until then, whichever ends better."""
        first = schedule.missed[0].open
        due = [i for i in served if jobs[i].job.deadline_s <= first.job.deadline_s]
        dearest = max(due, key=lambda i: demands[i].gpu_seconds / demands[i].weight)
        options = []
        for victim in {next(i for i in due if jobs[i] is first), dearest}:
            rest = [i for i in served if i != victim]
            options.append((rest, search.complete(jobs, rest, (schedule.rule,))))
        return max(options, key=lambda option: _worth(option[1]))


def _demands(board: Board, jobs: Sequence[OpenJob]) -> list[Demand]:
    """What each request costs when it is served in the cheapest way that is on time, and what that is worth."""
    now_s = board.snapshot.now_s
    costs = [
        least_gpu_seconds(((work.steps, work.table) for work in job.work), job.job.deadline_s - job.start_s)
        for job in jobs
    ]
    gpus = [cost / (job.job.deadline_s - now_s) for cost, job in zip(costs, jobs, strict=True)]
    weights = fair_weights([job.job.client for job in jobs], gpus, len(board.free_at_s))
    return [
        Demand(job.job.deadline_s, cost, job.job.set_aside, job.job.priority, weight)
        for job, cost, weight in zip(jobs, costs, weights, strict=True)
    ]
