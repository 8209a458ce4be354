"""Room in a plan for requests that have not arrived yet but will be due before those that have.

An admitted request whose plan ends just before its deadline is lost as soon as somebody with an earlier deadline
comes along. How much such work to expect is known from the recent past: requests of SLO L and load u (mean number
of GPUs they keep busy) that arrive within the next b - L seconds are due before a request that is due in b, and take
u (b - L) GPU-seconds. Plans are therefore made for a deadline that is nearer by that work's share of the board.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate

from solver.problem import Job, Load, Snapshot


class Newcomers:
    """The expected loads, in the order of their SLOs and summed up: hundreds of requests ask about hundreds of loads
    in every decision."""

    def __init__(self, loads: Iterable[Load]) -> None:
        ordered = sorted(loads, key=lambda load: load.slo_s)
        self._slo_s = [load.slo_s for load in ordered]
        self._gpus = [0.0, *accumulate(load.gpus for load in ordered)]
        self._gpus_slo_s = [0.0, *accumulate(load.gpus * load.slo_s for load in ordered)]

    def work_before(self, budget_s: float) -> float:
        """GPU-seconds that are still to come and due before a request that is due in `budget_s`."""
        earlier = bisect_left(self._slo_s, budget_s)
        return max(0.0, self._gpus[earlier] * budget_s - self._gpus_slo_s[earlier])


def planned_budget_s(budget_s: float, newcomers: Newcomers, n_gpus: int) -> float:
    """Seconds to plan with for a request that is due in `budget_s`."""
    return budget_s - newcomers.work_before(budget_s) / n_gpus


def with_room_for_newcomers(snapshot: Snapshot) -> Snapshot:
    """The snapshot with planned deadlines.

    Who could not be on time then keeps its deadline: it takes its chance, since newcomers may stay away.
    """
    n_gpus = sum(free_s < math.inf for free_s in snapshot.free_at_s)
    if not snapshot.expected or not n_gpus:
        return snapshot
    newcomers = Newcomers(snapshot.expected)
    jobs = tuple(_planned(job, snapshot.now_s, newcomers, n_gpus) for job in snapshot.jobs)
    return replace(snapshot, jobs=jobs)


def _planned(job: Job, now_s: float, newcomers: Newcomers, n_gpus: int) -> Job:
    if job.deadline_s == math.inf:
        return job
    planned = replace(job, deadline_s=now_s + planned_budget_s(job.deadline_s - now_s, newcomers, n_gpus))
    return job if planned.is_late(now_s) else planned
