"""Late requests ride in the slack of those that are on time.

A late request has a second deadline, `SECOND` times what it takes alone behind its first one; who cannot meet that
either is owed `HURRY` times what it still needs from now on. So the claim grows with the lateness against what is
left to do: who needs a decode only is in front of nearly everybody. For the rest of the round it takes its turn by
that deadline among those on time, at the narrowest degree that meets it, and what is left idle then widens either.
The exact completion of all others without it shows what that costs them, and decides:

- nobody becomes late for it, whatever it is worth, and
- nobody who has less to spare at the end than a share of its budget loses any of that, since newcomers will need it.
  The share is the riders' work over the mean work of those on time, at most 1: who needs little may take more.

Chosen by experiment (`bench/late.py`; before: attainment .961 and a p99 of lateness of 27 s with small requests
beside 2048 x 2048 at 70 % load of an H100, .901 on h100-uniform-36). Serving the late first cost up to 9 points. A
share of 0.2 whatever the riders need cost 1.4 points on uniform-36, none at all 6 in overload. The square of the
ratio had a p99 of 2.4 s at 70 % and .892 on uniform-36; the ratio itself has 7.0 s and .899.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from solver.board import Board, OpenJob
from solver.completion import schedule_on_time
from solver.schedule import Run, Schedule, by_deadline

SECOND = 2.0
HURRY = 1.5
FEWER = 4
"""When not all late ones can ride, a quarter of them is tried next, those with the least work."""


def ride(
    board: Board,
    best: Schedule,
    late: Sequence[Run],
    starving: OpenJob | None,
    *,
    spare: int,
    stop_s: float,
) -> tuple[Schedule, list[Run], Run | None]:
    """The schedule with as many of `late` as those on time can bear, or `best` as it is.

    Args:
        late: as they go on behind `best`; without `starving`, which has a segment there already.
        spare, stop_s: as in `schedule_on_time`.

    Returns:
        The schedule, the late ones as they go on behind it, and `starving` likewise, None if the schedule is `best`.
    """
    missed = {id(run) for run in best.missed}
    timely = [run for run in best.runs if id(run) not in missed]
    turns = sorted(
        ((_with_second_deadline(run.open, board.snapshot.now_s), run) for run in late),
        key=lambda turn: turn[0].least_gpu_s,
    )
    count = 0 if best.is_cut else len(turns)
    mean_gpu_s = sum(run.open.least_gpu_s for run in timely) / max(1, len(timely))
    while count:
        gpu_s = sum(job.least_gpu_s for job, _ in turns[:count])
        share = min(1.0, gpu_s / mean_gpu_s) if mean_gpu_s else 1.0
        riders = [Run(job, 0.0, rides=True) for job, _ in turns[:count]]
        first = None if starving is None else Run(starving)
        schedule = schedule_on_time(
            board,
            [Run(run.open, run.weight) for run in timely],
            best.rule,
            spare=spare,
            starving=first,
            riders=riders,
            may_miss=0.0,
            stop_s=stop_s,
        )
        if _is_bearable(schedule, timely, share):
            rest = [Run(job) for job, _ in turns[count:]]
            return schedule, sorted(riders + rest, key=by_deadline), first
        count = max(1, count // FEWER) if count > 1 else 0
    return best, [run for _, run in sorted(turns, key=lambda turn: turn[0].job.deadline_s)], None


def _with_second_deadline(job: OpenJob, now_s: float) -> OpenJob:
    second_s = max(job.job.deadline_s + SECOND * job.job.alone_s, now_s + HURRY * job.least_s)
    return replace(job, job=replace(job.job, deadline_s=second_s))


def _is_bearable(schedule: Schedule, before: Sequence[Run], share: float) -> bool:
    if schedule.missed or schedule.is_cut:
        return False
    return all(
        run.spare_share >= min(was.spare_share, share) - 1e-9
        for run, was in zip(schedule.runs, before, strict=True)
    )
