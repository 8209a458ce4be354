"""Requests on their way through a look-ahead, the rules they run by, and the schedule that comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from solver.board import EPSILON_S, OpenJob
from solver.placement import GpuSet
from solver.problem import Entry, shared_step_s


class Run:
    """One request on its way through the look-ahead.

    Attributes:
        steps: left in the current phase, `work`.
        degrees, seconds: of the current phase, narrow to wide.
        ready_s: when it can start or go on.
        latest_s: when it must go on at the latest, at its fastest degrees, to be on time.
        due_s: when the current phase must end at the latest.
        gpus: mask of the GPUs that hold its latents.
        finish_s: infinite until it is done.
        weight: what it is worth on time.
        rides: it is late already and only takes what those on time can spare.
    """

    __slots__ = (
        "degrees",
        "due_s",
        "finish_s",
        "gpus",
        "latest_s",
        "open",
        "phase",
        "ready_s",
        "rides",
        "seconds",
        "steps",
        "weight",
        "work",
    )

    def __init__(self, job: OpenJob, weight: float = 1.0, *, rides: bool = False) -> None:
        self.open = job
        self.weight = weight
        self.rides = rides
        self.ready_s = job.start_s
        self.gpus = job.gpus
        self.finish_s = math.inf
        self.latest_s = job.job.deadline_s - job.least_s
        self._enter(0)

    def _enter(self, phase: int) -> None:
        self.phase = phase
        self.work = self.open.work[phase]
        self.steps = self.work.steps
        self.degrees = self.work.table.degrees
        self.seconds = self.work.table.seconds
        self.due_s = self.open.job.deadline_s - self.work.tail_s + EPSILON_S

    def floor_at(self, now_s: float, single_degree: bool) -> int:
        """Index of the narrowest degree to run at now; a late request gets no more than that."""
        seconds, steps = self.seconds, self.steps
        budget_s = self.due_s - now_s
        narrow = steps if single_degree else 1
        wide = steps - narrow
        last = len(seconds) - 1
        for index in range(last):
            need_s = narrow * seconds[index]
            if wide:
                need_s += wide * seconds[index + 1]
            if need_s <= budget_s:
                return index
        return last if steps * seconds[last] <= budget_s else 0

    def advance(self, steps: int, end_s: float, gpus: int) -> None:
        """Record a segment of the current phase and move on along the chain."""
        self.steps -= steps
        self.ready_s = end_s
        self.gpus = gpus
        self.latest_s += steps * self.seconds[-1]
        if self.steps:
            return
        if self.phase + 1 == len(self.open.work):
            self.finish_s = end_s
        else:
            self._enter(self.phase + 1)

    @property
    def gathers(self) -> bool:
        """It may share steps behind the current phase."""
        later = self.phase + 1
        work = self.open.work
        return not self.work.company and later < len(work) and bool(work[later].company)

    def step_with(self, guests: Sequence[Run], index: int) -> float:
        """Seconds of one step of the current phase that it shares with others."""
        degree = self.degrees[index]
        return shared_step_s([run.work.shared[degree] for run in (self, *guests)])

    def can_share(self, guests: Sequence[Run], index: int) -> bool:
        """Whether all of them can run at that degree."""
        degree = self.degrees[index]
        return degree in self.work.shared and all(degree in guest.work.shared for guest in guests)

    @property
    def is_done(self) -> bool:
        return self.finish_s < math.inf

    def is_hopeless(self, now_s: float) -> bool:
        """It was to be on time and cannot be any more; who rides is late anyway."""
        return self.latest_s < now_s and not self.rides

    @property
    def spare_share(self) -> float:
        """Slack left at the end, as a share of the budget."""
        job = self.open.job
        return (job.deadline_s - self.finish_s) / max(job.deadline_s - job.arrival_s, EPSILON_S)


def by_deadline(run: Run) -> tuple[float, int, float, str]:
    """Earliest deadline first; ties by priority, then arrival."""
    job = run.open.job
    return (job.deadline_s, -job.priority, job.arrival_s, job.id)


def by_laxity(run: Run) -> tuple[float, int, float, str]:
    """Who must go on soonest comes first."""
    return (run.latest_s, *by_deadline(run)[1:])


def by_work(run: Run) -> tuple[float, int, float, str]:
    """Who is soonest done at its fastest degrees comes first."""
    return (run.open.job.deadline_s - run.latest_s, *by_deadline(run)[1:])


Order = Callable[[Run], tuple[float, int, float, str]]


@dataclass(frozen=True)
class Rule:
    """How a list schedule treats the requests that are to be on time.

    Attributes:
        order: who is served first; looked at anew at every instant.
        single_degree: the floor is the narrowest degree that fits all remaining steps, which keeps slack for
            surprises; else the narrowest of the mix, which is cheaper in GPU-seconds and leans on the widening.
        hold: keep GPUs idle for a wide request that is in front but lacks some.
        give_up: a request that cannot be on time any more leaves the schedule.
        gather: while GPUs are short, who may share steps gets through what is before these first, so that it can.
    """

    order: Order = by_deadline
    single_degree: bool = False
    hold: bool = False
    give_up: bool = True
    gather: bool = False


Segment = tuple[float, float, tuple[Run, ...], str, GpuSet, int]
"""Start, end, requests, kind, GPUs, steps: an `Entry` in the making; a look-ahead throws most of them away."""


def entries_of(segments: list[Segment]) -> list[Entry]:
    """In order of start."""
    ordered = sorted(segments, key=lambda segment: segment[:2])
    return [
        Entry(tuple([run.open.job.id for run in runs]), kind, gpus.gpus, steps, start_s, end_s)
        for start_s, end_s, runs, kind, gpus, steps in ordered
    ]


def total_weight(runs: Iterable[Run]) -> float:
    return sum([run.weight for run in runs])


@dataclass
class Schedule:
    """Segments so far and what became of the requests.

    Attributes:
        runs: the requests that were to be on time.
        missed: those of `runs` that became late on the way, in that order, with the work they have left.
        is_cut: it was left off before its end, by the clock or because it could not become the best.
    """

    rule: Rule
    segments: list[Segment]
    runs: list[Run]
    missed: list[Run] = field(default_factory=list)
    is_cut: bool = False

    @property
    def on_time(self) -> float:
        """Weight of the requests on time."""
        return total_weight(self.runs) - total_weight(self.missed)

    @property
    def finish_sum_s(self) -> float:
        return sum(run.finish_s for run in self.runs if run.is_done)

    @property
    def safety(self) -> float:
        """Least slack left at the end, as a share of the request's budget, over those on time."""
        shares = [run.spare_share for run in self.runs if run.finish_s <= run.due_s]
        return min(shares, default=0.0)
