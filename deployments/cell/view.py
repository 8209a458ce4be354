"""What a cell says of itself: how it is, what it measured, its board."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from typing import Any

from deployments.cell.entries import unix_ahead_s
from deployments.cell.meters import Families
from deployments.cell.planner import Planner
from deployments.cell.recovery import Recovery
from deployments.cell.requests import SHUTTING_DOWN, Requests
from deployments.cell.state import CellState
from tetriserve.profile import Profile
from tetriserve.request import CellStatus, Execution
from tetriserve.scheduler.history import Run

PLANS_KEPT = 1000
"""Decisions whose time is remembered for the status."""

BOARD_AGE_S = 0.25
"""How old a board may be when the next one asks for the same: many may look at once."""


class View:
    """Reads the parts of a cell and changes none.

    Attributes:
        plan_s: seconds of the last decisions.
    """

    def __init__(self, state: CellState, requests: Requests, recovery: Recovery, planner: Planner) -> None:
        self.plan_s: deque[float] = deque(maxlen=PLANS_KEPT)
        self._state = state
        self._requests = requests
        self._recovery = recovery
        self._planner = planner
        self._boards: dict[tuple[float, str | None], tuple[float, dict[str, Any]]] = {}

    def status(self) -> CellStatus:
        gpus = self._state.args.cell.gpus
        failed = bool(self._state.failure)
        reason = self._state.failure or (SHUTTING_DOWN if self._state.is_draining else "")
        return CellStatus(
            ready=not reason,
            reason=reason,
            gpus=gpus,
            gpus_ready=0 if failed else gpus - len(self._state.lost),
            open_requests=len(self._requests.entries),
            running=0 if failed else len(self._state.rounds.running),
            policy=self._planner.policy.name,
            plan_ms_p50=1000 * _quantile(self.plan_s, 0.5),
            plan_ms_p99=1000 * _quantile(self.plan_s, 0.99),
            fallbacks=self._planner.fallbacks,
            cordoned=self._recovery.cordoned,
            held=sum(self._state.fleet.held),
            refused=self._state.refused,
            started_in_s=self._state.started_in_s,
        )

    def metrics(self) -> Families:
        """What `/metrics` shows of this cell."""
        working = {
            request_id for assignment in self._state.rounds.running for request_id in assignment.request_ids
        }
        return self._state.meters.families(self.status(), len(self._requests.entries.keys() - working))

    def profile(self) -> Profile:
        """The step times as measured since the start."""
        return self._state.profile.corrected()

    def board(self, seconds: float, owner: str | None) -> dict[str, Any]:
        """`History.board`: the last `seconds` and what is committed, as `owner` may see it."""
        now_s, ahead_s = time.monotonic(), unix_ahead_s()
        self._boards = {who: kept for who, kept in self._boards.items() if now_s - kept[0] < BOARD_AGE_S}
        if (seconds, owner) in self._boards:
            return self._boards[seconds, owner][1]
        running = [] if self._state.failure else self._state.rounds.committed.expected(now_s)
        runs = [
            Run(
                request_id,
                Execution(
                    a.kind,
                    a.steps,
                    a.gpus,
                    start_s + ahead_s,
                    end_s + ahead_s,
                    a.others,
                    len(a.request_ids) - 1,
                ),
            )
            for a, start_s, end_s in running
            for request_id in a.request_ids
        ]
        cordoned = self._recovery.cordoned
        lost = self._state.lost if not self._state.failure else range(len(self._state.fleet))
        states = [
            "cordoned" if gpu in cordoned else "lost" if gpu in lost else "ready"
            for gpu in range(len(self._state.fleet))
        ]
        board = self._state.history.board(now_s + ahead_s, seconds, owner, runs, states)
        self._boards[seconds, owner] = now_s, board
        return board

    def record(self, seconds: float, owner: str | None) -> dict[str, Any]:
        """`History.record`: the last `seconds` as `owner` may see them."""
        return self._state.history.record(time.time(), seconds, owner)


def _quantile(values: Collection[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))] if values else 0.0
