"""What the brain keeps: open requests, and the ranges of their steps that it has committed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from solver.problem import Job, Phase, least_work_s
from tetriserve.scheduler.promises import with_margin

EPSILON_S = 1e-9


@dataclass(frozen=True)
class Assignment:
    """A committed step range.

    Attributes:
        seq: global plan order; every GPU executes its assignments in increasing `seq`.
        request_ids: who shares its steps; one in all but denoising.
        first_steps: of each, the index of its first denoising step; 0 for encode and decode.
        start_s, end_s: predicted, on the caller's clock.
        after: for each GPU of `gpus`, the `seq` of the assignment before this one there, -1 for none.
        others: how many other requests were open.
        component: what its GPUs hold to run it.
    """

    seq: int
    request_ids: tuple[str, ...]
    kind: str
    gpus: tuple[int, ...]
    first_steps: tuple[int, ...]
    steps: int
    start_s: float
    end_s: float
    after: tuple[int, ...]
    others: int = 0
    component: str = ""

    def __str__(self) -> str:
        shared = f", shared by {len(self.request_ids)}," if self.is_shared else ""
        gpus = ", ".join(map(str, self.gpus))
        return f"range {self.seq}, {self.steps} steps of {self.kind}{shared} on GPUs {gpus}"

    @property
    def degree(self) -> int:
        return len(self.gpus)

    @property
    def is_shared(self) -> bool:
        return len(self.request_ids) > 1


@dataclass(frozen=True)
class RoundPlan:
    """What one decision committed, in plan order."""

    assignments: tuple[Assignment, ...]
    boundary_s: float


@dataclass
class OpenRequest:
    """An open request: its chain of phases and how far it is committed and confirmed, in whole steps.

    Attributes:
        reject_infeasible: the next packing decides whether it may stay ...
        promised: ... it has, and is to be on time.
        planned_end_s: its end in the last packing, None when that did not reach it.
        alone_s: seconds that all of it takes at its fastest degrees.
        cheaper: a lossy chain that may be taken instead before anything of it is committed, if the deadline would be
            missed otherwise; empty: none may.
    """

    id: str
    arrival_s: float
    deadline_s: float
    phases: tuple[Phase, ...]
    priority: int
    drop_late: bool
    reject_infeasible: bool
    client: str | None = None
    committed: int = 0
    confirmed: int = 0
    ready_s: float = 0.0
    gpus: tuple[int, ...] = ()
    set_aside: bool = False
    outstanding: list[int] = field(default_factory=list)
    aborting: bool = False
    planned_end_s: float | None = None
    promised: bool = False
    alone_s: float = 0.0
    cheaper: tuple[Phase, ...] = ()

    def cheapen(self, now_s: float) -> None:
        """Take the cheaper chain, if it is late without, alone or by the last packing, and can be in time with."""
        if not self.cheaper or self.committed:
            return
        ends_s = max(now_s + least_work_s(self.phases), self.planned_end_s or 0.0)
        is_late = self.set_aside or ends_s > self.deadline_s
        if is_late and now_s + least_work_s(self.cheaper) <= self.deadline_s:
            self.phases, self.cheaper = self.cheaper, ()

    @property
    def plannable(self) -> bool:
        """Has steps to commit, and no range in flight that is bound to fail with an earlier one."""
        return self.committed < self.total and not self.aborting

    @property
    def total(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def remaining(self) -> tuple[Phase, ...]:
        """Phases not yet committed."""
        skip, left = self.committed, []
        for phase in self.phases:
            if skip >= phase.steps:
                skip -= phase.steps
                continue
            left.append(replace(phase, steps=phase.steps - skip))
            skip = 0
        return tuple(left)

    def first_step(self) -> int:
        """Index of the next uncommitted step within its own phase."""
        skip = self.committed
        for phase in self.phases:
            if skip < phase.steps:
                return skip
            skip -= phase.steps
        return 0

    def job(self) -> Job:
        """As a policy sees it."""
        deadline_s = self.deadline_s
        if self.reject_infeasible:
            deadline_s = with_margin(self.arrival_s, deadline_s)
        return Job(
            id=self.id,
            arrival_s=self.arrival_s,
            deadline_s=deadline_s,
            ready_s=self.ready_s,
            phases=self.remaining(),
            gpus=self.gpus,
            set_aside=self.set_aside,
            priority=self.priority,
            slo_s=self.deadline_s - self.arrival_s,
            client=self.client,
            promised=self.promised,
            alone_s=self.alone_s,
        )


def fits(phases: Iterable[Phase], n_gpus: int) -> bool:
    """Whether each has a degree for so many GPUs."""
    return all(any(degree <= n_gpus for degree in phase.step_s) for phase in phases)
