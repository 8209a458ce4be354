"""A profile that follows what its cell measures, by shape and degree."""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import replace

from solver.problem import Shared, shared_step_s
from tetriserve.profile import Profile
from tetriserve.request import Shape

WINDOW = 33
"""The correction is the median over so many step ranges, and 1 before `FEWEST`."""
FEWEST = 5
GRID = 1.02
"""Corrections are whole powers of it: to 1 % exact, and few, so that the packer's tables of step times are used again
and again."""
MAX_PAIRS = 512
"""Pairs of shape and degree that are remembered, alone and shared, the last used ones."""


class LiveProfile:
    """Step times of a profile, each times the median ratio of what was measured to what it says.

    A median, because single ranges stand still for reasons of their own: a neighbour on the host, a page fault.

    Args:
        follows: whether `step_s` is corrected; measurements are kept all the same.
    """

    def __init__(self, profile: Profile, *, follows: bool = True) -> None:
        self.profile = profile
        self._follows = follows
        self._ratios: OrderedDict[tuple[Shape, int, bool], deque[float]] = OrderedDict()
        self._ranges = 0

    def measured(self, shapes: Sequence[Shape], degree: int, step_s: float, cost: float = 1.0) -> None:
        """A range of requests of these shapes ran at `step_s` seconds a step, each of which costs `cost` times one of
        the profile's."""
        if len(shapes) == 1:
            expected_s = self.profile.step_s(shapes[0]).get(degree, 0.0)
        else:
            terms = [self.profile.shared(shape).get(degree) for shape in shapes]
            known = [one for one in terms if one is not None]
            expected_s = shared_step_s(known) if len(known) == len(terms) else 0.0
        if expected_s <= 0 or step_s <= 0:
            return
        self._ranges += 1
        for shape in set(shapes):
            key = (shape, degree, len(shapes) > 1)
            ratios = self._ratios.setdefault(key, deque(maxlen=WINDOW))
            ratios.append(step_s / (cost * expected_s))
            self._ratios.move_to_end(key)
            if len(self._ratios) > MAX_PAIRS:
                self._ratios.popitem(last=False)

    def ratio(self, shape: Shape, degree: int, *, shared: bool = False) -> float:
        """Measured over expected, to 1 %; 1 while little is known. Shared steps whose own is not known follow those
        of requests alone."""
        ratios = self._ratios.get((shape, degree, shared), ())
        if len(ratios) >= FEWEST:
            return GRID ** round(math.log(statistics.median(ratios), GRID))
        return self.ratio(shape, degree) if shared else 1.0

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

    def shared(self, shape: Shape) -> dict[int, Shared]:
        """The batch law's terms at each degree."""
        terms = self.profile.shared(shape)
        if not self._follows:
            return terms
        ratios = {degree: self.ratio(shape, degree, shared=True) for degree in terms}
        return {
            degree: Shared(
                ratios[degree] * t.floor_s, ratios[degree] * t.overhead_s, ratios[degree] * t.add_s
            )
            for degree, t in terms.items()
        }

    def corrected(self) -> Profile:
        """The profile with all that was measured in it, other shapes included."""
        known = {
            shape for shape, degree, shared in self._ratios if not shared and self.ratio(shape, degree) != 1.0
        }
        tables = {
            shape: {
                degree: seconds * self.ratio(shape, degree)
                for degree, seconds in self.profile.step_s(shape).items()
            }
            for shape in {*self.profile.step_seconds, *known}
        }
        source = f"{self.profile.source}; corrected by {self._ranges} step ranges of a running cell"
        return replace(self.profile, source=source, step_seconds=tables)
