"""Ranges that several requests share, on real replicas in Ray's own processes; the scheduler runs in the test's."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import live_cell
import numpy as np
import pytest
import ray
import torch
import yaml
from diffusers import FluxPipeline
from model_folders import tiny_flux
from ray import cloudpickle

from deployments.cell import fleet
from deployments.cell.replica import GPUReplica
from deployments.cell.scheduler import Scheduler
from deployments.config import AppArgs
from deployments.local import start_ray
from tetriserve.errors import Cancelled, GenerationFailed
from tetriserve.request import GenerateRequest, GenerateResult

SIZES = [(128, 128), (112, 208), (256, 64), (192, 144), (128, 128), (128, 192)]
STEPS = [6, 8, 5, 7, 9, 6]
ALONE = {1: 0.4, 2: 0.35}
PROFILE = {
    "model": "tiny-flux",
    "device": "CPU",
    "source": "made up: steps cost what they cost, however many share them",
    "degrees": [1, 2],
    "step_seconds": {"128x128": ALONE},
    "batch_floor_seconds": ALONE,
    "batch_step_seconds": {"128x128": {1: 0.02, 2: 0.015}},
}


class TouchyReplica(GPUReplica):
    """Some prompts do not take company, or anything, well."""

    def _load(self) -> None:
        super()._load()
        adapter = self._engine.adapter
        step = adapter.step_together

        def touchy_step(states: list[Any]) -> list[torch.Tensor]:
            prompts = [state.request.prompt for state in states]
            if "fat" in prompts and len(states) > 1:
                torch.empty(1 << 60)
            if "broken" in prompts:
                raise ValueError("something is broken")
            made = step(states)
            for state in states:
                if state.request.prompt == "no numbers" and state.step == 3:
                    state.latents = state.latents * float("nan")
            return made

        adapter.step_together = touchy_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tiny_flux(tmp_path_factory.mktemp("batches") / "tiny-flux")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    start_ray(3)
    yield folder
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[[int], np.ndarray]:
    """The picture of request `i`, by the plain pipeline."""
    torch.set_num_threads(1)
    plain = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    made: dict[int, np.ndarray] = {}

    def get(i: int) -> np.ndarray:
        if i not in made:
            height, width = SIZES[i]
            picture = plain(
                f"a star {i}",
                height=height,
                width=width,
                num_inference_steps=STEPS[i],
                guidance_scale=3.5,
                max_sequence_length=30,
                generator=torch.Generator().manual_seed(i),
            ).images[0]
            made[i] = np.asarray(picture).astype(int)
        return made[i]

    return get


@pytest.fixture(autouse=True)
def touchy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "GPUReplica", TouchyReplica)


def on_a_cell(
    folder: Path, work: Callable[[Scheduler], Coroutine[Any, Any, None]], max_batch: int = 8
) -> None:
    """Do `work` on two replicas."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(PROFILE))
    args = AppArgs.parse(
        {
            "model": {"path": str(folder), "dtype": "float32", "max_sequence_length": 30},
            "cell": {"gpus": 2, "device": "cpu", "cpus_per_replica": 0.5, "max_losses": 100},
            "scheduler": {"max_batch": max_batch},
            "profile": {"path": str(file), "correct": False},
        }
    )
    live_cell.on_a_cell(args, work)


async def generated(scheduler: Scheduler, i: int, prompt: str = "", name: str = "") -> GenerateResult:
    height, width = SIZES[i]
    request = GenerateRequest(
        prompt or f"a star {i}",
        height,
        width,
        STEPS[i],
        3.5,
        seed=i,
        request_id=name or f"r{i}",
        slo_s=120,
    )
    return await scheduler.generate(request, "call")


async def looked_after(scheduler: Scheduler) -> None:
    while True:
        await scheduler.check_health()
        await asyncio.sleep(0.2)


async def all_of(scheduler: Scheduler, *calls: Any) -> list[Any]:
    looking = asyncio.create_task(looked_after(scheduler))
    try:
        return await asyncio.gather(*calls, return_exceptions=True)
    finally:
        looking.cancel()


