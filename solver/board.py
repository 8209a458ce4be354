"""The snapshot in the form that list schedules work on: tables per phase, masks per GPU set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from solver.allocation import StepTable, shared_costs, short_steps, step_table
from solver.placement import GpuSet, mask_of, sets_of
from solver.problem import Job, Phase, Shared, Snapshot

EPSILON_S = 1e-9
BEST_EFFORT_SHARE = 0.01
"""Share of the board that best-effort requests get together, however many others could be on time.

Together, not each: under lasting overload they are many, and a share each would take the GPUs from those that can
be on time."""


@dataclass(frozen=True)
class Work:
    """A phase with the degrees that can run on this board.

    Attributes:
        tail_s: seconds of the later phases, each step at its fastest degree.
        costs: `table` with what others can use of a shared step: the least GPU-seconds it can cost.
        company, shared: as of the phase.
    """

    kind: str
    steps: int
    table: StepTable
    tail_s: float
    costs: StepTable
    company: str = ""
    shared: Mapping[int, Shared] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenJob:
    """A job whose every phase can run on the GPUs that are left.

    Attributes:
        start_s: earliest start, never before now.
        gpus: mask of the GPUs of its last assignment.
    """

    job: Job
    start_s: float
    gpus: int
    work: tuple[Work, ...]

    @cached_property
    def least_s(self) -> float:
        """Seconds to finish with every step at its fastest degree."""
        return sum(work.steps * work.table.fastest_s for work in self.work)

    @cached_property
    def least_gpu_s(self) -> float:
        """GPU-seconds to finish with every step at its narrowest degree."""
        return sum(work.steps * work.table.degrees[0] * work.table.seconds[0] for work in self.work)

    @property
    def slack_s(self) -> float:
        """Seconds it can afford to lose; negative when no plan can be on time."""
        return self.job.deadline_s - self.start_s - self.least_s

    @property
    def is_late(self) -> bool:
        return self.slack_s < -EPSILON_S


@dataclass(frozen=True)
class Board:
    """A snapshot without lost GPUs and without what cannot run.

    Attributes:
        sets: GPU sets by degree, those with a lost GPU left out.
        longest_range_s: what starts now ends within it where it can: degrees with longer steps are left out as far as
            there are better ones (`short_steps`).
    """

    snapshot: Snapshot
    longest_range_s: float = math.inf

    @cached_property
    def free_at_s(self) -> tuple[float, ...]:
        return tuple(max(free_s, self.snapshot.now_s) for free_s in self.snapshot.free_at_s)

    @cached_property
    def sets(self) -> Mapping[int, tuple[GpuSet, ...]]:
        n_gpus = len(self.free_at_s)
        lost = mask_of([gpu for gpu, free_s in enumerate(self.free_at_s) if free_s == math.inf])
        degrees = {d for job in self.snapshot.jobs for phase in job.phases for d in phase.step_s}
        alive = {d: tuple(s for s in sets_of(n_gpus, d) if not s.mask & lost) for d in degrees}
        return {degree: sets for degree, sets in alive.items() if sets}

    @cached_property
    def has_company(self) -> bool:
        """Whether anybody may share steps."""
        return any(work.company for job in self.jobs for work in job.work)

    @cached_property
    def jobs(self) -> tuple[OpenJob, ...]:
        """The jobs that can run on what is left; others wait for their GPUs to come back."""
        opened = (self._open(job) for job in self.snapshot.jobs)
        return tuple(job for job in opened if job is not None)

    def _open(self, job: Job) -> OpenJob | None:
        tables = [self._table(phase) for phase in job.phases]
        if not tables:
            return None
        work: list[Work] = []
        tail_s = 0.0
        for phase, table in zip(reversed(job.phases), reversed(tables), strict=True):
            if table is None:
                return None
            most = self.snapshot.max_batch
            costs, company = shared_costs(phase, table, most), phase.company if most > 1 else ""
            work.append(Work(phase.kind, phase.steps, table, tail_s, costs, company, phase.shared))
            tail_s += phase.steps * table.fastest_s
        start_s = max(self.snapshot.now_s, job.ready_s)
        return OpenJob(job, start_s, mask_of(job.gpus), tuple(reversed(work)))

    def _table(self, phase: Phase) -> StepTable | None:
        usable = {degree: step_s for degree, step_s in phase.step_s.items() if degree in self.sets}
        return short_steps(step_table(usable), self.longest_range_s) if usable else None

    def capacity(self, deadline_s: float) -> float:
        """GPU-seconds that are not committed yet between now and `deadline_s`."""
        return sum(max(0.0, deadline_s - free_s) for free_s in self.free_at_s if free_s < math.inf)


def waiting_order(job: OpenJob) -> tuple[int, float, str]:
    """First come, first served within a priority."""
    return (-job.job.priority, job.job.arrival_s, job.job.id)


def first_starving(board: Board, best_effort: Sequence[OpenJob]) -> OpenJob | None:
    """The best-effort request that ends soonest, when its kind has waited long enough to be owed a segment."""
    if not best_effort:
        return None
    first = min(best_effort, key=lambda job: (-job.job.priority, job.least_s, *waiting_order(job)))
    table, snapshot = first.work[0].table, board.snapshot
    segment_gpu_s = table.degrees[0] * max(table.seconds[0], snapshot.round_s)
    waited_s = snapshot.now_s - max(job.job.ready_s for job in best_effort)
    return first if waited_s * BEST_EFFORT_SHARE * len(board.free_at_s) >= segment_gpu_s else None
