"""A cell as a Serve deployment: one replica is one scheduler actor with the GPUs of one node."""

from __future__ import annotations

import asyncio
import contextvars
import os
import uuid
from collections.abc import AsyncIterator
from logging import DEBUG
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError

from deployments.cell.meters import Families
from deployments.cell.scheduler import create_scheduler
from deployments.config import AppArgs
from deployments.logs import LogForm, log_request, logger
from tetriserve.errors import ConfigError
from tetriserve.model_info import ModelInfo
from tetriserve.profile import Profile
from tetriserve.request import CellStatus, GenerateRequest, GenerateResult, Progress

STATUS_TIMEOUT_S = 1.0

WATCH_S = 2.0
"""How often a scheduler is asked while it starts."""

PROCESS_S = 60.0
"""Until a scheduler's process is there and has imported what it needs."""

STUCK_S = 20.0
"""A scheduler that does not answer a health check for so long is given up; it answers while it plans, in
milliseconds."""


class Cell:
    """Thin: Serve gives it a placement group, health checks, routing and autoscaling; the work is below."""

    # Serve awaits an asynchronous constructor: the replica counts as started once the cell can run steps
    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]
        group = ray.util.get_current_placement_group()
        if group is None:
            raise RuntimeError("Cell needs placement_group_bundles; deploy it through deployments.app:build")
        self._args = self._turned = args
        self._scheduler = create_scheduler(args, group)
        self._log_form: LogForm | None = None
        self._hand_on_log_form()
        try:
            await asyncio.wait_for(self._scheduler.__ray_ready__.remote(), PROCESS_S)
        except asyncio.TimeoutError:
            raise RuntimeError(f"the scheduler's process did not start within {PROCESS_S:g} s") from None
        starting = asyncio.ensure_future(self._scheduler.start.remote())
        # Serve asks after a replica's health only once this returns
        while not (await asyncio.wait([starting], timeout=WATCH_S))[0]:
            await self._end_if_stuck()
        await starting

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve hands over the deployment's `user_config`, at the start and when it changed: knobs of
        `args.scheduler`, turned while the cell runs. Wrong ones leave it as it is, `/health` says so."""
        refused = ""
        try:
            args = self._args.turned("scheduler", user_config)
            made_for = self._args.scheduler.max_open_requests
            if args.scheduler.max_open_requests > made_for:
                raise ConfigError(f"args.scheduler.max_open_requests: at most {made_for}, as in args")
            self._turned = args
        except ConfigError as error:
            refused = f"user_config: {error.message}"
            logger.error("%s", refused)
        await self._scheduler.turn.remote(self._turned, refused)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """`GenerateResult` whose `image` is an object reference to uint8 [height, width, 3]."""
        call_id = uuid.uuid4().hex
        try:
            return await self._scheduler.generate.remote(request, call_id)
        except asyncio.CancelledError:
            self._give_up(request, call_id)
            raise

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Progress | GenerateResult]:
        """`Progress` after every committed step range, then the `GenerateResult`."""
        call_id = uuid.uuid4().hex
        call = self._scheduler.stream.options(num_returns="streaming")
        finished = False
        try:
            async for item in call.remote(request, call_id):
                value = await item
                finished = isinstance(value, GenerateResult)
                yield value
        finally:
            if not finished:
                self._give_up(request, call_id)

    async def delete(self, request_ids: tuple[str, ...]) -> bool:
        """End or forget requests; False when none of them is here."""
        return await self._scheduler.delete.remote(request_ids)

    async def drain(self, at_once: bool) -> int:
        """Before the server is stopped: let nobody in, end who is open when `at_once`. Returns how many are open."""
        return await self._scheduler.drain.remote(at_once)

    def _give_up(self, request: GenerateRequest, call_id: str) -> None:
        identity = request.request_id
        log_request(DEBUG, identity, "is given up by a caller")
        # Ray cancels whatever a cancelled task has submitted, this call too: make it outside the task's context
        loop = asyncio.get_running_loop()
        cancel = self._scheduler.cancel.remote
        loop.call_soon(cancel, identity, call_id, context=contextvars.Context())

    async def model_info(self) -> ModelInfo:
        return await self._scheduler.model_info.remote()

    async def profile(self) -> Profile:
        """The step times of this cell, corrected by what it measured."""
        return await self._scheduler.profile.remote()

    async def status(self) -> CellStatus:
        """Answers within a second; raises TimeoutError when the scheduler does not."""
        return await asyncio.wait_for(self._scheduler.status.remote(), STATUS_TIMEOUT_S)

    async def metrics(self) -> tuple[int, Families]:
        """This cell's number among its deployment's replicas, and what it measured."""
        return _number(), await asyncio.wait_for(self._scheduler.metrics.remote(), STATUS_TIMEOUT_S)

    async def board(self, seconds: float, owner: str | None) -> tuple[int, dict[str, Any]]:
        """This cell's number, and its live board as `owner` may see it; None sees everything."""
        board = self._scheduler.board.remote(seconds, owner)
        return _number(), await asyncio.wait_for(board, STATUS_TIMEOUT_S)

    async def record(self, seconds: float, owner: str | None) -> tuple[int, dict[str, Any]]:
        """This cell's number, and what its timeline shows to `owner`; None sees everything."""
        record = self._scheduler.record.remote(seconds, owner)
        return _number(), await asyncio.wait_for(record, STATUS_TIMEOUT_S)

    async def check_health(self) -> None:
        """Serve calls this; it fails when steps stop advancing, not only when a process is dead."""
        self._hand_on_log_form()
        await self._end_if_stuck()

    async def _end_if_stuck(self) -> None:
        """Ask the scheduler; raises what it raises."""
        try:
            await asyncio.wait_for(self._scheduler.check_health.remote(), STUCK_S)
        except (RayActorError, asyncio.TimeoutError):
            # a failed check is repeated before Serve acts on it, a dead replica is replaced at once
            logger.error("the scheduler is gone or stuck: this cell ends")
            os._exit(1)

    def _hand_on_log_form(self) -> None:
        """Have the actors write their logs as Serve has this replica do, which may change while it runs."""
        form = LogForm.of_serve()
        if form != self._log_form:
            self._log_form = form
            self._scheduler.write_logs_as.remote(form)


def _number() -> int:
    """Of this cell among its deployment's replicas."""
    return serve.get_replica_context().rank.rank
