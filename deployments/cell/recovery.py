"""The lost GPUs of a cell: how they are found, brought back, and in the end left out."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Coroutine, Iterable
from typing import Any, Protocol

from deployments.cell.state import CellState
from deployments.logs import logger

LOSS_WINDOW_S = 600.0
"""A GPU that is lost more than `cell.max_losses` times within the window is not tried again."""

JOIN_TIMEOUT_S = 900.0
"""A new replica waits for the ranges that its partners are in; the health check ends those that hang."""

DEAD_RANGE_S = 10.0
"""When a member dies the others fail at once, and this is when they would have said so."""

POLL_S = 0.05


class Keeper(Protocol):
    """Whose GPUs they are."""

    def on_lost(self, gpu: int) -> None:
        """It is about to be taken off the board; its ranges still are on it."""

    def on_back(self, gpu: int) -> None:
        """It is on the board again."""

    def on_cordoned(self, gpu: int) -> None:
        """It will not come back."""

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> object:
        """Run it beside everything else."""


class Recovery:
    """Takes lost GPUs off the board and puts them back with a new replica.

    The GPUs that are off the board are `CellState.lost`.
    """

    def __init__(self, state: CellState, keeper: Keeper) -> None:
        self._state = state
        self._fleet = state.fleet
        self._cell = state.args.cell
        self._rounds = state.rounds
        self._keeper = keeper
        self._losses: dict[int, list[float]] = defaultdict(list)
        self._last_report_s = [time.monotonic()] * len(state.fleet)
        self._dead_s: dict[int, float] = {}
        self._joining = asyncio.Lock()

    @property
    def cordoned(self) -> tuple[int, ...]:
        """GPUs left out for good."""
        most = self._cell.max_losses
        return tuple(gpu for gpu in range(len(self._fleet)) if len(self._losses[gpu]) > most)

    @property
    def usable(self) -> int:
        """How many GPUs there will be when all that can come back have."""
        return len(self._fleet) - len(self.cordoned)

    @property
    def last_report_s(self) -> float:
        """When a range ended last, on any GPU, or a GPU came back."""
        return max(self._last_report_s)

    def reported(self, gpus: Iterable[int], now_s: float) -> None:
        """A range over `gpus` ended."""
        for gpu in gpus:
            self._last_report_s[gpu] = now_s

    def lose(self, gpu: int) -> None:
        """A replica is gone: take its GPU off the board and have it replaced; the others go on."""
        if gpu in self._state.lost:
            return
        logger.error("GPU replica %d is lost%s", gpu, self._fleet.memory.shortage())
        self._state.lost.add(gpu)
        self._keeper.on_lost(gpu)
        self._rounds.gpu_lost(gpu)
        self._keeper.spawn(self._recover(gpu))

    async def _recover(self, gpu: int) -> None:
        """Replace a lost replica. After too many losses the GPU is cordoned: it stays off the board."""
        while True:
            now_s = time.monotonic()
            self._losses[gpu] = [t for t in self._losses[gpu] if now_s - t < LOSS_WINDOW_S] + [now_s]
            if gpu in self.cordoned:
                logger.error("GPU %d was lost %d times: it is cordoned", gpu, len(self._losses[gpu]))
                self._keeper.on_cordoned(gpu)
                return
            try:
                await self._fleet.replace(gpu)
                async with self._joining:
                    others = set(range(len(self._fleet))) - self._state.lost
                    await asyncio.wait_for(self._fleet.rejoin(gpu, others), JOIN_TIMEOUT_S)
                    while any(gpu in assignment.gpus for assignment in self._rounds.running):
                        await asyncio.sleep(POLL_S)  # calls to the old replica are failing right now
                    self._back(gpu)
                return
            except Exception as error:
                logger.error("GPU replica %d could not be replaced: %r", gpu, error)

    def _back(self, gpu: int) -> None:
        now_s = time.monotonic()
        self._state.lost.discard(gpu)
        self._dead_s.pop(gpu, None)
        self._rounds.gpu_back(gpu, now_s)
        self.reported([gpu], now_s)
        logger.info("GPU replica %d is back", gpu)
        self._keeper.on_back(gpu)

    async def look(self, now_s: float) -> None:
        """Find replicas that died idle, or that keep a new one from joining, and end those that stand still."""
        busy = {gpu for assignment in self._rounds.running for gpu in assignment.gpus}
        idle = set(range(len(self._fleet))) - busy - self._state.lost
        for gpu in await (self._fleet.silent(idle) if self._joining.locked() else self._fleet.dead(idle)):
            self.lose(gpu)
        await self._watch(now_s)

    async def _watch(self, now_s: float) -> None:
        """End the replicas whose ranges do not end; their calls then fail, and they are lost."""
        cell, running = self._cell, self._rounds.running
        longest_s = max((a.end_s - a.start_s for a in running), default=0.0)
        limit_s = max(cell.step_timeout_floor_s, cell.step_timeout_factor * longest_s)
        for gpu in sorted({gpu for a in running for gpu in a.gpus} - self._state.lost):
            first = next(a for a in running if gpu in a.gpus)
            since_s = now_s - max(self._last_report_s[gpu], first.start_s)
            if since_s > cell.step_timeout_floor_s:
                # one that still answers may only be slow, and others compute with it: it gets longer,
                # unless a member has been dead for long, for then this range never ends
                members = set(first.gpus) - self._state.lost
                states = await self._fleet.states(members)
                dead_s = [
                    self._dead_s.setdefault(member, now_s) for member in members if states[member] == "dead"
                ]
                hopeless = since_s > limit_s or now_s - min(dead_s, default=now_s) > DEAD_RANGE_S
                stuck = members if hopeless else {gpu for gpu in members if states[gpu] == "silent"}
                if stuck:
                    logger.error("no step range ended on GPU %d for %.0f s, ending %s", gpu, since_s, stuck)
                for member in stuck:
                    self._fleet.kill(member)
                self.reported(stuck, now_s)
