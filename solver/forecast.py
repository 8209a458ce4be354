"""Room in a plan for requests that have not arrived yet but will be due before those that have.

An admitted request whose plan ends just before its deadline is lost as soon as somebody with an earlier deadline
comes along. How much such work to expect is known from the recent past: requests of SLO L and load u (mean number
of GPUs they keep busy) that arrive within the next b - L seconds are due before a request that is due in b, and take
u (b - L) GPU-seconds. Plans are therefore made for a deadline that is nearer by that work's share of the board.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from solver.problem import Job, Load, Snapshot


def planned_budget_s(budget_s: float, loads: Iterable[Load], n_gpus: int) -> float:
    """Seconds to plan with for a request that is due in `budget_s`."""
    return budget_s - sum(load.gpus * max(0.0, budget_s - load.slo_s) for load in loads) / n_gpus


def with_room_for_newcomers(snapshot: Snapshot) -> Snapshot:
    """The snapshot with planned deadlines.

    Who could not be on time then keeps its deadline: it takes its chance, since newcomers may stay away.
    """
    n_gpus = sum(free_s < math.inf for free_s in snapshot.free_at_s)
    if not snapshot.expected or not n_gpus:
        return snapshot
    jobs = tuple(_planned(job, snapshot.now_s, snapshot.expected, n_gpus) for job in snapshot.jobs)
    return replace(snapshot, jobs=jobs)


def _planned(job: Job, now_s: float, loads: Iterable[Load], n_gpus: int) -> Job:
    if job.deadline_s == math.inf:
        return job
    planned = replace(job, deadline_s=now_s + planned_budget_s(job.deadline_s - now_s, loads, n_gpus))
    return job if planned.is_late(now_s) else planned
