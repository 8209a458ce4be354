"""What may be promised: whether a packing has a request on time, and which deadline a refused one could have had."""

from __future__ import annotations

import math
from dataclasses import replace

from solver.board import EPSILON_S
from solver.problem import Job, Packing, Policy, Snapshot

MARGIN = 0.1
"""Share of its budget that a request has to leave over to be promised its deadline: real steps take longer now and
then. Only the plan that decides about it looks at the nearer deadline."""
RESOLUTION = 0.05
"""A deadline is named to this share of the time until then: each halving asks the policy once more."""
MAX_DOUBLINGS = 8


def is_missed(job: Job, packing: Packing, now_s: float) -> bool:
    """Whether no packing can have it on time any more, or this one sets it aside, or has all of it and ends it late.

    One that only says how a request begins gives it the benefit of the doubt.
    """
    if job.is_late(now_s) or job.id in packing.set_aside:
        return True
    return packing.ends_s((job,)).get(job.id, -math.inf) > job.deadline_s + EPSILON_S


def with_margin(arrival_s: float, deadline_s: float) -> float:
    """The deadline that a request has to meet in the plan that decides about its promise."""
    return deadline_s - MARGIN * (deadline_s - arrival_s) if deadline_s < math.inf else deadline_s


def earliest_deadline_s(policy: Policy, snapshot: Snapshot, refused: Job) -> float:
    """The nearest deadline with which `refused`, put to the policy beside the others of the snapshot, is promised it.

    `math.inf` when it is on time with none of those tried, up to `2 ** MAX_DOUBLINGS` times what it takes alone.
    """
    others = tuple(job for job in snapshot.jobs if job.id != refused.id)

    def is_kept(wait_s: float) -> bool:
        job = replace(refused, deadline_s=snapshot.now_s + wait_s, slo_s=wait_s, set_aside=False)
        packing = policy(replace(snapshot, jobs=(*others, job)))
        return not is_missed(job, packing, snapshot.now_s)

    late_s = max(refused.deadline_s - snapshot.now_s, 0.0)
    kept_s = max(late_s, max(refused.ready_s - snapshot.now_s, 0.0) + refused.least_work_s)
    for _ in range(MAX_DOUBLINGS):
        kept_s *= 2
        if is_kept(kept_s):
            break
        late_s = kept_s
    else:
        return math.inf
    while kept_s - late_s > RESOLUTION * kept_s:
        middle_s = (late_s + kept_s) / 2
        if is_kept(middle_s):
            kept_s = middle_s
        else:
            late_s = middle_s
    return refused.arrival_s + (snapshot.now_s + kept_s - refused.arrival_s) / (1 - MARGIN)
