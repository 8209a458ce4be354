"""When what is open will be done, by what was known at the last decision."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping

from solver.problem import Packing, Snapshot, least_work_s
from tetriserve.scheduler.assignment import OpenRequest
from tetriserve.scheduler.committed import Committed


class Predictions:
    """Of the open requests; they and the committed ranges are the scheduler's own."""

    def __init__(self, open_requests: Mapping[str, OpenRequest], committed: Committed) -> None:
        self._open = open_requests
        self._committed = committed
        self._drained_s: float | None = None
        self._ends_s: dict[str, float] = {}
        self._order: list[float] = []

    def note(self, snapshot: Snapshot, packing: Packing) -> None:
        """Keep what a packing says of ends, for `finish_s`."""
        self._drained_s = None
        self._ends_s = {}
        ends_s = packing.ends_s(snapshot.jobs)
        for job in snapshot.jobs:
            request = self._open.get(job.id)
            if request is not None:
                request.planned_end_s = ends_s.get(job.id)

    def drain_s(self, now_s: float) -> float:
        """Seconds until the open requests are done if all GPUs share them at their cheapest degree."""
        alive = [free for free in self._committed.free_at_s if free < math.inf] or [math.inf]
        busy = sum(max(0.0, free - now_s) for free in alive)
        work = sum(
            phase.steps * min(degree * t for degree, t in phase.step_s.items())
            for request in self._open.values()
            for phase in request.remaining()
        )
        return (busy + work) / len(alive)

    def ahead(self, request_id: str, now_s: float) -> int:
        """How many others will be done before it, by what was known at the last decision."""
        if request_id not in self._ends_s:  # for all of them at once: many may ask between two decisions
            self._ends_s = {one: self.finish_s(one, now_s) for one in (*self._open, request_id)}
            self._order = sorted(self._ends_s.values())
        return bisect_left(self._order, self._ends_s[request_id])

    def finish_s(self, request_id: str, now_s: float) -> float:
        """When a request will be done, by what was known at the last decision: no promise, for what arrives later is
        not in it. `math.inf` when nobody can say: it is not open, or no GPU is there.

        Its end in the last packing, where that reaches it; else (set aside, or planned only in part) when all that
        is open will be done. Never before the rest of its steps at their fastest could end.
        """
        request = self._open.get(request_id)
        if request is None:
            return math.inf
        remaining = request.remaining()
        earliest_s = max(now_s, request.ready_s) + least_work_s(remaining)
        if not remaining:
            return earliest_s
        if request.planned_end_s is not None:
            return max(earliest_s, request.planned_end_s)
        if self._drained_s is None:
            self._drained_s = now_s + self.drain_s(now_s)
        return max(earliest_s, self._drained_s)
