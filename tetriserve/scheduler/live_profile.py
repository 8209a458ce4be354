"""A profile that follows what its cell measures, by shape and degree."""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict, deque
from dataclasses import replace

from tetriserve.profile import Profile
from tetriserve.request import Shape

WINDOW = 33
"""The correction is the median over so many step ranges, and 1 before `FEWEST`."""
FEWEST = 5
GRID = 1.02
"""Corrections are whole powers of it: to 1 % exact, and few, so that the packer's tables of step times are used again
and again."""
MAX_PAIRS = 512
"""Pairs of shape and degree that are remembered, the last used ones."""


class LiveProfile:
    """Step times of a profile, each times the median ratio of what was measured to what it says.

    A median, because single ranges stand still for reasons of their own: a neighbour on the host, a page fault.

    Args:
        follows: whether `step_s` is corrected; measurements are kept all the same.
    """

    def __init__(self, profile: Profile, *, follows: bool = True) -> None:
        self.profile = profile
        self._follows = follows
        self._ratios: OrderedDict[tuple[Shape, int], deque[float]] = OrderedDict()
        self._ranges = 0

    def measured(self, shape: Shape, degree: int, step_s: float, cost: float = 1.0) -> None:
        """A range ran at `step_s` seconds a step, each of which costs `cost` times one of the profile's."""
        expected_s = cost * self.profile.step_s(shape).get(degree, 0.0)
        if expected_s <= 0 or step_s <= 0:
            return
        ratios = self._ratios.setdefault((shape, degree), deque(maxlen=WINDOW))
        ratios.append(step_s / expected_s)
        self._ratios.move_to_end((shape, degree))
        self._ranges += 1
        if len(self._ratios) > MAX_PAIRS:
            self._ratios.popitem(last=False)

    def ratio(self, shape: Shape, degree: int) -> float:
        """Measured over expected, to 1 %; 1 while little is known."""
        ratios = self._ratios.get((shape, degree), ())
        return GRID ** round(math.log(statistics.median(ratios), GRID)) if len(ratios) >= FEWEST else 1.0

    def step_s(self, shape: Shape) -> dict[int, float]:
        """Seconds of one step at each degree."""
        table = self.profile.step_s(shape)
        if not self._follows:
            return table
        return {degree: seconds * self.ratio(shape, degree) for degree, seconds in table.items()}

    @property
    def model(self) -> str:
        return self.profile.model

    def encode_s(self, shape: Shape) -> float:
        return self.profile.encode_s(shape)

    def encode_image_s(self, shape: Shape) -> float:
        return self.profile.encode_image_s(shape)

    def decode_s(self, shape: Shape) -> float:
        return self.profile.decode_s(shape)

    def corrected(self) -> Profile:
        """The profile with all that was measured in it, other shapes included."""
        known = {shape for shape, degree in self._ratios if self.ratio(shape, degree) != 1.0}
        tables = {
            shape: {
                degree: seconds * self.ratio(shape, degree)
                for degree, seconds in self.profile.step_s(shape).items()
            }
            for shape in {*self.profile.step_seconds, *known}
        }
        source = f"{self.profile.source}; corrected by {self._ranges} step ranges of a running cell"
        return replace(self.profile, source=source, step_seconds=tables)
