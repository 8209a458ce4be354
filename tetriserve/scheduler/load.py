"""What arrived in the recent past, by SLO: the forecast that a policy plans with."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Sequence

from solver.allocation import least_gpu_seconds, shared_costs, step_table
from solver.problem import Load, Phase, least_work_s

WINDOW_S = 300.0
"""Long enough to hold dozens of requests at the rates of the papers, short enough to follow the hours of a day.
A scheduler younger than that expects less than what it sees: it has seen too little to hold GPUs back."""
IMPATIENT_SHARE = 0.05
"""So many of those who arrive may have less slack than is reckoned with: a rare one does not rule all the others."""
FEW = 20
"""Of fewer arrivals in the window none keeps a range short: the next one is long in coming."""


class RecentLoad:
    """Load of the last `WINDOW_S` seconds, in classes of SLOs that agree to two digits."""

    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, float, float, float]] = deque()
        self._gpu_seconds: defaultdict[float, float] = defaultdict(float)
        self._slacks_s: list[float] = []

    def arrived(self, phases: Sequence[Phase], slo_s: float, now_s: float, max_batch: int = 1) -> None:
        """Count a request; one without deadline is nobody's competitor. It counts with the least that it can cost,
        in steps shared by `max_batch` where they may be."""
        if not 0 < slo_s < math.inf:
            return
        cost = least_gpu_seconds(
            ((phase.steps, shared_costs(phase, step_table(phase.step_s), max_batch)) for phase in phases),
            slo_s,
        )
        known_slo_s = float(f"{slo_s:.2g}")
        slack_s = slo_s - least_work_s(phases)
        self._arrivals.append((now_s, known_slo_s, cost, slack_s))
        if slack_s > 0:
            insort(self._slacks_s, slack_s)
        self._gpu_seconds[known_slo_s] += cost

    def expected(self, now_s: float) -> tuple[Load, ...]:
        """The classes of those who arrived."""
        self._forget(now_s)
        return tuple(Load(slo_s, cost / WINDOW_S) for slo_s, cost in self._gpu_seconds.items())

    def slack_s(self, now_s: float) -> float:
        """Seconds that all but the least patient of those who arrived could lose; infinite when few came."""
        self._forget(now_s)
        if len(self._slacks_s) < FEW:
            return math.inf
        return self._slacks_s[int(IMPATIENT_SHARE * len(self._slacks_s))]

    def _forget(self, now_s: float) -> None:
        while self._arrivals and self._arrivals[0][0] < now_s - WINDOW_S:
            _, slo_s, cost, slack_s = self._arrivals.popleft()
            if slack_s > 0:
                del self._slacks_s[bisect_left(self._slacks_s, slack_s)]
            self._gpu_seconds[slo_s] -= cost
            if self._gpu_seconds[slo_s] < 1e-9:
                del self._gpu_seconds[slo_s]