async def check(results: list[Any], expected: Callable[[int], np.ndarray]) -> None:
    for i, result in enumerate(results):
        assert isinstance(result, GenerateResult), result
        assert np.abs((await result.image).astype(int) - expected(i)).max() <= 1
        assert sum(part.steps for part in result.metrics.steps) == STEPS[i]


def shared(results: list[GenerateResult]) -> int:
    """Ranges that were shared."""
    return sum(ran.shared_with > 0 for result in results for ran in result.metrics.schedule)


def test_ranges_are_shared_and_pictures_are_those_of_lone_requests(folder: Path, expected) -> None:
    async def run(scheduler: Scheduler) -> None:
        calls = [generated(scheduler, i) for i in range(6)]
        results = await all_of(scheduler, *calls)
        await check(results, expected)
        assert shared(results) >= 6
        for result in results:
            for ran in result.metrics.schedule:
                assert ran.kind == "denoise" or not ran.shared_with
                assert 0 <= ran.shared_with <= 5 and ran.others + ran.shared_with <= 5
        text = {family.name: family for family in await scheduler.metrics()}
        several = [s for s in text["tetriserve_shared_steps"].samples if s.labels.get("requests") != "1"]
        assert sum(sample.value for sample in several) > 0
        # their members are gone, so nothing is held any more
        assert await scheduler._state.fleet[0].held.remote() == 0

    on_a_cell(folder, run)


def test_no_batches_where_none_are_wanted(folder: Path, expected) -> None:
    async def run(scheduler: Scheduler) -> None:
        results = await all_of(scheduler, *[generated(scheduler, i) for i in range(4)])
        await check(results, expected)
        assert shared(results) == 0

    on_a_cell(folder, run, max_batch=1)


@pytest.mark.slow
def test_what_happens_to_one_member_is_nothing_to_the_others(folder: Path, expected) -> None:
    """A replica that dies, a call that is given up, latents that are no numbers, memory that is short for several, an
    error that only one of them makes."""

    async def together(scheduler: Scheduler, *names: str) -> None:
        def is_shared(assignment: Any) -> bool:
            return assignment.is_shared and all(
                any(one.startswith(f"{name}#") for one in assignment.request_ids) for name in names
            )

        for _ in range(3000):
            if any(map(is_shared, scheduler._state.rounds.running)):
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{names} never shared a range")

    async def run(scheduler: Scheduler) -> None:
        async def kill() -> None:
            await together(scheduler)
            (gpu, *_) = next(a.gpus for a in scheduler._state.rounds.running if a.is_shared)
            ray.kill(scheduler._state.fleet[gpu])

        *results, _ = await all_of(scheduler, *[generated(scheduler, i) for i in range(6)], kill())
        await check(results, expected)
        assert any(result.metrics.lost for result in results)

        async def give_up() -> None:
            await together(scheduler, "gone")
            assert await scheduler.cancel("gone", "call")

        calls = [generated(scheduler, i) for i in range(5)]
        *results, gone, _ = await all_of(scheduler, *calls, generated(scheduler, 5, name="gone"), give_up())
        await check(results, expected)
        assert isinstance(gone, Cancelled)

        calls = [generated(scheduler, i) for i in range(5)]
        *results, ill = await all_of(scheduler, *calls, generated(scheduler, 5, "no numbers", "ill"))
        await check(results, expected)
        assert isinstance(ill, GenerationFailed) and "not finite" in ill.message

        calls = [generated(scheduler, i) for i in range(5)]
        *results, broken = await all_of(scheduler, *calls, generated(scheduler, 5, "broken", "broken"))
        await check(results, expected)
        assert isinstance(broken, GenerationFailed) and "something is broken" in broken.message

        calls = [generated(scheduler, i) for i in range(5)]
        *results, fat = await all_of(scheduler, *calls, generated(scheduler, 5, "fat", "fat"))
        await check(results, expected)
        assert isinstance(fat, GenerateResult)
        assert scheduler._state.rounds.max_batch < 8

    on_a_cell(folder, run)
