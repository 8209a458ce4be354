"""Deadline-aware allocation: the cheapest degrees for the remaining steps of one request.

TetriServe paper 2.2: least GPU-seconds subject to the time budget. With step times that depend only on the
degree, the relaxation has two constraints (step count, time), so two degrees suffice and can be enumerated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

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
    """

    degrees: tuple[int, ...]
    seconds: tuple[float, ...]

    @cached_property
    def fastest_s(self) -> float:
        return self.seconds[-1]

    def step_s(self, degree: int) -> float:
        return self.seconds[self.degrees.index(degree)]

    def cheapest(self, steps: int, budget_s: float) -> Mix | None:
        """The mix of at most two degrees with the least GPU-seconds that ends within `budget_s`.

        Ties go to the faster mix. None when even the fastest degree does not fit.
        """
        best: Mix | None = None
        for wide_at, wide_s in enumerate(self.seconds):
            if steps * wide_s > budget_s + TOLERANCE_S:
                continue
            for narrow_at in range(wide_at + 1):
                mix = self._split(steps, budget_s, narrow_at, wide_at)
                if best is None or (mix.gpu_seconds, mix.seconds) < (best.gpu_seconds, best.seconds):
                    best = mix
        return best

    def _split(self, steps: int, budget_s: float, narrow_at: int, wide_at: int) -> Mix:
        """The best split of `steps` over two degrees; all at the wide one fits."""
        narrow, wide = self.degrees[narrow_at], self.degrees[wide_at]
        narrow_s, wide_s = self.seconds[narrow_at], self.seconds[wide_at]
        at_narrow = steps if narrow_at == wide_at else 0
        if narrow_s > wide_s and narrow * narrow_s < wide * wide_s:
            spare_s = budget_s - steps * wide_s + TOLERANCE_S
            at_narrow = steps if spare_s == math.inf else min(steps, int(spare_s / (narrow_s - wide_s)))
        parts = ((narrow, at_narrow, narrow_s), (wide, steps - at_narrow, wide_s))
        return Mix(
            steps=tuple((degree, count) for degree, count, _ in parts if count),
            seconds=sum(count * step_s for _, count, step_s in parts),
            gpu_seconds=sum(degree * count * step_s for degree, count, step_s in parts),
        )

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
