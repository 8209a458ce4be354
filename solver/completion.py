"""Event-driven list schedules over the board: the exact completion of a choice of requests (packing.md).

First those that are to be on time, then everybody else in the gaps that they leave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from solver.board import EPSILON_S, Board
from solver.listing import Lister, Pick, bits
from solver.schedule import Rule, Run, Schedule, by_deadline, total_weight


def schedule_on_time(
    board: Board,
    runs: Sequence[Run],
    rule: Rule,
    *,
    spare: int = 0,
    starving: Run | None = None,
    riders: Sequence[Run] = (),
    may_miss: float = math.inf,
    stop_s: float = math.inf,
) -> Schedule:
    """List schedule of requests that are to be on time.

    Args:
        spare: idle GPUs that nobody here is widened onto.
        starving: gets one segment before all others, at its narrowest degree.
        riders: take their turn with the others up to the next round boundary.
        may_miss: late ones of more than this weight and the rest is of no interest.
        stop_s: where `time.perf_counter` ends the look-ahead; what starts now is in it all the same.
    """
    order = sorted([*runs, *riders], key=rule.order)
    ride_until_s = board.snapshot.boundary_s - EPSILON_S if riders else math.inf
    every = order if starving is None else [starving, *order]
    lister = Lister(board, rule, (run.ready_s for run in every if run.ready_s > board.snapshot.now_s))
    schedule = Schedule(rule, lister.segments, list(runs))
    for _ in lister.instants(stop_s=stop_s):
        idle, late_s = lister.idle, lister.now_s - EPSILON_S
        first: list[Pick] = []
        if not idle:
            continue
        if starving is not None and starving.ready_s <= lister.now_s + EPSILON_S:
            first, idle = lister.gaps([starving], idle)
            starving = None if first else starving
        if lister.now_s >= ride_until_s:
            order, ride_until_s = [run for run in order if not run.rides], math.inf
        if rule.give_up:
            hopeless = [run for run in order if run.is_hopeless(late_s)]
            if hopeless:
                schedule.missed.extend(hopeless)
                if total_weight(schedule.missed) > may_miss:
                    break
                order = [run for run in order if not run.is_hopeless(late_s)]
        if rule.order is not by_deadline:  # deadlines do not move
            order.sort(key=rule.order)
        ready_s = lister.now_s + EPSILON_S
        picks: list[Pick] = []
        if idle:
            waiting = [run for run in order if run.ready_s <= ready_s]
            if rule.gather and len(waiting) > idle.bit_count():
                waiting.sort(key=lambda run: not run.gathers)
            picks, idle = lister.floors(waiting, idle)
            if board.has_company and len(picks) < len(waiting):
                lister.join(waiting, picks)
            lister.widen(picks, idle, spare)
        for pick in first + picks:
            lister.launch(pick)
        done = [run for pick in picks for run in pick.runs if run.is_done]
        if done:
            order = [run for run in order if run.finish_s == math.inf]
            if rule.give_up:
                schedule.missed.extend(run for run in done if run.finish_s > run.due_s and not run.rides)
        if not order and starving is None:
            return schedule
    schedule.is_cut = bool(order)
    return schedule


def fill_gaps(
    board: Board,
    schedule: Schedule,
    runs: Sequence[Run],
    *,
    until_s: float = math.inf,
    stop_s: float = math.inf,
) -> None:
    """Run `runs`, in the given order, on what `schedule` leaves idle; its segments stay as they are.

    Args:
        until_s: nothing is started later.
        stop_s: as in `schedule_on_time`.
    """
    order = [run for run in runs if not run.is_done]
    spans: list[list[tuple[float, float]]] = [[] for _ in board.free_at_s]
    for start_s, end_s, _, _, gpus, _ in sorted(schedule.segments, key=lambda segment: segment[0]):
        for gpu in gpus.gpus:
            spans[gpu].append((start_s, end_s))
    ends = {segment[1] for segment in schedule.segments if segment[1] <= until_s}
    lister = Lister(board, Rule(), ends | {run.ready_s for run in order})
    cursor = [0] * len(spans)
    for _ in lister.instants(until_s, stop_s):
        if not order:
            break
        waiting = [run for run in order if run.ready_s <= lister.now_s + EPSILON_S]
        if not waiting:
            continue
        idle = lister.idle
        for gpu in bits(idle):
            own = spans[gpu]
            while cursor[gpu] < len(own) and own[cursor[gpu]][1] <= lister.now_s + EPSILON_S:
                cursor[gpu] += 1
            if cursor[gpu] < len(own):
                lister.limit(gpu, own[cursor[gpu]][0])
                if own[cursor[gpu]][0] <= lister.now_s + EPSILON_S:
                    idle &= ~(1 << gpu)
        picks, idle = lister.gaps(waiting, idle)
        if board.has_company and len(picks) < len(waiting):
            lister.join(waiting, picks)
        lister.widen(picks, idle, 0)
        for pick in picks:
            lister.launch(pick)
        if any(run.is_done for pick in picks for run in pick.runs):
            order = [run for run in order if not run.is_done]
    schedule.segments.extend(lister.segments)
