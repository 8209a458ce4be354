"""GPUs of a cell of three or four are killed while the others work in groups without them: real replicas in Ray's own
processes, slowed down; the scheduler runs in the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from model_folders import tiny_flux
from ray import cloudpickle

from deployments.cell import fleet
from deployments.cell.replica import THREADS, GPUReplica
from deployments.cell.scheduler import Scheduler
from deployments.config import AppArgs
from deployments.local import start_ray
from tetriserve.engine.environment import ENVIRONMENT
from tetriserve.errors import GenerationFailed
from tetriserve.request import GenerateRequest, GenerateResult

STEPS = 12
STEP_S = 0.1


class SlowReplica(GPUReplica):
    """A step takes `STEP_S`; some prompts ask for an exbibyte at degree 2."""

    def _load(self) -> None:
        super()._load()
        adapter = self._engine.adapter
        step = adapter.step_together

        def slow_step(states: list[Any]) -> list[torch.Tensor]:
            (state,) = states
            time.sleep(STEP_S)
            group = adapter._parallel[0]._group
            if state.request.prompt == "too large for two" and group is not None and group.degree == 2:
                torch.empty(1 << 60)
            if state.request.prompt == "not on GPU 1" and self._gpu == 1:
                raise ValueError("GPU 1 does not like it")
            return step(states)

        adapter.step_together = slow_step

    def warm(self, sets: tuple[tuple[int, ...], ...], seq: int) -> None:
        blow = Path(self._args.model.path) / "blow-to-the-first"
        with contextlib.suppress(FileNotFoundError):
            number = int(blow.read_text())
            blow.unlink()
            os.kill(os.getpid(), number)
            threading.Event().wait()  # a stop reaches this thread only when the main thread has taken the signal
        super().warm(sets, seq)

    def pid(self) -> int:
        return os.getpid()

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def occupy(self, until: Path) -> None:
        """The engine is in a long range; the call waits for its end."""

        def stand() -> None:
            while not until.exists():
                time.sleep(0.01)

        self._order.run(stand)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("lost")
    tiny_flux(root / "tiny-flux")
    # the replicas' processes do not find this module by its name
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    start_ray(5)
    yield root
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@contextlib.asynccontextmanager
async def cell(root: Path, gpus: int, step_s: dict[int, float]) -> AsyncIterator[Scheduler]:
    """A cell that is looked after as Serve does it; `step_s` are the seconds of a step that it reckons with."""
    profile = {
        "model": "tiny-flux",
        "device": "CPU",
        "source": "made up",
        "degrees": list(step_s),
        "step_seconds": {"256x256": step_s},
    }
    (root / "profile.yaml").write_text(yaml.safe_dump(profile))
    args = AppArgs.parse(
        {
            "model": {
                "path": str(root / "tiny-flux"),
                "dtype": "float32",
                "max_sequence_length": 30,
            },
            "cell": {
                "gpus": gpus,
                "degrees": list(step_s),
                "device": "cpu",
                "cpus_per_replica": 0.5,
                "step_timeout_floor_s": 60,
                "max_losses": 100,
                "load_timeout_s": 45,
            },
            "profile": {"path": str(root / "profile.yaml"), "correct": False},
        }
    )
    group = ray.util.placement_group(args.cell.bundles)
    await group.ready()
    scheduler = Scheduler(args, group)
    await scheduler.start()

    async def look_after() -> None:
        while True:
            await scheduler.check_health()
            await asyncio.sleep(0.3)

    looking = asyncio.create_task(look_after())
    try:
        yield scheduler
    finally:
        looking.cancel()
        ray.util.remove_placement_group(group)  # ends the replicas too


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true"
        await asyncio.sleep(0.02)


def start(scheduler: Scheduler, prompt: str, seed: int) -> asyncio.Task[GenerateResult]:
    request = GenerateRequest(
        prompt,
        256,
        256,
        num_inference_steps=STEPS,
        seed=seed,
        request_id=f"{prompt} {seed}",
        slo_s=6.0,  # degree 1 takes 12 s
    )
    return asyncio.create_task(scheduler.generate(request, "call"))


async def kill(scheduler: Scheduler, gpu: int) -> None:
    os.kill(await scheduler._state.fleet[gpu].pid.remote(), signal.SIGKILL)
    await until(lambda: gpu in scheduler._state.lost)


def works_on(scheduler: Scheduler, gpus: tuple[int, ...]) -> Callable[[], bool]:
    return lambda: any(a.gpus == gpus and a.kind == "denoise" for a in scheduler._state.rounds.running)


def check(results: list[GenerateResult], victims: set[int]) -> None:
    """All done, and each lost at most the range it was in and the one sent out behind it, of a GPU that died or was
    short of memory."""
    for result in results:
        metrics = result.metrics
        assert sum(part.steps for part in metrics.steps) == STEPS
        assert len(metrics.lost) <= 2 * len(victims), metrics.lost
        if metrics.lost:
            assert victims & set(metrics.lost[0].gpus), metrics.lost


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "GPUReplica", SlowReplica)


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_a_replica_that_fails_while_the_groups_are_built_is_started_again(
    root: Path, blow: signal.Signals
) -> None:
    """The first that comes to build dies or hangs there; the cell starts all the same, and all work together."""

    async def run() -> None:
        marker = root / "tiny-flux" / "blow-to-the-first"
        marker.write_text(str(blow.value))
        async with cell(root, 3, {1: 10 * STEP_S, 3: STEP_S}) as scheduler:
            assert not marker.exists()
            answer = start(scheduler, "together", 0)
            await until(works_on(scheduler, (0, 1, 2)))
            check([await answer], set())

    asyncio.run(run())


@pytest.mark.long
def test_four_gpus_any_dies_and_the_rest_build_a_group_that_was_not_there(root: Path) -> None:
    """Threes are built when they are needed first, here while a GPU is dead."""

    async def run() -> None:
        async with cell(root, 4, {1: 10 * STEP_S, 3: STEP_S}) as scheduler:
            for victim, others in ((0, (1, 2, 3)), (3, (0, 1, 2))):
                await kill(scheduler, victim)
                answers = [start(scheduler, f"without {victim}", seed) for seed in range(3)]
                await until(works_on(scheduler, others))
                assert victim in scheduler._state.lost, "it came back too soon to show anything"
                check(list(await asyncio.gather(*answers)), set())
                await until(lambda: not scheduler._state.lost)
            answers = [start(scheduler, "killed", seed) for seed in range(3)]
            await until(works_on(scheduler, (0, 1, 2)))
            await kill(scheduler, 1)
            check(list(await asyncio.gather(*answers)), {1})

    asyncio.run(run())


@pytest.mark.slow
def test_three_gpus_a_torn_group_is_built_anew_while_the_third_is_dead(root: Path) -> None:
    """A request that is short of memory at degree 2 tears the group of GPUs 0 and 1 down, and waits for GPU 2."""

    async def run() -> None:
        async with cell(root, 3, {1: 10 * STEP_S, 2: STEP_S, 3: STEP_S}) as scheduler:
            await kill(scheduler, 2)
            await until(lambda: not scheduler._state.lost)
            await kill(scheduler, 2)
            large = start(scheduler, "too large for two", 0)
            await until(lambda: any(entry.lost for entry in scheduler._requests.entries.values()))
            assert scheduler._state.lost == {2}, "it came back too soon to show anything"
            others = [start(scheduler, "small", seed) for seed in range(3)]
            await until(works_on(scheduler, (0, 1)))
            check(list(await asyncio.gather(*others)), {2})
            check([await large], {0, 1})

    asyncio.run(run())


@pytest.mark.slow
def test_the_member_that_failed_is_heard_not_the_ones_that_waited_for_it(root: Path) -> None:
    async def run() -> None:
        async with cell(root, 2, {1: 10 * STEP_S, 2: STEP_S}) as scheduler:
            pids = [await scheduler._state.fleet[gpu].pid.remote() for gpu in range(2)]
            with pytest.raises(GenerationFailed, match="ValueError: GPU 1 does not like it"):
                await start(scheduler, "not on GPU 1", 0)
            check([await start(scheduler, "another", 0)], set())
            assert pids == [await scheduler._state.fleet[gpu].pid.remote() for gpu in range(2)]

    asyncio.run(run())


def test_a_replica_answers_however_many_calls_wait_for_its_engine(root: Path, tmp_path: Path) -> None:
    async def run() -> None:
        async with cell(root, 2, {1: STEP_S, 2: STEP_S}) as scheduler:
            replica, over = scheduler._state.fleet[0], tmp_path / "over"
            standing = [replica.occupy.remote(over) for _ in range(2 * THREADS)]
            freed = [replica.release.remote(f"request {number}") for number in range(31)]
            assert await scheduler._state.fleet.silent([0]) == set()
            await asyncio.wait_for(asyncio.gather(*freed), 10)
            await asyncio.wait_for(replica.leave.remote((0, 1), 7), 10)
            over.touch()
            await asyncio.wait_for(asyncio.gather(*standing), 60)
            assert ENVIRONMENT.items() <= (await replica.environment.remote()).items()

    asyncio.run(run())
