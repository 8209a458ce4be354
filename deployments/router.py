"""Which cell gets a request, and another one when that is lost: the Python handle's `generate` and `stream`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from logging import DEBUG, INFO, WARNING
from typing import Any

import ray
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState

from deployments.config import AppArgs
from deployments.logs import log_request, logger
from deployments.memory import HostMemory
from deployments.wayback import WayBack
from tetriserve.errors import (
    CellLost,
    GenerationFailed,
    ModelNotFound,
    NotReady,
    Overloaded,
    TetriserveError,
    first_line,
)
from tetriserve.model_info import ModelInfo
from tetriserve.profile import Profile
from tetriserve.request import CellStatus, GenerateRequest, GenerateResult, Progress

STATUS_TIMEOUT_S = 2.0
"""How long a cell may take to say how it is; /health answers within this."""

STATUS_AGE_S = 1.0
"""How old the list of answering cells may be when a request is let in."""

CELL_RETURN_S = 900.0
"""How long an accepted request waits for a cell to come back; it has to load the weights again."""
CELL_POLL_S = 0.5
RESUBMIT_PAUSE_S = 0.5
RECONFIGURED_POLL_S = 0.05
FIRST_START_S = 15.0
"""What a cell takes to start, until one has said what it took."""
LONGEST_PAUSE_S = 120.0
MAX_RESUBMISSIONS = 5
"""A request that took so many cells with it is not given another."""


class Router:
    """Lets requests in, gives them to a cell, and to another one when that is lost.

    Args:
        cell: handle of the Cell deployment.
        args: the application's arguments.

    Attributes:
        way_back: what results took from the cells to the caller.
        answering: HTTP requests that are being answered here.
    """

    def __init__(self, cell: DeploymentHandle, args: AppArgs) -> None:
        self.args = args
        self._cell = cell
        self._info: ModelInfo | None = None
        self._checked_s = float("-inf")
        self.way_back = WayBack()
        self._memory = HostMemory()
        self._look: asyncio.Future[bool] | None = None
        self._start_s = FIRST_START_S
        self._made_s = time.monotonic()
        self._seen_s = float("-inf")
        self.answering = 0

    # -- the Python handle ---------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Make one picture. Raises the errors of `tetriserve.errors`; cancelling this frees the GPUs."""
        request = self._arrived(request)
        (result,) = [item async for item in self._submit(request, self._once)]
        assert isinstance(result, GenerateResult)
        return self.answered(result, request)

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Progress | GenerateResult, None]:
        """Like `generate`, but yields `Progress` items on the way; the last item is the result.

        When a cell is lost on the way, another one starts the request anew and progress falls back.
        """
        request = self._arrived(request)
        async with aclosing(self._submit(request, self._streamed)) as items:
            async for item in items:
                yield self.answered(item, request) if isinstance(item, GenerateResult) else item

    def _arrived(self, request: GenerateRequest) -> GenerateRequest:
        """With the time from which its deadline counts, unless the HTTP edge has put that down."""
        if request.arrived_s is not None:
            return request
        way_back_s = self.way_back.predict("", request.shape.pixels)
        return dataclasses.replace(request, arrived_s=time.time(), way_back_s=way_back_s)

    def answered(
        self, result: GenerateResult, request: GenerateRequest, kind: str = "", *, is_last: bool = True
    ) -> GenerateResult:
        """The result as it leaves here now.

        Args:
            request: as it arrived here.
            kind: the format of the file that was made of it, "" for none.
            is_last: nothing else was waited for since it was made, so its way back can be measured by it.
        """
        assert request.arrived_s is not None
        now_s = time.time()
        is_kept = result.created_s < request.arrived_s  # of an earlier call
        if is_last and not is_kept:
            self.way_back.note(kind, request.shape.pixels, now_s - result.created_s)
        since_s = request.arrived_s if is_kept else result.metrics.arrival_s
        return dataclasses.replace(result, metrics=result.metrics.answered(now_s - since_s))

    async def _submit(
        self,
        request: GenerateRequest,
        submit: Callable[[GenerateRequest], AsyncGenerator[Progress | GenerateResult, None]],
    ) -> AsyncGenerator[Progress | GenerateResult, None]:
        """What the cell says about a request. Once accepted it is submitted again, with the same id, seed and
        deadline, while the cells that work on it are lost."""
        request = await self._admit(request)
        name = request.request_id
        for attempt in itertools.count():
            log_request(DEBUG, name, "goes to a cell")
            try:
                # pictures go to the GPUs through the object store, past whoever does not look at them
                sent = request.with_pixels([ray.put(image.pixels) for image in request.images])
                async with aclosing(submit(dataclasses.replace(sent, attempt=attempt))) as items:
                    async for item in items:
                        yield item
                return
            except Exception as error:
                # a cell that is still starting turns away what was accepted before
                lost = _is_lost(error) or (attempt and isinstance(as_tetriserve_error(error), Overloaded))
                if not lost or attempt == MAX_RESUBMISSIONS:
                    ours = translate(error, name)
                    # Serve's own id of the request, which such an answer has in its headers, is in this line too
                    log_request(INFO, name, "is answered with %s", ours.code, outcome=ours.code)
                    raise ours from error
                kind = type(getattr(error, "cause", None) or error).__name__  # Serve logs the rest
                log_request(WARNING, name, "lost its cell (%s), trying again", kind)
            # the router may not know yet which cell is dead
            await asyncio.sleep(RESUBMIT_PAUSE_S * 2**attempt)
            await self._wait_for_a_cell()

    async def _once(self, request: GenerateRequest) -> AsyncGenerator[Progress | GenerateResult, None]:
        response = self._cell.generate.remote(request)
        try:
            result: GenerateResult = await response
            yield await _with_image(result)
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def _streamed(self, request: GenerateRequest) -> AsyncGenerator[Progress | GenerateResult, None]:
        response: Any = self._cell.options(stream=True).stream.remote(request)
        try:
            async for item in response:
                yield await _with_image(item) if isinstance(item, GenerateResult) else item
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise

    async def _wait_for_a_cell(self) -> None:
        """Until Ray Serve has a cell that can run steps again. Raises `NotReady` when that takes too long."""
        end_s = time.monotonic() + CELL_RETURN_S
        while time.monotonic() < end_s:
            with contextlib.suppress(TetriserveError):
                if any(status.ready for status in await self.statuses()):
                    return
            await asyncio.sleep(CELL_POLL_S)
        raise NotReady(f"no cell came back within {CELL_RETURN_S:g} s")

    # -- what the cells say about themselves ---------------------------------------------------------------

    async def statuses(self) -> list[CellStatus]:
        """Every cell that answers. Raises `NotReady` if no cell runs or none answers in time."""
        with self._not_ready_as_known():
            try:
                try:
                    answers = await self._broadcast("status", timeout_s=STATUS_TIMEOUT_S / 2)
                except TimeoutError:
                    # one silent cell hides the answers of the others; Ray Serve's routing avoids it
                    answers = [await asyncio.wait_for(self._cell.status.remote(), STATUS_TIMEOUT_S / 2)]
            except asyncio.TimeoutError:
                raise NotReady(f"no cell answers within {STATUS_TIMEOUT_S:g} s") from None
            except Exception as error:
                raise _unanswered(error) from error
        statuses = [answer for answer in answers if isinstance(answer, CellStatus)]
        if any(status.ready for status in statuses):
            self._start_s = max(status.started_in_s for status in statuses if status.ready)
            self._seen_s = time.monotonic()
        return statuses

    @contextlib.contextmanager
    def _not_ready_as_known(self) -> Iterator[None]:
        """A `NotReady` from inside also says when a cell may be back, and so where memory is the likely reason."""
        try:
            yield
        except NotReady as error:
            # nothing was seen yet: it may be about to start, or nearly there
            away_s = max(0.0, time.monotonic() - max(self._seen_s, self._made_s))
            left_s = min(self._start_s - away_s, LONGEST_PAUSE_S)
            after_s = max(error.retry_after_s, math.ceil(left_s))
            raise NotReady(f"{error.message}{self._memory.shortage()}", after_s) from error

    async def model_info(self) -> ModelInfo:
        """The served model; asked once. Raises `NotReady` while no cell has loaded it."""
        if self._info is not None:
            return self._info
        with self._not_ready_as_known():
            info: ModelInfo = await self._ask_one("model_info", "the model is still loading")
        self._info = info
        return info

    async def numbered(self, method: str, *arguments: object) -> list[tuple[int, Any]]:
        """(number, answer) of every cell that answers, in order. Raises `NotReady` when that is not certain."""
        cells = await self._ask_all(method, *arguments)
        answered = [cell for cell in cells if not isinstance(cell, Exception)]
        return sorted(answered, key=lambda cell: cell[0])

    async def profile(self) -> Profile:
        """The step times of a cell, corrected by what it measured. Raises `NotReady` when none answers."""
        profile: Profile = await self._ask_one("profile", f"no cell answers within {STATUS_TIMEOUT_S:g} s")
        return profile

    async def delete(self, *request_ids: str) -> bool:
        """End requests wherever they run, whoever waits for them (`Cancelled`), and forget what is kept of them.

        False when no cell knows them. Raises `NotReady` when that is not certain.
        """
        found = await self._ask_all("delete", request_ids)
        failed = [answer for answer in found if isinstance(answer, Exception)]
        if failed and True not in found:
            raise _unanswered(failed[0])
        return True in found

    async def drain(self, *, at_once: bool = False) -> int:
        """Let no request in any more, for the server is about to be stopped, and with `at_once` end those that are
        open (`NotReady`). Returns how many are open or being answered. Raises `NotReady` when that is not certain."""
        opened = [answer for answer in await self._ask_all("drain", at_once) if isinstance(answer, int)]
        return max(sum(opened), self.answering)

    async def _ask_all(self, method: str, *arguments: object) -> list[Any]:
        """What every cell says, errors included. Raises `NotReady` when one says nothing."""
        try:
            return await self._broadcast(method, *arguments, timeout_s=STATUS_TIMEOUT_S)
        except TimeoutError:
            raise NotReady(f"not all cells answer within {STATUS_TIMEOUT_S:g} s") from None
        except Exception as error:
            raise _unanswered(error) from error

    async def _broadcast(self, method: str, *arguments: object, timeout_s: float) -> list[Any]:
        """What every cell says, errors included. Raises `TimeoutError` when one says nothing.

        While Serve hands a cell its `user_config` it counts it as none: that is waited for.
        """
        end_s = time.monotonic() + timeout_s
        while True:
            try:
                answers: list[Any] = await self._cell.broadcast(method, *arguments).results_async(
                    timeout_s=timeout_s, return_exceptions=True
                )
                return answers
            except DeploymentUnavailableError:
                if time.monotonic() > end_s or not await self._has_cells():
                    raise
                await asyncio.sleep(RECONFIGURED_POLL_S)

    async def _has_cells(self) -> bool:
        """Whether Serve's controller has a cell that runs or is just handed its `user_config`. All who ask at a
        time are answered by one look."""
        if self._look is None or self._look.done():
            self._look = asyncio.ensure_future(asyncio.to_thread(self._look_for_cells))
        return await asyncio.shield(self._look)

    def _look_for_cells(self) -> bool:
        try:
            application = serve.status().applications[self._cell.app_name]
            states = application.deployments[self._cell.deployment_name].replica_states
        except Exception:  # whatever is wrong with Serve, there is no cell to be had
            return False
        return bool(states.get(ReplicaState.RUNNING) or states.get(ReplicaState.UPDATING))

    async def _ask_one(self, method: str, silence: str) -> Any:
        """What any cell says. Raises `NotReady`, with `silence` for its reason when it says nothing."""
        response: Any = getattr(self._cell, method).remote()
        try:
            return await asyncio.wait_for(response, STATUS_TIMEOUT_S)
        except asyncio.TimeoutError:
            response.cancel()
            raise NotReady(silence) from None
        except Exception as error:
            raise _unanswered(error) from error

    async def _admit(self, request: GenerateRequest) -> GenerateRequest:
        """The request as the cell gets it. Raises what can be said without the cell.

        While no cell is ready nothing is let in: it could wait, unbounded and unseen by its deadline, until
        Ray Serve has started a new one. What the model cannot serve stops here too, since Ray Serve logs a
        traceback for whatever a cell raises.
        """
        info = await self.model_named(request.model)
        info.check(request)
        if time.monotonic() - self._checked_s > STATUS_AGE_S:
            statuses = await self.statuses()
            if not any(status.ready for status in statuses):
                with self._not_ready_as_known():
                    raise NotReady(why_not_ready(statuses))
            self._checked_s = time.monotonic()
        return dataclasses.replace(
            request,
            model=info.name,
            request_id=request.request_id or uuid.uuid4().hex,
            seed=secrets.randbelow(1 << 31) if request.seed is None else request.seed,
        )

    async def model_named(self, name: str | None) -> ModelInfo:
        info = await self.model_info()
        if name not in (None, "default", info.name, *self.args.model.aliases):
            raise ModelNotFound("model", f"{name!r} is not served here, but {info.name!r} is")
        return info


