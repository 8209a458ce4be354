"""Deadline-aware allocation: the cheapest degrees for the remaining steps of one request.

TetriServe paper 2.2: least GPU-seconds subject to the time budget. With step times that depend only on the
degree, the relaxation has two constraints (step count, time), so two degrees suffice and can be enumerated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from solver.problem import Phase, Shared

TOLERANCE_S = 1e-9


@dataclass(frozen=True)
class Mix:
    """Whole steps at one or two degrees.

    Attributes:
        steps: (degree, steps) pairs, narrow first, none with zero steps.
        seconds: time when run back to back.
        gpu_seconds: sum of degree x time.
    """

    steps: tuple[tuple[int, int], ...]
    seconds: float
    gpu_seconds: float

    @property
    def narrowest(self) -> int:
        return self.steps[0][0]


@dataclass(frozen=True)
class StepTable:
    """Step times of one phase at the degrees worth using, narrow to wide and strictly faster.

    A degree that is no faster than a narrower one is never part of a cheapest mix, so it is left out.

    Attributes:
        wait_s: the part of `seconds` in which the GPUs are free for others, so that it costs nothing; () for none.
    """

    degrees: tuple[int, ...]
    seconds: tuple[float, ...]
    wait_s: tuple[float, ...] = ()

    @cached_property
    def fastest_s(self) -> float:
        return self.seconds[-1]

    def step_s(self, degree: int) -> float:
        return self.seconds[self.degrees.index(degree)]

    def cheapest(self, steps: int, budget_s: float) -> Mix | None:
        """The mix of at most two degrees with the least GPU-seconds that ends within `budget_s`.

        Ties go to the faster mix. None when even the fastest degree does not fit.
        """
        split = self._cheapest_split(steps, budget_s)
        if split is None:
            return None
        gpu_seconds, seconds, narrow_at, wide_at, at_narrow = split
        parts = ((self.degrees[narrow_at], at_narrow), (self.degrees[wide_at], steps - at_narrow))
        return Mix(tuple((degree, count) for degree, count in parts if count), seconds, gpu_seconds)

    def least_cost(self, steps: int, budget_s: float) -> tuple[float, float]:
        """GPU-seconds and seconds of the `cheapest` mix; all at the fastest degree when none fits."""
        split = self._cheapest_split(steps, budget_s)
        if split is None:
            return self.degrees[-1] * steps * self.fastest_s, steps * self.fastest_s
        return split[0], split[1]

    def _cheapest_split(self, steps: int, budget_s: float) -> tuple[float, float, int, int, int] | None:
        """GPU-seconds, seconds, indices of the narrow and the wide degree, steps at the narrow one."""
        best: tuple[float, float, int, int, int] | None = None
        degrees, times = self.degrees, self.seconds
        waits_s = self.wait_s or (0.0,) * len(degrees)
        costs = [d * (step_s - wait_s) for d, step_s, wait_s in zip(degrees, times, waits_s, strict=True)]
        for wide_at, wide_s in enumerate(times):
            spare_s = budget_s - steps * wide_s + TOLERANCE_S
            if spare_s < 0:
                continue
            wide_cost = costs[wide_at]
            for narrow_at in range(wide_at + 1):
                narrow_s = times[narrow_at]
                narrow_cost = costs[narrow_at]
                at_narrow = steps if narrow_at == wide_at else 0
                if narrow_s > wide_s and narrow_cost < wide_cost:
                    at_narrow = (
                        steps if spare_s == math.inf else min(steps, int(spare_s / (narrow_s - wide_s)))
                    )
                cost = at_narrow * narrow_cost + (steps - at_narrow) * wide_cost
                seconds = at_narrow * narrow_s + (steps - at_narrow) * wide_s
                if best is None or (cost, seconds) < best[:2]:
                    best = (cost, seconds, narrow_at, wide_at, at_narrow)
        return best

    def narrowest_single(self, steps: int, budget_s: float) -> Mix | None:
        """All steps at the narrowest degree that ends within `budget_s`; None when none does."""
        for degree, step_s in zip(self.degrees, self.seconds, strict=True):
            if steps * step_s <= budget_s + TOLERANCE_S:
                return Mix(((degree, steps),), steps * step_s, degree * steps * step_s)
        return None


@lru_cache(maxsize=4096)
def _table(items: tuple[tuple[int, float], ...]) -> StepTable:
    degrees: list[int] = []
    seconds: list[float] = []
    for degree, step_s in items:
        if not seconds or step_s < seconds[-1]:
            degrees.append(degree)
            seconds.append(step_s)
    return StepTable(tuple(degrees), tuple(seconds))


def step_table(step_s: Mapping[int, float]) -> StepTable:
    """The table of a phase. Raises ValueError when it has no degree at all."""
    if not step_s:
        raise ValueError("a phase needs at least one degree")
    return _table(tuple(sorted(step_s.items())))


def shared_costs(phase: Phase, table: StepTable, most: int) -> StepTable:
    """The table of a phase in which only what a request takes of a step shared by `most` costs something; as it is
    where steps are not shared."""
    if not phase.company or most == 1:
        return table
    return _shared_costs(table, tuple(sorted(phase.shared.items())), most)


@lru_cache(maxsize=4096)
def _shared_costs(table: StepTable, shared: tuple[tuple[int, Shared], ...], most: int) -> StepTable:
    terms_of, wait_s = dict(shared), []
    for degree, step_s in zip(table.degrees, table.seconds, strict=True):
        terms = terms_of.get(degree)
        own_s = step_s
        if terms is not None:
            own_s = min(step_s, max(terms.add_s + terms.overhead_s / most, terms.floor_s / most))
        wait_s.append(step_s - own_s)
    return StepTable(table.degrees, table.seconds, tuple(wait_s))


@lru_cache(maxsize=4096)
def short_steps(table: StepTable, longest_s: float) -> StepTable:
    """The degrees whose step leaves room for newcomers: from the narrowest that takes at most `longest_s` on.

    Where none does, from the one that blocks least: a newcomer finds ranges of t seconds on k GPUs in proportion to
    k t, and waits t / 2 for them (the residual time of a renewal process).
    """
    degrees, seconds = table.degrees, table.seconds
    first = next((i for i, step_s in enumerate(seconds) if step_s <= longest_s), None)
    if first is None:
        first = min(range(len(seconds)), key=lambda i: degrees[i] * seconds[i] ** 2)
    return table if first == 0 else StepTable(degrees[first:], seconds[first:])


def least_gpu_seconds(work: Iterable[tuple[int, StepTable]], budget_s: float) -> float:
    """GPU-seconds of the cheapest way through (steps, table) in turn within `budget_s`.

    All slack goes to the first phases with a choice; every step at its fastest degree when nothing fits.
    """
    chain = list(work)
    slack_s = max(0.0, budget_s - sum(steps * table.fastest_s for steps, table in chain))
    total = 0.0
    for steps, table in chain:
        least_s = steps * table.fastest_s
        gpu_seconds, seconds = table.least_cost(steps, least_s + slack_s)
        total += gpu_seconds
        slack_s = max(0.0, slack_s - (seconds - least_s))
    return total
