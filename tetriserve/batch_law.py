"""The batch law (design section 4) from measured steps: floors, overheads, and what one more request adds.

A step of several requests lasts max(floor, overhead + sum of what each adds). A GPU has a floor, launching kernels
until there is enough for them to do; a CPU has an overhead. For each degree the one that fits better is taken.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tetriserve.request import Shape

BATCHES = (2, 4)
PAYS = 1.05
"""Requests in a shared step must be served this much faster than alone; below, sharing is not worth its trouble."""

LONGEST_SHARED_S = 0.5
"""Longer steps are not measured together: what they have in common is nothing beside what they compute."""


@dataclass(frozen=True)
class SharedTimes:
    """Steps of requests of one shape at one degree: of one alone, and of several by how many they were."""

    shape: Shape
    alone_s: float
    step_s: Mapping[int, float]

    @property
    def gain(self) -> float:
        """How much faster the most of them are served than one after the other."""
        most = max(self.step_s)
        return most * self.alone_s / self.step_s[most]


def law_of(measured: Mapping[int, Sequence[SharedTimes]]) -> dict[str, Any]:
    """The sections of a profile, by their names; none where sharing pays at no degree.

    Args:
        measured: by degree, from the smallest shape on.
    """
    floors: dict[int, float] = {}
    overheads: dict[int, float] = {}
    adds: dict[Shape, dict[int, float]] = {}
    for degree, times in measured.items():
        if not any(one.gain >= PAYS for one in times):
            continue
        floor_s, overhead_s = min(_laws(times), key=lambda law: _misfit(times, *law))
        floors[degree] = floor_s
        if overhead_s:
            overheads[degree] = overhead_s
        for one in times:
            adds.setdefault(one.shape, {})[degree] = _added(one, overhead_s)
    if not floors:
        return {}
    return {
        "batch_floor_seconds": floors,
        "batch_overhead_seconds": overheads,
        "batch_step_seconds": adds,
    }


def _laws(times: Sequence[SharedTimes]) -> list[tuple[float, float]]:
    """(floor, overhead) of a GPU and of a CPU."""
    least_s = min(min(one.step_s.values()) for one in times)
    overheads = []
    for one in times:
        few, many = min(one.step_s), max(one.step_s)
        slope_s = (one.step_s[many] - one.step_s[few]) / (many - few)
        overheads.append(one.step_s[few] - few * slope_s)
    return [(least_s, 0.0), (0.0, max(0.0, statistics.median(overheads)))]


def _added(one: SharedTimes, overhead_s: float) -> float:
    """What one more adds, by the largest batch; at most what it takes alone."""
    most = max(one.step_s)
    return min(one.alone_s, max(0.0, one.step_s[most] - overhead_s) / most)


def _misfit(times: Sequence[SharedTimes], floor_s: float, overhead_s: float) -> float:
    """Mean relative error."""
    return statistics.fmean(
        abs(max(floor_s, overhead_s + n * _added(one, overhead_s)) / step_s - 1)
        for one in times
        for n, step_s in one.step_s.items()
    )