async def _with_image(result: GenerateResult) -> GenerateResult:
    """The result with its pixels fetched, where the cell sent only a reference to them."""
    if isinstance(result.image, ray.ObjectRef):
        return dataclasses.replace(result, image=await result.image)
    return result


def _is_lost(error: Exception) -> bool:
    """Whether a cell, its scheduler or a picture on its way was lost, rather than the request refused."""
    causes = (error, getattr(error, "cause", None))
    return any(isinstance(one, RayActorError | ObjectLostError | CellLost) for one in causes)


def translate(error: Exception, request_id: str | None = None) -> TetriserveError:
    """The error of ours for whatever came out of a call to the cell; the unexpected ones are logged.

    `request_id` is of the request that the call was about, if it was about one.
    """
    if isinstance(error, BackPressureError):
        return Overloaded(error.message)
    if isinstance(error, DeploymentUnavailableError):
        return NotReady("no cell is running")
    ours = as_tetriserve_error(error)
    if isinstance(ours, GenerationFailed):
        if request_id is None:
            logger.warning("a call to the cell failed", exc_info=error)
        else:
            log_request(WARNING, request_id, "failed in the cell", error=error)
    return ours


def _unanswered(error: Exception) -> TetriserveError:
    """The same for a question to the cells, which a cell that is just being lost leaves open."""
    return NotReady("the cell was lost") if _is_lost(error) else translate(error)


def why_not_ready(statuses: list[CellStatus]) -> str:
    return "; ".join(status.reason for status in statuses if status.reason) or "no cell is running"


def as_tetriserve_error(error: BaseException) -> TetriserveError:
    """The error of ours behind whatever came out of a call to the cell.

    Ray wraps what a remote method raises and keeps the original as `cause`.
    """
    for candidate in (getattr(error, "cause", None), error):
        if isinstance(candidate, TetriserveError):
            return candidate
    return GenerationFailed(f"{type(error).__name__}: {first_line(error)}")
