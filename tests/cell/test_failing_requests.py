"""Requests that fail by themselves, and what requests leave behind, end to end: real replicas in Ray's own
processes, whose steps ask the allocator for more than there is or break their device; the scheduler runs in the
test's process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from model_folders import tiny_flux
from ray import cloudpickle
from ray.util.placement_group import PlacementGroup

from deployments.cell import fleet
from deployments.cell.profiling import measured_profile
from deployments.cell.replica import GPUReplica
from deployments.cell.scheduler import Scheduler
from deployments.config import AppArgs, ProfileArgs
from deployments.local import start_ray
from tetriserve.errors import GenerationFailed, OutOfMemory
from tetriserve.request import GenerateRequest, GenerateResult, Shape

TOO_LARGE_FOR_TWO = Shape(512, 512)

PROFILE = """
model: tiny-flux
device: CPU
source: made up
degrees: [1, 2]
step_seconds:
  256x256: {1: 0.02, 2: 0.03}
"""


class FailingReplica(GPUReplica):
    """Asks for an exbibyte in the steps of some prompts: at degree 1, at any degree on GPU 1, in decode.

    For two others its device breaks: always, and once; for another a library says what sounds like it.
    """

    def _load(self) -> None:
        super()._load()
        adapter = self._engine.adapter
        step, decode = adapter.step_together, adapter.decode

        def broken(*_: object) -> None:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        marker = Path(self._args.model.path) / "was-unlucky"

        def greedy_step(states: list[Any]) -> list[torch.Tensor]:
            state = states[0]  # a batch that is measured has several alike
            group = adapter._parallel[0]._group
            degree = 1 if group is None else group.degree
            prompt = state.request.prompt
            fails_alone = prompt == "too large for one" and degree == 1
            fails_always = prompt == "too large for all" and (degree == 1 or self._gpu == 1)
            if state.step >= 2 and (fails_alone or fails_always):
                torch.empty(1 << 60)
            if prompt == "poison" or (prompt == "unlucky" and not marker.exists()):
                if prompt == "unlucky":
                    marker.touch()
                self._engine.abandon = broken
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            if prompt == "not supported":
                raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx(...)`")
            if state.request.shape == TOO_LARGE_FOR_TWO and degree == 2 and self._gpu == 1:
                torch.empty(1 << 60)
            return step(states)

        def greedy_decode(request: GenerateRequest, latents: torch.Tensor) -> np.ndarray:
            if request.prompt == "too large to decode":
                torch.empty(1 << 60)
            return decode(request, latents)

        adapter.step_together, adapter.decode = greedy_step, greedy_decode

    def still_held(self) -> list[str]:
        """Requests that still take memory here."""
        return self._order.run(lambda: sorted({*self._engine._states, *self._engine._conditioning}))


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppArgs]:
    root = tmp_path_factory.mktemp("memory")
    (root / "profile.yaml").write_text(PROFILE)
    # the replicas' processes do not find this module by its name
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    start_ray(3)
    yield AppArgs.parse(
        {
            "model": {
                "path": str(tiny_flux(root / "tiny-flux")),
                "dtype": "float32",
                "max_sequence_length": 30,
            },
            "cell": {"gpus": 2, "device": "cpu", "step_timeout_floor_s": 60},
            "profile": {"path": str(root / "profile.yaml")},
        }
    )
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def request(prompt: str, seed: int) -> GenerateRequest:
    return GenerateRequest(
        prompt, 256, 256, num_inference_steps=12, seed=seed, request_id=f"{prompt} {seed}", slo_s=60.0
    )


@pytest.fixture
def group(args: AppArgs, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlacementGroup]:
    monkeypatch.setattr(fleet, "GPUReplica", FailingReplica)
    group = ray.util.placement_group(args.cell.bundles)
    ray.get(group.ready(), timeout=60)
    yield group
    ray.util.remove_placement_group(group)  # ends the replicas too


def test_out_of_memory_ends_or_widens_its_request_only(args: AppArgs, group: PlacementGroup) -> None:
    async def run() -> None:
        scheduler = Scheduler(args, group)
        await scheduler.start()

        def made(asked: GenerateRequest) -> Coroutine[Any, Any, GenerateResult]:
            return scheduler.generate(asked, "call")

        wide = [request("too large for one", seed) for seed in range(2)]
        hopeless = [request("too large for all", seed) for seed in range(2)]
        undecodable = request("too large to decode", 0)
        small = [request("small", seed) for seed in range(4)]
        crowd = [*wide, *hopeless, undecodable, *small]
        results = await asyncio.gather(*map(made, crowd), return_exceptions=True)
        answers = dict(zip(crowd, results, strict=True))

        for asked in wide:
            answer = answers[asked]
            assert isinstance(answer, GenerateResult), answer
            assert sum(part.steps for part in answer.metrics.steps) == 12
            assert answer.metrics.steps[-1].degree == 2
        for asked in [*hopeless, undecodable]:
            answer = answers[asked]
            assert isinstance(answer, OutOfMemory), answer
            assert "ran out of memory: " in answer.message and "can't allocate memory" in answer.message
        assert "decode" in answers[undecodable].message

        status = await scheduler.status()
        assert (status.gpus_ready, status.open_requests) == (2, 0)
        for _ in range(100):
            held = await asyncio.gather(
                *(scheduler._state.fleet[gpu].still_held.remote() for gpu in range(2))
            )
            if held == [[], []]:
                break
            await asyncio.sleep(0.05)
        assert held == [[], []]

        for asked in small:  # beside the failures and after them: the same picture
            beside = answers[asked]
            assert isinstance(beside, GenerateResult), beside
            after = await made(asked)
            difference = (await beside.image).astype(int) - (await after.image).astype(int)
            assert np.abs(difference).max() <= 1

    asyncio.run(run())


@pytest.mark.slow
def test_an_error_of_a_library_ends_its_request_and_not_the_replica(
    args: AppArgs, group: PlacementGroup
) -> None:
    async def run() -> None:
        scheduler = Scheduler(args, group)
        await scheduler.start()
        for seed in range(3):
            with pytest.raises(
                GenerationFailed, match="RuntimeError: CUDA error: CUBLAS_STATUS_NOT_SUPPORTED"
            ):
                await scheduler.generate(request("not supported", seed), "call")
        assert isinstance(await scheduler.generate(request("small", 0), "call"), GenerateResult)
        assert scheduler._state.lost == set()
        assert all(len(losses) == 0 for losses in scheduler._recovery._losses.values())

    asyncio.run(run())


@pytest.mark.slow
def test_a_shape_and_degree_without_memory_is_left_out_of_the_profile(
    args: AppArgs, group: PlacementGroup
) -> None:
    """Only GPU 1 is short: GPU 0, which waits for it in an exchange, goes on too."""
    shapes = ("256x256", str(TOO_LARGE_FOR_TWO))
    measured = args.model_copy(update={"profile": ProfileArgs(shapes=shapes, repeats=1)})

    async def run() -> None:
        replicas, seen = fleet.Fleet(measured, group), list[tuple[Shape, int]]()
        await replicas.start()
        profile = await measured_profile(
            measured, replicas, lambda shape, degree, _: seen.append((shape, degree))
        )
        small = Shape(256, 256)
        assert seen == [(small, 1), (small, 2), (TOO_LARGE_FOR_TWO, 1)]
        assert {s: set(times) for s, times in profile.step_seconds.items()} == {
            small: {1, 2},
            TOO_LARGE_FOR_TWO: {1},
        }
        assert [await replicas[gpu].still_held.remote() for gpu in range(2)] == [[], []]
        await replicas.measure(small, 2)  # and together again

    asyncio.run(run())


@pytest.mark.slow
def test_a_broken_device_ends_its_replica_and_no_request_takes_them_all(
    args: AppArgs, group: PlacementGroup
) -> None:
    async def run() -> None:
        scheduler = Scheduler(args, group)
        await scheduler.start()
        small = [request("small", seed) for seed in range(2)]
        crowd = [request("poison", 0), request("unlucky", 0), *small]
        answers = await asyncio.gather(
            *(scheduler.generate(asked, "call") for asked in crowd), return_exceptions=True
        )
        poison, unlucky, *beside = answers
        assert isinstance(poison, GenerationFailed)
        assert "in 3 of its step ranges replicas died or lost each other" in poison.message
        assert isinstance(unlucky, GenerateResult) and len(unlucky.metrics.lost) >= 1, unlucky
        assert all(isinstance(answer, GenerateResult) for answer in beside), beside
        for _ in range(300):
            status = await scheduler.status()
            if status.gpus_ready == 2:
                break
            await asyncio.sleep(0.1)
        assert (status.gpus_ready, status.cordoned, status.open_requests) == (2, (), 0)

    asyncio.run(run())


@pytest.mark.slow
def test_small_pictures_do_not_stay_in_the_memory_of_the_scheduler(
    args: AppArgs, group: PlacementGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are sent inside of messages, and the last to let go of them is the ingress."""
    monkeypatch.setattr("deployments.cell.requests.HAND_OVER_S", 1.0)

    @ray.remote(num_cpus=0)
    class Reader:
        def read(self, box: list[Any]) -> int:
            self._box = box  # still held when the answer arrives
            return int(ray.get(box[0]).nbytes)

        def let_go(self) -> None:
            del self._box

    async def run() -> None:
        scheduler, reader = Scheduler(args, group), Reader.remote()
        await scheduler.start()
        core = ray._private.worker.global_worker.core_worker
        before = core.get_memory_store_size()
        for seed in range(5):
            asked = GenerateRequest(
                "small", 128, 128, num_inference_steps=2, seed=seed, request_id=f"tiny {seed}"
            )
            result = await scheduler.generate(asked, "call")
            assert await reader.read.remote([result.image]) < 100_000
            del result
            await reader.let_go.remote()
        await asyncio.sleep(1.5)
        await scheduler.generate(request("small", 0), "call")
        for _ in range(100):
            if core.get_memory_store_size() - before < 5:
                break
            await asyncio.sleep(0.05)
        assert core.get_memory_store_size() - before < 5

    asyncio.run(run())
