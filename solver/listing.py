"""What a list schedule of whole steps does at one instant, and how it goes from one to the next.

At every instant at which a GPU or a request becomes free, idle GPUs go to the waiting requests in deadline order.
Each takes its floor, the narrowest degree that the rule allows it; what is left idle then widens those it helps
most. A segment runs whole steps up to a round boundary, or as long as the board allows, and is never cut.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from solver.board import EPSILON_S, Board
from solver.placement import GpuSet, blocks_of
from solver.schedule import Rule, Run, Segment

GROWTH = 0.15
"""Segments in the far future may be this share of their distance from now long: keeps the look-ahead cheap."""

FINE_GPUS = 16
MERGED_SHARE = 0.125
"""On larger boards the look-ahead takes events within this share of a round as one: GPUs free themselves all the time
there, and what comes after the present is only a forecast."""


BARGAIN = 0.9
"""Who joins others must add no more GPU-seconds than this share of what it takes alone."""


@dataclass
class Pick:
    """A GPU set tentatively given to a run at this instant.

    Attributes:
        guests: others who run along, in the same steps.
    """

    run: Run
    index: int
    gpus: GpuSet
    guests: tuple[Run, ...] = ()

    @property
    def runs(self) -> tuple[Run, ...]:
        return (self.run, *self.guests)

    def step_s(self, index: int) -> float:
        """Seconds of one step of all of them at that degree of the run."""
        return self.run.step_with(self.guests, index) if self.guests else self.run.seconds[index]


class Lister:
    """State of one pass of the list schedule over the board.

    Attributes:
        idle: mask of the GPUs that nobody runs on now.
        limited: mask of the GPUs that somebody else will need, from `until_s` on.
    """

    def __init__(self, board: Board, rule: Rule, instants: Iterable[float] = ()) -> None:
        self.board = board
        self.rule = rule
        self.blocks = blocks_of(len(board.free_at_s))
        self.now_s = board.snapshot.now_s
        self._merge_s = (
            MERGED_SHARE * board.snapshot.round_s if len(board.free_at_s) > FINE_GPUS else EPSILON_S
        )
        self.free_s = list(board.free_at_s)
        self.segments: list[Segment] = []
        self.until_s = [math.inf] * len(board.free_at_s)
        self.limited = 0
        self.idle = 0
        freed = [(free_s, 1 << gpu) for gpu, free_s in enumerate(self.free_s) if free_s < math.inf]
        self._events = freed + [(instant, 0) for instant in set(instants)]
        heapq.heapify(self._events)
        self._first_free: dict[int, tuple[float, list[GpuSet]]] = {}
        self._reach_s = self._longest_s = 0.0
        self._move_to(self.now_s)

    # ---- time ---------------------------------------------------------------------------------------------

    def instants(self, until_s: float = math.inf, stop_s: float = math.inf) -> Iterator[None]:
        """Go from event to event while there is one up to `until_s`; always the first, then until `stop_s`."""
        while True:
            yield
            if not self._events or self._events[0][0] > until_s or time.perf_counter() >= stop_s:
                return
            self._move_to(max(self.now_s, self._events[0][0]))

    def _move_to(self, now_s: float) -> None:
        events, idle = self._events, self.idle
        until_s = now_s + (self._merge_s if now_s > self.now_s else EPSILON_S)
        while events and events[0][0] <= until_s:
            event_s, freed = heapq.heappop(events)
            idle |= freed
            now_s = max(now_s, event_s)
        self.now_s = now_s
        self.idle = idle
        self.limited = 0
        self._first_free.clear()
        # segments that start now run to the next round boundary, in the far future to a later one
        snapshot = self.board.snapshot
        target_s = now_s + GROWTH * (now_s - snapshot.now_s)
        rounds = math.floor((target_s - snapshot.boundary_s) / snapshot.round_s + 1e-6) + 1
        self._reach_s = snapshot.boundary_s + max(0, rounds) * snapshot.round_s - now_s
        self._longest_s = self.board.longest_range_s + target_s - now_s

    # ---- which GPUs, for how long -------------------------------------------------------------------------

    def limit(self, gpu: int, until_s: float) -> None:
        """Others need this GPU from then on."""
        if not self.limited >> gpu & 1 or until_s < self.until_s[gpu]:
            self.until_s[gpu] = until_s
        self.limited |= 1 << gpu

    def find(self, run: Run, index: int, idle: int) -> GpuSet | None:
        """The set to take at this degree, long enough free for one step."""
        if idle & self.limited:
            end_s = self.now_s + run.seconds[index] - EPSILON_S
            idle &= ~sum(1 << gpu for gpu in bits(idle & self.limited) if self.until_s[gpu] < end_s)
        return self.blocks.find(run.degrees[index], idle, run.gpus)

    def first_free(self, degree: int) -> tuple[float, list[GpuSet]]:
        """When a set of this degree is free, and the sets that are free then."""
        if degree not in self._first_free:
            sets = self.board.sets[degree]
            free_s = [max([self.free_s[gpu] for gpu in one.gpus]) for one in sets]
            first_s = min(free_s)
            self._first_free[degree] = (
                first_s,
                [one for one, at_s in zip(sets, free_s, strict=True) if at_s == first_s],
            )
        return self._first_free[degree]

    # ---- one instant --------------------------------------------------------------------------------------

    def floors(self, waiting: Iterable[Run], idle: int) -> tuple[list[Pick], int]:
        """Give each run in turn its floor, or the widest narrower degree when waiting gains nothing."""
        picks: list[Pick] = []
        now_s, single_degree = self.now_s, self.rule.single_degree
        # within an instant idle GPUs only become fewer: what found no set here will find none later
        full: set[tuple[int, int]] = set()
        for run in waiting:
            index = run.floor_at(now_s, single_degree)
            kind = (id(run.seconds), index)  # requests of one shape share their table
            if kind in full:
                continue
            gpus = self.find(run, index, idle)
            if gpus is None:
                index, gpus = self._second_best(run, index, idle)
            if gpus is None:
                full.add(kind)
                continue
            picks.append(Pick(run, index, gpus))
            idle &= ~gpus.mask
            if not idle:
                break
        return picks, idle

    def _second_best(self, run: Run, floor: int, idle: int) -> tuple[int, GpuSet | None]:
        if not floor and not self.rule.hold:
            return floor, None
        first_s, wanted = self.first_free(run.degrees[floor])
        seconds = run.seconds
        for index in range(floor - 1, -1, -1):
            if seconds[index] > first_s - self.now_s + seconds[floor] + EPSILON_S:
                break
            gpus = self.find(run, index, idle)
            if gpus is not None:
                return index, gpus
        if self.rule.hold and first_s < math.inf:
            for gpu in max(wanted, key=lambda one: (one.mask & run.gpus).bit_count()).gpus:
                self.limit(gpu, first_s)
        return floor, None

    def gaps(self, waiting: Iterable[Run], idle: int) -> tuple[list[Pick], int]:
        """Give each run in turn the narrowest degree whose step fits before the GPUs are needed."""
        picks: list[Pick] = []
        full: set[int] = set()
        for run in waiting:
            if not idle:
                break
            for index, degree in enumerate(run.degrees):
                gpus = None if degree in full else self.find(run, index, idle)
                if gpus is not None:
                    picks.append(Pick(run, index, gpus))
                    idle &= ~gpus.mask
                    break
                if not idle & self.limited:
                    full.add(degree)
        return picks, idle

    def widen(self, picks: list[Pick], idle: int, spare: int) -> None:
        """Give idle GPUs, one widening at a time, to the pick that saves most seconds per GPU.

        `spare` idle GPUs are left to others.
        """
        room = idle.bit_count() - spare
        gains = (
            [gain for number, pick in enumerate(picks) for gain in _gains(pick, number)] if room > 0 else []
        )
        gains.sort()
        while room > 0:
            for _, number, index in gains:
                pick = picks[number]
                if pick.guests and self.limited:  # whose steps are longer than those that `find` looks at
                    continue
                if pick.run.degrees[index] - pick.run.degrees[pick.index] > room:
                    continue
                gpus = self.find(pick.run, index, idle | pick.gpus.mask)
                if gpus is not None:
                    break
            else:
                return
            idle = (idle | pick.gpus.mask) & ~gpus.mask
            room = idle.bit_count() - spare
            pick.index, pick.gpus = index, gpus
            gains = sorted([gain for gain in gains if gain[1] != number] + _gains(pick, number))

    def join(self, waiting: Iterable[Run], picks: list[Pick], *, alike: bool = False) -> None:
        """Have runs that found no GPUs share the steps of others: each with whom it adds least, as far as those stay
        on time at the common pace and it does not become late itself. Of the guests of a step as many stay, in turn,
        as are a bargain together: the first may cost as much as alone, and the next ones next to nothing.

        Args:
            alike: only with those whose steps take as long.
        """
        most = self.board.snapshot.max_batch
        hosts = [pick for pick in picks if pick.run.work.company and pick.run.can_share((), pick.index)]
        taken = {id(pick.run) for pick in picks}
        for run in waiting:
            if not run.work.company or id(run) in taken:
                continue
            worth = BARGAIN * _least_gpu_s(run)
            best, least = None, (math.inf, most)
            for pick in hosts:
                if pick.run.work.company != run.work.company or len(pick.guests) + 1 >= most:
                    continue
                degree = pick.run.degrees[pick.index]
                terms = run.work.shared.get(degree)
                if terms is None or degree * terms.add_s > worth:
                    continue
                if alike and run.seconds != pick.run.seconds:
                    continue
                together_s = pick.run.step_with((*pick.guests, run), pick.index)
                added = degree * (together_s - pick.step_s(pick.index))
                if (added, len(pick.guests)) < least and self._is_bearable(pick, run, together_s):
                    best, least = pick, (added, len(pick.guests))
            if best is not None:
                best.guests += (run,)
        for pick in hosts:
            while pick.guests and not _is_bargain(pick):
                pick.guests = pick.guests[:-1]

    def _is_bearable(self, pick: Pick, run: Run, together_s: float) -> bool:
        if pick.gpus.mask & self.limited:
            room_s = min(self.until_s[gpu] for gpu in bits(pick.gpus.mask & self.limited)) - self.now_s
            if together_s > room_s:
                return False
        now_s = self.now_s
        if any(one.latest_s >= now_s and now_s + one.steps * together_s > one.due_s for one in pick.runs):
            return False
        steps = min(self._steps(together_s, run.steps), *(one.steps for one in pick.runs))
        is_late = run.latest_s < now_s
        return is_late or now_s + steps * together_s <= run.latest_s + steps * run.seconds[-1]

    def _steps(self, step_s: float, steps: int) -> int:
        """How many of `steps` a segment that starts now has."""
        if step_s <= EPSILON_S:
            return steps
        steps = min(steps, max(1, math.ceil(self._reach_s / step_s - 1e-6)))
        if self._longest_s < steps * step_s:
            steps = max(1, math.floor(self._longest_s / step_s + 1e-6))
        return steps

    def launch(self, pick: Pick) -> None:
        """Write the segment down."""
        runs, gpus = pick.runs, pick.gpus
        step_s = pick.step_s(pick.index)
        steps = self._steps(step_s, min([run.steps for run in runs]))
        if step_s > EPSILON_S and gpus.mask & self.limited:
            room_s = min(self.until_s[gpu] for gpu in bits(gpus.mask & self.limited)) - self.now_s
            steps = min(steps, max(1, math.floor(room_s / step_s + 1e-6)))
        end_s = self.now_s + steps * step_s
        self.segments.append((self.now_s, end_s, runs, pick.run.work.kind, gpus, steps))
        for gpu in gpus.gpus:
            self.free_s[gpu] = end_s
        self.idle &= ~gpus.mask
        heapq.heappush(self._events, (end_s, gpus.mask))
        for run in runs:
            run.advance(steps, end_s, gpus.mask)


def _least_gpu_s(run: Run) -> float:
    """GPU-seconds of its next step alone."""
    return min([degree * s for degree, s in zip(run.degrees, run.seconds, strict=True)])


def _is_bargain(pick: Pick) -> bool:
    """Whether its guests add clearly less than they would take alone."""
    degree = pick.run.degrees[pick.index]
    added = degree * (pick.step_s(pick.index) - pick.run.seconds[pick.index])
    return added < BARGAIN * sum([_least_gpu_s(run) for run in pick.guests])


def _gains(pick: Pick, number: int) -> list[tuple[float, int, int]]:
    """Seconds that a wider degree saves per GPU, negated, with the number of the pick and the degree's index."""
    run, at = pick.run, pick.index
    degree = run.degrees[at]
    if pick.guests:
        wider = [i for i in range(at + 1, len(run.degrees)) if run.can_share(pick.guests, i)]
        now_s, steps = pick.step_s(at), sum([one.steps for one in pick.runs])
        saved = [(steps * (pick.step_s(i) - now_s), i) for i in wider]
        return [(s / (run.degrees[i] - degree), number, i) for s, i in saved if s < 0]
    step_s = run.seconds[at]
    return [
        (run.steps * (run.seconds[index] - step_s) / (run.degrees[index] - degree), number, index)
        for index in range(at + 1, len(run.degrees))
    ]


def bits(mask: int) -> Iterator[int]:
    """The GPUs of a mask."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
