"""The scheduler actor's planning without a cluster: the board never waits for the brain (promise 5)."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deployments.cell.planner import Planner
from deployments.cell.scheduler import Scheduler
from deployments.config import AppArgs
from deployments.logs import logger
from solver.problem import Job, Packing, Phase, Snapshot
from tetriserve.engine.report import Report
from tetriserve.errors import DeadlineInfeasible, NotReady, Overloaded
from tetriserve.model_info import ModelInfo
from tetriserve.profile import Profile
from tetriserve.request import GenerateRequest, Progress, Shape
from tetriserve.scheduler.assignment import Assignment
from tetriserve.scheduler.live_profile import LiveProfile
from tetriserve.scheduler.rounds import RoundScheduler

ARGS = AppArgs.parse({"cell": {"gpus": 2, "device": "cpu"}})

INFO = ModelInfo("m", "flux", 16, 16, 64, 4, "true_cfg_scale", 4096, 1 << 20, 2048, 8, 200, 3.5, 100)

SNAPSHOT = Snapshot(
    now_s=0.0,
    round_s=1.0,
    free_at_s=(0.0, 0.0),
    jobs=(Job("a", 0.0, 10.0, 0.0, (Phase("denoise", 4, {1: 0.5, 2: 0.3}),)),),
)


class Hanging:
    """A solver that does not come back before it is let go."""

    name = "hanging"
    round_steps = 1.0
    replans_on_arrival = True

    def __init__(self) -> None:
        self.go = threading.Event()
        self.asked = 0

    def __call__(self, snapshot: Snapshot) -> Packing:
        self.asked += 1
        self.go.wait(60)
        return Packing(())


class Failing(Hanging):
    def __call__(self, snapshot: Snapshot) -> Packing:
        raise RuntimeError("the solver broke")


def test_a_hanging_solver_is_replaced_by_the_fallback_and_not_asked_again_meanwhile() -> None:
    policy = Hanging()

    async def run() -> None:
        planner = Planner(policy, limit_s=0.1)
        for _ in range(3):
            packing, fell_back = await asyncio.wait_for(planner.pack(SNAPSHOT), 10)
            assert fell_back and packing.entries[0].job_ids[0] == "a"
        assert (policy.asked, planner.fallbacks) == (1, 3)
        policy.go.set()
        await asyncio.sleep(0.2)
        assert await planner.pack(SNAPSHOT) == (Packing(()), False)
        assert (policy.asked, planner.fallbacks) == (2, 3)

    asyncio.run(run())


def test_a_failing_solver_is_replaced_by_the_fallback() -> None:
    async def run() -> None:
        planner = Planner(Failing(), limit_s=0.1)
        packing, fell_back = await planner.pack(SNAPSHOT)
        assert fell_back and packing.entries
        assert planner.fallbacks == 1

    asyncio.run(run())


def ready(**settings: Any) -> Scheduler:
    """A cell with one client's key that admits and never plans."""
    args = {"cell": {"gpus": 2, "device": "cpu"}, "http": {"api_keys_env": "X"}, "scheduler": settings}
    scheduler = Scheduler(AppArgs.parse(args), None)  # type: ignore[arg-type]
    scheduler._state.failure, scheduler._state.info = "", INFO
    scheduler._state.profile = LiveProfile(Profile("m", "d", "made up", (1,), {Shape(256, 256): {1: 0.5}}))
    scheduler._state.rounds = RoundScheduler(Hanging(), 2)
    return scheduler


def test_the_flood_of_a_client_is_refused_and_the_next_client_is_not() -> None:
    async def run() -> None:
        scheduler = ready(max_open_requests=16)
        numbers = itertools.count()

        def ask(client: str | None, **more: Any) -> None:
            identity = f"r{next(numbers)}"
            request = GenerateRequest("a", 256, 256, 4, seed=0, request_id=identity, client=client, **more)
            scheduler._requests.join(request, "call")

        for _ in range(14):
            ask("a")
        with pytest.raises(
            Overloaded, match="14 requests of this client are open, its share is 14, and the"
        ) as full:
            ask("a")
        assert full.value.retry_after_s > 1 and full.value.code == "queue_full"
        ask("b")
        ask(None)
        with pytest.raises(Overloaded, match="16 requests are open, allowed are 16"):
            ask("b")
        ask("b", attempt=1)  # another cell had accepted it

        scheduler = ready(max_open_requests=16, max_open_per_client=2)
        for client in ("a", "a", "b"):
            ask(client)
        with pytest.raises(Overloaded, match="2 requests of this client are open, allowed are 2"):
            ask("a")
        assert await scheduler.cancel(next(iter(scheduler._requests.named)), "call")
        ask("a")

    asyncio.run(run())


