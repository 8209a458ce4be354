"""What a result costs on its way from the GPUs to whoever asked: hops, fetching the picture, making a file of it.

Measured by the edge that sends it; the next requests bring the prediction along, and the plans leave that time.
"""

from __future__ import annotations

from collections import deque

import numpy as np

KEPT = 32
"""Answers of one kind and size that a prediction looks back on."""
QUANTILE = 75
"""Percentile of them that is predicted: a deadline is not kept by the mean."""


class WayBack:
    """Seconds by what is sent ("" for pixels, else the format of the file) and its size in pixels."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int], deque[float]] = {}

    def note(self, kind: str, pixels: int, seconds: float) -> None:
        """An answer took so long. The first of a kind and size also pays for what is loaded once: from the second on
        it counts for no more than that."""
        known = self._seconds.setdefault((kind, pixels), deque(maxlen=KEPT))
        if len(known) == 1:
            known[0] = min(known[0], seconds)
        known.append(max(0.0, seconds))

    def predict(self, kind: str, pixels: int) -> float:
        """Seconds; of a size not seen yet what the nearest one takes per pixel, 0 while nothing is known."""
        sizes = [size for known_kind, size in self._seconds if known_kind == kind]
        if not sizes:
            return 0.0
        nearest = min(sizes, key=lambda size: max(size, pixels) / min(size, pixels))
        seconds = float(np.percentile(self._seconds[kind, nearest], QUANTILE))
        # hops do not depend on the size: a smaller one is not taken for cheaper
        return seconds * max(1.0, pixels / nearest)
