"""The ILP packer (`ilp`): choose whom to serve on time, then prove it by an exact list schedule (packing.md).

In nine of ten decisions everybody can be on time and a list schedule of all shows it; the ILP is only asked
otherwise. Whatever happens to the solver or the clock, the best schedule found so far is a valid packing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from solver.allocation import least_gpu_seconds
from solver.board import Board, OpenJob, first_starving, waiting_order
from solver.completion import fill_gaps, schedule_on_time
from solver.fairness import fair_weights
from solver.forecast import with_room_for_newcomers
from solver.problem import Packing, Snapshot
from solver.riding import ride
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
GATHERING = (Rule(single_degree=True, gather=True), Rule(gather=True), *RULES)
"""The same where steps may be shared."""
MAX_DROPS = 3
SAFE_SHARE = 0.2
"""Slack at the end, as a share of the budget, beyond which a plan counts as safe."""


class _Search:
    """The best completion so far, within a limit on the clock.

    Attributes:
        jobs: those that can be on time; `late` cannot, `patient` have no deadline.
        rules: variants of the completion, best first.
        spare: idle GPUs that nobody is widened onto: while nobody is late for it, requests without deadline come
            before widening others beyond their need.
        best_served: indices into `jobs`.
    """

    def __init__(self, board: Board, stop_s: float) -> None:
        self.board = board
        self.stop_s = stop_s
        self.jobs = [job for job in board.jobs if not job.is_late and job.job.deadline_s < math.inf]
        self.late = sorted((job for job in board.jobs if job.is_late), key=waiting_order)
        patient = (job for job in board.jobs if job.job.deadline_s == math.inf)
        self.patient = sorted(patient, key=waiting_order)
        self.starving = first_starving(board, [*self.patient, *self.late])
        self.demands = _demands(board, self.jobs)
        self.spare = len(self.patient)
        self.rules = GATHERING if board.has_company else RULES
        self.best: Schedule | None = None
        self.best_served: frozenset[int] = frozenset()
        self.best_starving: Run | None = None
        self.info = {"completions": 0.0, "ilps": 0.0}

    @property
    def schedule(self) -> Schedule:
        assert self.best is not None
        return self.best

    @property
    def set_aside(self) -> list[Run]:
        """Those of `jobs` that the best does not have on time, as they go on behind it."""
        rest = [Run(job) for i, job in enumerate(self.jobs) if i not in self.best_served]
        return self.schedule.missed + rest

    @property
    def left_s(self) -> float:
        return self.stop_s - time.perf_counter()

    def is_over(self) -> bool:
        return self.left_s <= 0

    def complete(self, served: Collection[int], rules: Sequence[Rule]) -> Schedule:
        """The best completion of a choice of requests; remembered when it is the best of all."""
        found: Schedule | None = None
        for rule in rules:
            if found is not None and (self.is_over() or _is_good(found)):
                break
            starving = None if self.starving is None else Run(self.starving)
            runs = [Run(self.jobs[i], self.demands[i].weight) for i in served]
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
        # what starts now ends before the least patient newcomer would be late
        board = Board(with_room_for_newcomers(snapshot), longest_range_s=snapshot.newcomer_slack_s)
        search = self._search(board, stop_s)
        set_aside, starving = search.set_aside, search.starving
        schedule, riders, began = ride(
            board,
            search.schedule,
            set_aside + [Run(job) for job in search.late if job is not starving],
            starving,
            spare=search.spare,
            stop_s=stop_s,
        )
        search.info["riders"] = float(sum(run.rides for run in riders))
        first = began or search.best_starving
        rest = [Run(job) for job in search.patient if job is not starving]
        best_effort = [*([] if first is None else [first]), *riders, *rest]
        # nobody waits for these, and what starts later is decided later
        until_s = snapshot.boundary_s + snapshot.round_s
        fill_gaps(board, schedule, best_effort, until_s=until_s, stop_s=stop_s)
        entries = tuple(entries_of(schedule.segments))
        return Packing(entries, frozenset(run.open.job.id for run in set_aside), search.info)

    def _search(self, board: Board, stop_s: float) -> _Search:
        """Whom to serve on time, and how."""
        search = _Search(board, stop_s)
        everybody = range(len(search.jobs))
        if fits_all(search.demands, board.capacity):
            search.complete(everybody, search.rules[:1])
            if search.best and not search.best.missed and not _is_good(search.best):
                search.complete(everybody, search.rules[1:])
        if search.best is None or search.best.missed:
            search.spare = 0  # those without deadline wait rather than make somebody late
            self._improve(search)
        if search.best is None:
            search.complete(everybody, search.rules[:1])
        if any(run.open.job.promised for run in search.set_aside):
            self._keep_promises(search)
        return search

    def _keep_promises(self, search: _Search) -> None:
        """Those with a promise by themselves, then one more after the other, the cheapest first, while all are on
        time."""
        served = [i for i, job in enumerate(search.jobs) if job.job.promised]
        schedule = search.complete(served, search.rules)
        others = set(range(len(search.jobs))).difference(served)
        for i in sorted(others, key=lambda i: search.demands[i].gpu_seconds):
            if schedule.missed or search.is_over():
                return
            more = search.complete([*served, i], (schedule.rule,))
            if not more.missed:
                served, schedule = [*served, i], more

    def _improve(self, search: _Search) -> None:
        """Set requests aside as the ILP says; then one by one, as far as whole steps show that it asks too much."""
        served, schedule = list(range(len(search.jobs))), search.best
        if not search.is_over():
            selection = select(search.demands, search.board.capacity, time_limit_s=search.left_s)
            search.info["ilps"] += 1
            if selection is not None:
                served = sorted(selection.chosen)
                schedule = search.complete(served, search.rules)
        for _ in range(MAX_DROPS):
            if schedule is None or not schedule.missed or search.is_over():
                return
            served, schedule = self._drop_one(search, served, schedule)

    def _drop_one(self, search: _Search, served: list[int], schedule: Schedule) -> tuple[list[int], Schedule]:
        """Set aside the first that is late, or the dearest of those due until then, whichever ends better."""
        jobs, demands = search.jobs, search.demands
        first = schedule.missed[0].open
        due = [i for i in served if jobs[i].job.deadline_s <= first.job.deadline_s]
        dearest = max(due, key=lambda i: demands[i].gpu_seconds / demands[i].weight)
        options = []
        for victim in {next(i for i in due if jobs[i] is first), dearest}:
            rest = [i for i in served if i != victim]
            options.append((rest, search.complete(rest, (schedule.rule,))))
        return max(options, key=lambda option: _worth(option[1]))


def _demands(board: Board, jobs: Sequence[OpenJob]) -> list[Demand]:
    """What each request costs when it is served in the cheapest way that is on time, and what that is worth."""
    now_s = board.snapshot.now_s
    costs = [
        least_gpu_seconds(((work.steps, work.costs) for work in job.work), job.job.deadline_s - job.start_s)
        for job in jobs
    ]
    gpus = [cost / (job.job.deadline_s - now_s) for cost, job in zip(costs, jobs, strict=True)]
    weights = fair_weights([job.job.client for job in jobs], gpus, len(board.free_at_s))
    others = sum(weight for weight, job in zip(weights, jobs, strict=True) if not job.job.promised)
    weights = [w * (1 + others) if job.job.promised else w for w, job in zip(weights, jobs, strict=True)]
    return [
        Demand(job.job.deadline_s, cost, job.job.set_aside, job.job.priority, weight)
        for job, cost, weight in zip(jobs, costs, weights, strict=True)
    ]
