"""What arrived in the recent past, by SLO: the forecast that a policy plans with."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence

from solver.allocation import least_gpu_seconds, step_table
from solver.problem import Load, Phase

WINDOW_S = 300.0
"""Long enough to hold dozens of requests at the rates of the papers, short enough to follow the hours of a day.
A scheduler younger than that expects less than what it sees: it has seen too little to hold GPUs back."""


class RecentLoad:
    """Load of the last `WINDOW_S` seconds, in classes of SLOs that agree to two digits."""

    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, float, float]] = deque()
        self._gpu_seconds: defaultdict[float, float] = defaultdict(float)

    def arrived(self, phases: Sequence[Phase], slo_s: float, now_s: float) -> None:
        """Count a request; one without deadline is nobody's competitor."""
        if not 0 < slo_s < math.inf:
            return
        cost = least_gpu_seconds(((phase.steps, step_table(phase.step_s)) for phase in phases), slo_s)
        known_slo_s = float(f"{slo_s:.2g}")
        self._arrivals.append((now_s, known_slo_s, cost))
        self._gpu_seconds[known_slo_s] += cost

    def expected(self, now_s: float) -> tuple[Load, ...]:
        """The classes that are left after what is too old was forgotten."""
        while self._arrivals and self._arrivals[0][0] < now_s - WINDOW_S:
            _, slo_s, cost = self._arrivals.popleft()
            self._gpu_seconds[slo_s] -= cost
            if self._gpu_seconds[slo_s] < 1e-9:
                del self._gpu_seconds[slo_s]
        return tuple(Load(slo_s, cost / WINDOW_S) for slo_s, cost in self._gpu_seconds.items())
