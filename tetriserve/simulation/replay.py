"""Play a trace against a running server, open loop: arrivals never wait for answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tetriserve.chain import component_of
from tetriserve.client import CONNECT_TIMEOUT_S, ServerError, follows_environment, key_headers
from tetriserve.errors import ConfigError
from tetriserve.simulation.result import Executed, Outcome, shared_once
from tetriserve.simulation.trace import TraceRequest

DEFAULT_PROMPT = "a small red circle above a large blue square"


@dataclass
class Replay:
    """What a server made of a trace; times in seconds from the start of the replay.

    Attributes:
        schedule: from the servers' own records, so their clocks must agree with this machine's.
        errors: messages of the requests that ended with an error other than a lost deadline.
    """

    policy: str = ""
    n_gpus: int = 0
    plan_ms: tuple[float, float] = (0.0, 0.0)
    outcomes: list[Outcome] = field(default_factory=list)
    schedule: list[Executed] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def replay(url: str, trace: Sequence[TraceRequest], on_settled: Callable[[], object]) -> Replay:
    """Send every request at its time and wait for all answers.

    `on_settled` is called whenever one is answered. Raises `ServerError` when the server is not ready, `ConfigError`
    for a trace with clips, which the route for pictures does not make.
    """
    if clip := next((request for request in trace if request.num_frames > 1), None):
        raise ConfigError(f"request {clip.id}: num_frames {clip.num_frames}, over HTTP only 1 is served")
    return asyncio.run(_replay(url.rstrip("/"), trace, on_settled))


async def _replay(url: str, trace: Sequence[TraceRequest], on_settled: Callable[[], object]) -> Replay:
    # no limit of connections: a full pool would make arrivals wait
    limits = httpx.Limits(max_connections=None)
    timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
    async with httpx.AsyncClient(
        headers=key_headers(),
        base_url=url,
        limits=limits,
        timeout=timeout,
        trust_env=follows_environment(url),
    ) as client:
        await _cells(client)
        done = Replay()
        start_s, start_unix_s = time.monotonic(), time.time()

        async def one(request: TraceRequest) -> Outcome:
            await asyncio.sleep(start_s + request.arrival_s - time.monotonic())
            finish_s = alone_s = None
            try:
                response = await client.post("/v1/images/generations", json=_body(request))
                answer = response.json()
            except (httpx.HTTPError, ValueError) as error:
                done.errors.append(f"{request.id}: {error or type(error).__name__}")
            else:
                if response.status_code == 200:
                    finish_s = time.monotonic() - start_s
                    alone_s = _alone_s(request, answer["metrics"]["planned_with"])
                    done.schedule += _executed(request.id, answer, start_unix_s)
                elif answer["error"]["code"] != "deadline_infeasible":
                    done.errors.append(f"{request.id}: {answer['error']['message']}")
            on_settled()
            slo_s = float("inf") if request.slo_s is None else request.slo_s
            return Outcome(request.id, request.shape, request.arrival_s, slo_s, finish_s, alone_s)

        done.outcomes = list(await asyncio.gather(*(one(request) for request in trace)))
        done.schedule = shared_once(done.schedule)
        cells = await _cells(client)
        done.policy = cells[0]["policy"]
        done.n_gpus = sum(cell["gpus"] for cell in cells)
        done.plan_ms = max((cell["plan_ms_p50"], cell["plan_ms_p99"]) for cell in cells)
        return done


def _alone_s(request: TraceRequest, planned_with: dict[str, Any]) -> float:
    """Seconds that a request takes by itself, as the server's plans had it."""
    step_s: float = min(planned_with["step_s"].values())
    seconds: float = planned_with["encode_s"] + planned_with["decode_s"]
    return seconds + request.num_inference_steps * step_s


def _body(request: TraceRequest) -> dict[str, Any]:
    body = {
        "prompt": request.prompt or DEFAULT_PROMPT,
        "size": f"{request.width}x{request.height}",
        "num_inference_steps": request.num_inference_steps,
        "seed": request.seed,
        "slo_ms": None if request.slo_s is None else 1000 * request.slo_s,
        "priority": request.priority,
        "drop_late": request.drop_late,
        "model": request.model,
    }
    return {name: value for name, value in body.items() if value is not None}


def _executed(request_id: str, answer: dict[str, Any], start_unix_s: float) -> list[Executed]:
    return [
        Executed(
            start_s=part["start_s"] - start_unix_s,
            end_s=part["end_s"] - start_unix_s,
            gpus=tuple(part["gpus"]),
            request_ids=(request_id,),
            steps=part["steps"],
            kind=part["kind"],
            component=component_of(answer["model"], part["kind"]),
        )
        for part in answer["metrics"]["schedule"]
    ]


async def _cells(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """The cells of a ready server."""
    try:
        health = (await client.get("/health")).json()
        cells: list[dict[str, Any]] = health["cells"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        raise ServerError(f"no answer from {client.base_url}: {error or type(error).__name__}") from None
    if health["status"] != "ready":
        raise ServerError(f"{client.base_url} is not ready: {health['reason']}")
    return cells
