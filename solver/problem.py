"""The packing problem: what a policy sees (`Snapshot`) and what it answers (`Packing`).

Times are seconds on the caller's clock. Nothing here knows about torch, Ray or wall time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Shared:
    """What a request brings to a step that it shares with others, at one degree.

    Attributes:
        floor_s: no shared step takes less: launching kernels, however little they have to do, and what this one takes
            alone.
        overhead_s: what a shared step takes beside its requests.
        add_s: what this one adds.
    """

    floor_s: float
    overhead_s: float
    add_s: float


def shared_step_s(terms: Sequence[Shared]) -> float:
    """The batch law (design section 4): seconds of a step of several requests."""
    floor_s, overhead_s = max([t.floor_s for t in terms]), max([t.overhead_s for t in terms])
    return max(floor_s, overhead_s + sum([t.add_s for t in terms]))


@dataclass(frozen=True)
class Phase:
    """A run of equal steps that a request still has to go through.

    Attributes:
        kind: "encode", "denoise" or "decode".
        steps: whole steps left, at least 1. Encode and decode are phases of one step.
        step_s: seconds of one step by sequence-parallel degree; only degrees that are allowed.
        component: what a GPU must hold to run it, "" for nothing in particular.
        company: requests whose phases have the same may share steps, each its own; "" for none.
        shared: the batch law's terms by degree, where it may.
    """

    kind: str
    steps: int
    step_s: Mapping[int, float]
    component: str = ""
    company: str = ""
    shared: Mapping[int, Shared] = field(default_factory=dict)

    @property
    def fastest_step_s(self) -> float:
        return min(self.step_s.values())


def step_together_s(phases: Sequence[Phase], degree: int) -> float:
    """Seconds of one step of these phases together; of one alone its own."""
    if len(phases) == 1:
        return phases[0].step_s[degree]
    return shared_step_s([phase.shared[degree] for phase in phases])


def least_work_s(phases: Iterable[Phase]) -> float:
    """Seconds that phases take one after the other, every step at its fastest degree."""
    return sum(phase.steps * phase.fastest_step_s for phase in phases)


@dataclass(frozen=True)
class Job:
    """One open request: the phases that are not yet committed to any GPU.

    Attributes:
        deadline_s: absolute; `math.inf` when the request has none.
        ready_s: when its committed work ends (or when it arrived); it cannot start earlier.
        gpus: the GPUs of its last assignment, empty before the first; keeping them saves a hand-off.
        set_aside: the last packing gave this request up for the sake of others.
        priority: tie-break, larger first.
        slo_s: the budget it arrived with (deadline minus arrival); `math.inf` without deadline.
        client: whose it is; clients share the board equally.
        promised: it was accepted on condition of being on time; nobody else's being on time is worth that.
        alone_s: seconds from arrival to the end if it had everything at once, at its fastest degrees.
    """

    id: str
    arrival_s: float
    deadline_s: float
    ready_s: float
    phases: tuple[Phase, ...]
    gpus: tuple[int, ...] = ()
    set_aside: bool = False
    priority: int = 0
    slo_s: float = math.inf
    client: str | None = None
    promised: bool = False
    alone_s: float = 0.0

    @property
    def least_work_s(self) -> float:
        """Seconds to finish with every step at its fastest degree."""
        return least_work_s(self.phases)

    def is_late(self, now_s: float) -> bool:
        """True when no plan can finish it by its deadline any more."""
        return max(now_s, self.ready_s) + self.least_work_s > self.deadline_s + 1e-9


@dataclass(frozen=True)
class Load:
    """What arrives with about one SLO.

    Attributes:
        slo_s: from arrival to deadline.
        gpus: mean number of GPUs that these requests keep busy when each is served in its cheapest way.
    """

    slo_s: float
    gpus: float


@dataclass(frozen=True)
class Snapshot:
    """The board and the open requests at one instant of decision.

    Attributes:
        round_s: round length.
        free_at_s: per GPU, when its committed work ends (`<= now_s` when idle), `math.inf` when lost.
        expected: the load of the recent past, as a forecast ...
        newcomer_slack_s: ... and how long nearly each of those who arrive can wait for its GPUs.
        max_batch: so many requests may share a step.
    """

    now_s: float
    round_s: float
    free_at_s: tuple[float, ...]
    jobs: tuple[Job, ...]
    next_boundary_s: float | None = None
    expected: tuple[Load, ...] = ()
    newcomer_slack_s: float = math.inf
    max_batch: int = 1

    @property
    def boundary_s(self) -> float:
        """The next round boundary, one round from now unless the caller knows better."""
        return self.now_s + self.round_s if self.next_boundary_s is None else self.next_boundary_s


@dataclass(frozen=True)
class Entry:
    """A rectangle on the board: whole steps of one phase, of one request or of several together, on a GPU set, at
    degree `len(gpus)`."""

    job_ids: tuple[str, ...]
    kind: str
    gpus: tuple[int, ...]
    steps: int
    start_s: float
    end_s: float

    @property
    def degree(self) -> int:
        return len(self.gpus)


@dataclass(frozen=True)
class Packing:
    """A policy's answer: entries in order of start, and whom it gave up for now.

    Entries of one request never overlap and follow its phases in order; no GPU is used twice at a time; who shares an
    entry is of the same company. The caller commits what starts in its window and asks again later; the rest is the
    look-ahead.
    """

    entries: tuple[Entry, ...]
    set_aside: frozenset[str] = frozenset()
    info: Mapping[str, float] = field(default_factory=dict)

    def ends_s(self, jobs: Iterable[Job]) -> dict[str, float]:
        """When those of `jobs` end that it has whole, by id."""
        steps: Counter[str] = Counter()
        end_s: dict[str, float] = {}
        for entry in self.entries:
            for job_id in entry.job_ids:
                steps[job_id] += entry.steps
                end_s[job_id] = max(entry.end_s, end_s.get(job_id, -math.inf))
        whole = (job.id for job in jobs if steps[job.id] >= sum(phase.steps for phase in job.phases))
        return {job_id: end_s[job_id] for job_id in whole}


class Policy(Protocol):
    """A pure map from a snapshot to a packing; one object may be asked any number of times.

    Attributes:
        round_steps: default round length, in steps of the largest open shape at its fastest degree.
        replans_on_arrival: arrivals and freed GPUs are instants of decision too, not only boundaries.
    """

    @property
    def name(self) -> str: ...

    @property
    def round_steps(self) -> float: ...

    @property
    def replans_on_arrival(self) -> bool: ...

    def __call__(self, snapshot: Snapshot) -> Packing: ...
