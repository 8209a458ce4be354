"""Event-driven list schedule of whole steps: the exact completion of a choice of requests (packing.md).

At every instant at which a GPU or a request becomes free, idle GPUs go to the waiting requests in deadline order.
Each takes its floor, the narrowest degree that the rule allows it; what is left idle then widens those it helps
most. A segment runs whole steps up to a round boundary and is never cut.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from solver.board import EPSILON_S, Board
from solver.placement import GpuSet, choose
from solver.problem import Entry
from solver.schedule import Rule, Run, Schedule, urgency

GROWTH = 0.15
"""Segments in the far future may be this share of their distance from now long: keeps the look-ahead cheap."""


@dataclass
class Pick:
    """A GPU set tentatively given to a run at this instant."""

    run: Run
    index: int
    gpus: GpuSet


class Lister:
    """State of one pass of the list schedule over the board."""

    def __init__(self, board: Board, rule: Rule, reserved: Sequence[Sequence[tuple[float, float]]]) -> None:
        self.board = board
        self.rule = rule
        self.reserved = reserved
        self.cursor = [0] * len(board.free_at_s)
        self.free_s = list(board.free_at_s)
        self.entries: list[Entry] = []
        self.busy: list[list[tuple[float, float]]] = [[] for _ in board.free_at_s]
        self.until_s = [math.inf] * len(board.free_at_s)
        self.limited = 0  # mask of GPUs with a finite until_s
        self.now_s = board.snapshot.now_s

    # ---- which GPUs, for how long -------------------------------------------------------------------------

    def idle(self) -> int:
        """Mask of the GPUs free now; sets `until_s` for those that a reservation will need."""
        mask = 0
        self.limited = 0
        for gpu, free_s in enumerate(self.free_s):
            if free_s > self.now_s + EPSILON_S:
                continue
            self.until_s[gpu] = math.inf
            if self.reserved:
                spans = self.reserved[gpu]
                while self.cursor[gpu] < len(spans) and spans[self.cursor[gpu]][1] <= self.now_s + EPSILON_S:
                    self.cursor[gpu] += 1
                if self.cursor[gpu] < len(spans):
                    self.until_s[gpu] = spans[self.cursor[gpu]][0]
                    if self.until_s[gpu] <= self.now_s + EPSILON_S:
                        continue
                    self.limited |= 1 << gpu
            mask |= 1 << gpu
        return mask

    def limit_s(self, gpus: GpuSet) -> float:
        """When the first of these GPUs is needed by somebody else."""
        if not gpus.mask & self.limited:
            return math.inf
        return min(self.until_s[gpu] for gpu in gpus.gpus)

    def find(self, run: Run, index: int, idle: int) -> GpuSet | None:
        """The set to take at this degree, long enough free for one step."""
        table = run.work.table
        sets = self.board.sets[table.degrees[index]]
        if idle & self.limited:
            end_s = self.now_s + table.seconds[index] - EPSILON_S
            sets = tuple(s for s in sets if not s.mask & ~idle and self.limit_s(s) >= end_s)
        return choose(sets, idle, run.gpus)

    def wait_s(self, run: Run, index: int) -> tuple[float, GpuSet]:
        """Seconds until a set of this degree is free, and the set."""
        sets = self.board.sets[run.work.table.degrees[index]]
        best = min(
            sets, key=lambda s: (max(self.free_s[g] for g in s.gpus), -(s.mask & run.gpus).bit_count())
        )
        return max(self.free_s[g] for g in best.gpus) - self.now_s, best

    def hold(self, gpus: GpuSet, start_s: float) -> None:
        for gpu in gpus.gpus:
            if not self.limited >> gpu & 1 or start_s < self.until_s[gpu]:
                self.until_s[gpu] = start_s
        self.limited |= gpus.mask

    # ---- one instant --------------------------------------------------------------------------------------

    def floors(self, waiting: Iterable[Run], idle: int) -> tuple[list[Pick], int]:
        """Give each run in turn its floor, or the widest narrower degree when waiting gains nothing."""
        picks: list[Pick] = []
        for run in waiting:
            if not idle:
                break
            index = run.floor_at(self.now_s, self.rule)
            gpus = self.find(run, index, idle)
            if gpus is None:
                index, gpus = self.second_best(run, index, idle)
            if gpus is not None:
                picks.append(Pick(run, index, gpus))
                idle &= ~gpus.mask
        return picks, idle

    def second_best(self, run: Run, floor: int, idle: int) -> tuple[int, GpuSet | None]:
        wait_s, wanted = self.wait_s(run, floor)
        seconds = run.work.table.seconds
        for index in range(floor - 1, -1, -1):
            if seconds[index] <= wait_s + seconds[floor] + EPSILON_S:
                gpus = self.find(run, index, idle)
                if gpus is not None:
                    return index, gpus
        if self.rule.hold and wait_s < math.inf:
            self.hold(wanted, self.now_s + wait_s)
        return floor, None

    def gaps(self, waiting: Iterable[Run], idle: int) -> tuple[list[Pick], int]:
        """Give each run in turn the narrowest degree whose step fits before the GPUs are needed."""
        picks: list[Pick] = []
        for run in waiting:
            if not idle:
                break
            for index in range(len(run.work.table.degrees)):
                gpus = self.find(run, index, idle)
                if gpus is not None:
                    picks.append(Pick(run, index, gpus))
                    idle &= ~gpus.mask
                    break
        return picks, idle

    def widen(self, picks: list[Pick], idle: int, spare: int) -> None:
        """Give idle GPUs, one widening at a time, to the pick that saves most seconds per GPU.

        `spare` idle GPUs are left to others.
        """
        while idle.bit_count() > spare:
            best: tuple[float, Pick, int, GpuSet] | None = None
            for pick in picks:
                table = pick.run.work.table
                for index in range(pick.index + 1, len(table.degrees)):
                    extra = table.degrees[index] - table.degrees[pick.index]
                    if extra > idle.bit_count() - spare:
                        break
                    gain = pick.run.steps * (table.seconds[pick.index] - table.seconds[index]) / extra
                    if best is not None and gain <= best[0]:
                        continue
                    gpus = self.find(pick.run, index, idle | pick.gpus.mask)
                    if gpus is not None:
                        best = (gain, pick, index, gpus)
            if best is None:
                return
            _, pick, index, gpus = best
            idle = (idle | pick.gpus.mask) & ~gpus.mask
            pick.index, pick.gpus = index, gpus

    def launch(self, pick: Pick) -> float:
        """Write the segment down; returns its end."""
        run, gpus = pick.run, pick.gpus
        step_s = run.work.table.seconds[pick.index]
        steps = run.steps
        if step_s > EPSILON_S:
            reach_s = self._boundary_s() - self.now_s
            steps = min(steps, max(1, math.ceil(reach_s / step_s - 1e-6)))
            room_s = self.limit_s(gpus) - self.now_s
            if room_s < math.inf:
                steps = min(steps, max(1, math.floor(room_s / step_s + 1e-6)))
        end_s = self.now_s + steps * step_s
        self.entries.append(Entry(run.open.job.id, run.work.kind, gpus.gpus, steps, self.now_s, end_s))
        for gpu in gpus.gpus:
            self.free_s[gpu] = end_s
            self.busy[gpu].append((self.now_s, end_s))
        run.advance(steps, end_s, gpus.mask)
        return end_s

    def _boundary_s(self) -> float:
        """The round boundary that a segment starting now runs to; further apart in the far future."""
        snapshot = self.board.snapshot
        target_s = self.now_s + GROWTH * (self.now_s - snapshot.now_s)
        rounds = math.floor((target_s - snapshot.boundary_s) / snapshot.round_s + 1e-6) + 1
        return snapshot.boundary_s + max(0, rounds) * snapshot.round_s


def schedule_on_time(
    board: Board, runs: Sequence[Run], rule: Rule, *, spare: int = 0, starving: Run | None = None
) -> Schedule:
    """List schedule of requests that are to be on time.

    Args:
        spare: idle GPUs that nobody here is widened onto.
        starving: gets one segment before all others, at its narrowest degree.
    """
    lister = Lister(board, rule, ())
    schedule = Schedule(lister.entries, list(runs), lister.busy)
    order = sorted(runs, key=urgency)
    events = _events(lister, order if starving is None else [starving, *order])
    while events and (order or starving):
        _next_instant(lister, events)
        idle = lister.idle()
        first: list[Pick] = []
        if starving is not None and starving.ready_s <= lister.now_s + EPSILON_S:
            first, idle = lister.gaps([starving], idle)
            starving = None if first else starving
        if rule.give_up:
            hopeless = [run for run in order if run.latest_s < lister.now_s - EPSILON_S]
            if hopeless:
                schedule.missed.extend(hopeless)
                order = [run for run in order if run not in hopeless]
        waiting = [run for run in order if run.ready_s <= lister.now_s + EPSILON_S]
        picks, idle = lister.floors(waiting, idle)
        lister.widen(picks, idle, spare)
        for pick in first + picks:
            heapq.heappush(events, lister.launch(pick))
        if any(pick.run.is_done for pick in picks):
            order = [run for run in order if not run.is_done]
    return schedule


def fill_gaps(board: Board, schedule: Schedule, runs: Sequence[Run]) -> None:
    """Run `runs`, in the given order, on what `schedule` leaves idle; its entries stay as they are."""
    lister = Lister(board, Rule(), schedule.busy)
    order = [run for run in runs if not run.is_done]
    events = _events(lister, order)
    for spans in schedule.busy:
        events.extend(end_s for _, end_s in spans)
    heapq.heapify(events)
    while events and order:
        _next_instant(lister, events)
        waiting = [run for run in order if run.ready_s <= lister.now_s + EPSILON_S]
        if not waiting:
            continue
        picks, idle = lister.gaps(waiting, lister.idle())
        lister.widen(picks, idle, 0)
        for pick in picks:
            heapq.heappush(events, lister.launch(pick))
        if any(pick.run.is_done for pick in picks):
            order = [run for run in order if not run.is_done]
    schedule.entries.extend(lister.entries)
    schedule.entries.sort(key=lambda entry: (entry.start_s, entry.end_s))


def _events(lister: Lister, runs: Iterable[Run]) -> list[float]:
    instants = {free_s for free_s in lister.free_s if free_s < math.inf} | {run.ready_s for run in runs}
    events = list(instants)
    heapq.heapify(events)
    return events


def _next_instant(lister: Lister, events: list[float]) -> None:
    lister.now_s = max(lister.now_s, heapq.heappop(events))
    while events and events[0] <= lister.now_s + EPSILON_S:
        heapq.heappop(events)