@pytest.mark.parametrize("default", [False, True])
def test_what_is_too_late_is_dropped_as_the_request_or_else_the_cell_wants(default: bool) -> None:
    async def run() -> None:
        scheduler = ready(drop_late=default)
        for asked in (None, False, True):
            name = f"asked {asked}"
            request = GenerateRequest("a", 256, 256, 4, seed=0, slo_s=1.0, drop_late=asked, request_id=name)
            scheduler._requests.join(request, "call")
        expired = scheduler._state.rounds.expired(time.monotonic() + 60)
        dropped = {scheduler._requests.entries[identity].name for identity in expired}
        assert dropped == {"asked True"} | ({"asked None"} if default else set())

    asyncio.run(run())


def test_the_deadline_that_a_refusal_names_has_the_way_back_in_it() -> None:
    """Two seconds of steps, a tenth of the budget to spare, and 0.4 s from the cell to the client."""

    async def run() -> None:
        scheduler = ready()
        request = GenerateRequest("a", 256, 256, 4, seed=0, slo_s=1.0, request_id="a", way_back_s=0.4)
        entry = scheduler._requests.join(request, "call")
        snapshot = scheduler._state.rounds.snapshot(time.monotonic())
        (job,) = snapshot.jobs
        await scheduler._offer(job, replace(snapshot, jobs=()))
        refusal = entry.result.exception()
        assert isinstance(refusal, DeadlineInfeasible) and refusal.earliest_slo_s is not None
        assert 2.0 / 0.9 + 0.4 <= refusal.earliest_slo_s < 3.0
        assert f"{refusal.earliest_slo_s:g} s" in refusal.message

    asyncio.run(run())


def test_a_cell_that_is_starting_is_not_ready() -> None:
    async def run() -> None:
        scheduler = Scheduler(ARGS, None)  # type: ignore[arg-type]
        with pytest.raises(NotReady, match="starting"):
            await scheduler.generate(GenerateRequest("a", request_id="a", seed=0), "call")
        status = await scheduler.status()
        assert not status.ready and status.reason == "starting"
        await scheduler.check_health()  # starting is not broken

    asyncio.run(run())


def test_a_request_has_two_lines_in_the_log_and_its_prompt_is_in_none(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        scheduler = ready()
        asked = GenerateRequest("a secret circle", 256, 512, 8, seed=0, request_id="a", slo_s=5.0)
        entry = scheduler._requests.join(asked, "call")
        assert scheduler._requests.join(replace(asked, repeatable=True, request_id="b"), "one")
        part = Assignment(0, (entry.id,), "denoise", (0,), 0, 8, 0.0, 1.0, (-1,))
        entry.record(part, [Report(0.0, 1.0, 0.0, 0)])
        scheduler._requests.end(entry, entry.finish("picture", entry.arrival_s + 5.5, INFO))
        await scheduler.cancel("b", "one")

    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    with caplog.at_level(logging.INFO, logger.name):
        asyncio.run(run())
    assert [record.tetriserve_request_id for record in caplog.records] == ["a", "b", "a", "b"]
    accepted, _, late, cancelled = caplog.messages
    assert accepted == "request a accepted: 256x512 (step times interpolated), 8 steps, deadline 5.000 s"
    assert late == "request a ended: late after 5.500 s"
    assert cancelled.startswith("request b ended: cancelled after 0.")
    outcomes = [getattr(record, "tetriserve_outcome", None) for record in caplog.records]
    assert outcomes == [None, None, "late", "cancelled"]
    assert "secret" not in caplog.text


def test_a_stream_begins_with_the_first_plan_and_skips_what_its_reader_was_too_slow_for() -> None:
    async def run() -> None:
        scheduler = ready()
        request = GenerateRequest("a", 256, 256, 8, seed=0, request_id="a", previews=2)
        items = scheduler.stream(request, "call")
        first = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0.01)
        (entry,) = scheduler._requests.entries.values()
        entry.predict(math.inf)  # a plan without a GPU
        await asyncio.sleep(0.01)
        assert not first.done()
        entry.predict(entry.arrival_s + 4.0)
        entry.predict(entry.arrival_s + 9.0)
        assert await first == Progress("a", "queue", 0, 8)

        def ran(steps: int, preview: int | None = None) -> None:
            shown = None if preview is None else np.full((32, 32, 3), preview, np.uint8)
            part = Assignment(0, (entry.id,), "denoise", (0,), (0,), steps, 0.0, 1.0, (-1,))
            entry.record(part, [Report(0.0, 1.0, 0.0, 0, (shown,))])

        ran(1, 40)
        item = await anext(items)
        assert item.steps_done == 1 and item.preview[0, 0, 0] == 40
        assert 0 < item.predicted_finish_s < math.inf
        ran(2)
        item = await anext(items)
        assert item.steps_done == 3 and item.preview is None  # it was shown
        ran(1, 80)
        ran(1)
        item = await anext(items)
        assert item.steps_done == 5 and item.preview[0, 0, 0] == 80
        result = entry.finish("picture", entry.arrival_s + 5.0, INFO)
        assert result.metrics.predicted_s == pytest.approx(4.0)
        scheduler._requests.end(entry, result)
        assert [item async for item in items] == [result]

    asyncio.run(run())
