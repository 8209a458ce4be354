"""The HTTP app in the test's own process, over a stand-in for the cell."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from deployments.cell.meters import Families
from deployments.config import AppArgs
from deployments.http.ingress import Ingress
from deployments.http.pictures import Pictures
from tetriserve.model_info import ModelInfo
from tetriserve.profile import Profile
from tetriserve.request import (
    CellStatus,
    Execution,
    GenerateRequest,
    GenerateResult,
    LostRange,
    Metrics,
    PlannedWith,
    Progress,
    Shape,
    StepRange,
)
from tetriserve.scheduler.history import History

INFO = ModelInfo(
    name="lab/tiny",
    family="flux",
    size_multiple=16,
    token_pixels=16,
    text_tokens=64,
    heads=4,
    cfg_field="true_cfg_scale",
    loras=("ink", "pixel"),
    min_pixels=64 * 64,
    max_pixels=1024 * 1024,
    max_side=2048,
    default_steps=8,
    max_steps=200,
    default_guidance_scale=3.5,
    max_prompt_chars=100,
)
PROFILE = Profile("lab/tiny", "CPU", "measured", (1, 2), {Shape(256, 256): {1: 0.25, 2: 0.15}})
READY = CellStatus(True, "", 2, 2, 0, 0, "ilp")
STARTING = CellStatus(False, "measuring step times", 2, 0, 0, 0, "ilp")
NOW_S = 1700000010.0
URL = "/v1/images/generations"
PICTURE = {"prompt": "a red circle", "size": "64x96"}


class Call:
    """Stand-in of a DeploymentResponse."""

    def __init__(self, work: Any, cancelled: Callable[[], None]) -> None:
        self._task = asyncio.ensure_future(work)
        self._cancelled = cancelled

    def __await__(self) -> Generator[Any, None, Any]:
        return self._task.__await__()

    def cancel(self) -> None:
        self._cancelled()
        self._task.cancel()


class StreamCall:
    """Stand-in of a DeploymentResponseGenerator."""

    def __init__(self, items: AsyncGenerator[Any, None], cancelled: Callable[[], None]) -> None:
        self._items = items
        self.cancel = cancelled

    def __aiter__(self) -> AsyncGenerator[Any, None]:
        return self._items


class Method:
    def __init__(self, remote: Callable[..., Any]) -> None:
        self.remote = remote


LOST = (LostRange("denoise", 2, (1,), 1700000000.1),)


class Cell:
    """Stand-in of a DeploymentHandle: remembers the requests, answers at once with a grey picture.

    A stream yields `progress` before that, `pause_s` apart.
    """

    def __init__(self, *statuses: CellStatus, error: BaseException | None = None, delay_s: float = 0) -> None:
        self.statuses = list(statuses or [READY])
        self.error = error
        self.losses: list[Exception] = []
        self.delay_s = delay_s
        self.requests: list[GenerateRequest] = []
        self.cancelled: list[str | None] = []
        self.unavailable: BaseException | None = None
        self.is_known_to_serve = False
        """To its controller, when `unavailable`."""
        self.silent = False
        self.broadcasts: list[tuple[Any, ...]] = []
        self.deaf: list[Exception] = []
        self.metrics: list[tuple[int, Families]] = []
        self.progress = [Progress("", "denoise", 4, 8)]
        self.pause_s = 0.0
        self.history = History(2, 1700000000.0)
        self.info = INFO
        self.created_s: Callable[[], float] | None = None
        """When a picture was made; None for long ago, as that of a repeated request."""

    @property
    def generate(self) -> Method:
        return Method(lambda request: Call(self._generate(request), self._forget(request)))

    @property
    def model_info(self) -> Method:
        return Method(lambda: Call(self._soon(self.info), lambda: None))

    @property
    def status(self) -> Method:
        return Method(lambda: Call(self._soon(self.statuses[0]), lambda: None))

    @property
    def profile(self) -> Method:
        return Method(lambda: Call(self._soon(PROFILE), lambda: None))

    @property
    def stream(self) -> Method:
        return Method(lambda request: StreamCall(self._stream(request), self._forget(request)))

    def options(self, stream: bool) -> Cell:
        assert stream
        return self

    def broadcast(self, method: str, *arguments: Any) -> Cell:
        self.broadcasts.append((method, *arguments))
        return self

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> list[Any]:
        if self.unavailable:
            raise self.unavailable
        try:
            await asyncio.wait_for(self._soon(None), timeout_s)
        except asyncio.TimeoutError:
            raise TimeoutError from None
        method, *arguments = self.broadcasts[-1]
        if method == "status":
            return self.statuses
        if method == "metrics":
            return [*self.deaf, *self.metrics]
        if method == "board":
            seconds, owner = arguments
            return [*self.deaf, (0, self.history.board(NOW_S, seconds, owner, (), ("ready", "lost")))]
        if method == "record":
            return [*self.deaf, (0, self.history.record(NOW_S, *arguments))]
        assert method == "delete"
        known = {request.request_id for request in self.requests}
        return [*self.deaf, bool(known & set(arguments[0]))]

    async def _soon(self, value: Any) -> Any:
        await asyncio.sleep(1000 if self.silent else 0)
        return value

    def _forget(self, request: GenerateRequest) -> Callable[[], None]:
        return lambda: self.cancelled.append(request.request_id)

    async def _generate(self, request: GenerateRequest) -> GenerateResult:
        self.requests.append(request)
        self.info.check(request)
        if self.losses:
            raise self.losses.pop(0)
        slow = self.delay_s * len(self.requests)
        await asyncio.sleep(slow)
        if self.error is not None and len(self.requests) > 1 - (self.delay_s == 0):
            raise self.error
        seed = 7 if request.seed is None else request.seed
        met = None if request.slo_s is None else slow < request.slo_s
        steps = (StepRange(6, 1, (0,)), StepRange(2, 2, (0, 1)))
        ran = Execution("denoise", 4, (0,), 1700000000.0, 1700000000.3, others=3)
        metrics = Metrics(
            queue_s=0.1,
            encode_s=0.2,
            denoise_s=0.3,
            decode_s=0.4,
            total_s=1 + slow,
            inference_s=0.9,
            slo_s=request.slo_s,
            slo_met=met,
            steps=steps,
            schedule=(ran,),
            seed=seed,
            arrival_s=(request.arrived_s or 0.0) if self.created_s else 1699999999.5,
            planned_with=PlannedWith(0.2, {1: 0.05, 2: 0.03}, 0.4),
            peak_memory_bytes=3 << 20,
            lost=LOST,
            predicted_s=1.5,
        )
        image = np.full((request.height, request.width, 3), 128, np.uint8)
        created_s = self.created_s() if self.created_s else 1700000000.5
        return GenerateResult(request.request_id or "r", image, created_s, INFO.name, metrics)

    async def _stream(self, request: GenerateRequest) -> Any:
        for item in self.progress:
            yield replace(item, request_id=request.request_id or "r")
            await asyncio.sleep(self.pause_s)
        yield await self._generate(request)


class Store:
    """Stand-in of the handle of Pictures: a real one in this process."""

    def __init__(self, args: AppArgs) -> None:
        pictures = Pictures(args.http)
        self.keep = Method(lambda *about: Call(pictures.keep(*about), lambda: None))
        self.get = Method(lambda *about: Call(pictures.get(*about), lambda: None))


def ingress(cell: Cell, store: Any = None, **http: Any) -> Ingress:
    handle: Any = cell
    args = AppArgs.parse({"http": http})
    made = Ingress(handle, store or Store(args), args)
    made._look_for_cells = lambda: cell.is_known_to_serve  # type: ignore[method-assign]
    return made


def ask(
    cell: Cell | Ingress, method: str, path: str, limits: dict[str, Any] | None = None, **options: Any
) -> httpx.Response:
    async def run() -> httpx.Response:
        front = cell if isinstance(cell, Ingress) else ingress(cell, **(limits or {}))
        transport = httpx.ASGITransport(front.__serve_build_asgi_app__(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def post(cell: Cell | None = None, **fields: Any) -> httpx.Response:
    return ask(cell or Cell(), "POST", URL, json=fields)


def hang_up(cell: Cell, body: dict[str, Any], calls: int) -> None:
    """Post, and leave when so many calls are with the cell: Ray Serve cancels the ingress task when a client goes."""

    async def run() -> None:
        transport = httpx.ASGITransport(ingress(cell).__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            call = asyncio.create_task(client.post(URL, json=body))
            while len(cell.requests) < calls:
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    asyncio.run(run())


@contextmanager
def listening(front: Ingress) -> Iterator[str]:
    """The app on a real socket while the block runs; its base URL."""
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(front.__serve_build_asgi_app__(), log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    server.should_exit = True
    thread.join(5)


def check_error(answer: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    generation = answer.headers.get("X-Generation-Id")
    assert error.get("request_id") == generation  # in a field of its own, not in the text
    assert generation is None or generation not in error["message"]
    assert set(error) == {"message", "type", "param", "code"} | ({"request_id"} if generation else set())
    kind = {401: "authentication_error", 500: "server_error", 503: "server_error"}
    assert error["type"] == kind.get(status, "invalid_request_error")
    return str(error["message"])
