"""A replica dies, or a client goes away, in each phase of a request: real processes, real HTTP.

Every request ends with the picture that it has when it runs alone and undisturbed, and the server is whole again. A
blow that is aimed by the clock is repeated until `metrics.lost` shows that it hit the phase it was meant for.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from live_server import Server, body, pixels, wait_until, write_config
from PIL import Image

pytestmark = pytest.mark.timeout(900)  # most of it is the patience of a busy machine

ATTEMPTS = 6
TIMEOUT_S = 200

LARGE = body("1024x1024", 1, num_inference_steps=16)
LONG_DECODE = body("1024x1024", 2, num_inference_steps=2)

PROFILE = {
    "model": "tiny-flux",
    "device": "CPU, one thread",
    "source": "made up, so that small pictures take one GPU and large ones two",
    "degrees": [1, 2],
    "step_seconds": {
        "256x256": {1: 0.012, 2: 0.014},
        "512x512": {1: 0.05, 2: 0.035},
        "1024x1024": {1: 0.4, 2: 0.22},
    },
    "encode_seconds": {"256x256": 0.02, "512x512": 0.02, "1024x1024": 0.02},
    "decode_seconds": {"256x256": 0.05, "512x512": 0.14, "1024x1024": 0.8},
}


class Lab:
    """A server, its undisturbed answers, and requests in flight."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._alone: dict[str, dict[str, Any]] = {}
        self._pool = ThreadPoolExecutor(16)

    def post(self, item: dict[str, Any]) -> dict[str, Any]:
        """The answer, with `sent_s`, Unix seconds."""
        sent_s = time.time()
        response = httpx.post(f"{self.server.url}/v1/images/generations", json=item, timeout=TIMEOUT_S)
        assert response.status_code == 200, response.text[:300]
        return {**response.json(), "sent_s": sent_s}

    def start(self, *items: dict[str, Any]) -> list[Future[dict[str, Any]]]:
        return [self._pool.submit(self.post, item) for item in items]

    def alone(self, item: dict[str, Any]) -> dict[str, Any]:
        """What it comes to when nothing else happens; asked for once."""
        if repr(item) not in self._alone:
            self._alone[repr(item)] = self.post(item)
        return self._alone[repr(item)]

    def check(self, *items: dict[str, Any], answers: list[Future[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The answers have their pictures and the server is at rest and whole again; returns their metrics."""
        done = [answer.result(timeout=TIMEOUT_S) for answer in answers]
        self.wait_until_whole()
        for item, answer in zip(items, done, strict=True):
            expected = pixels(self.alone(item)["data"][0]).astype(int)
            assert np.abs(pixels(answer["data"][0]).astype(int) - expected).max() <= 1
        self.wait_until_whole()
        return [answer["metrics"] for answer in done]

    def wait_until_whole(self) -> None:
        def whole() -> bool:
            cell = self.cell()
            gauges = (cell["gpus_ready"], cell["open_requests"], cell["running"], cell["held"])
            # a replica that died idle counts as ready until the next health check
            return gauges == (2, 0, 0, 0) and len(self.server.replicas()) == 2

        wait_until(whole, seconds=120)

    def cell(self) -> dict[str, Any]:
        """What /health says of the cell; on a busy machine it may not answer in time."""
        cells: list[dict[str, Any]] = []

        def answered() -> bool:
            cells[:] = self.server.health()["cells"]
            return bool(cells)

        wait_until(answered, seconds=60)
        return cells[0]

    def of_gpu_0(self) -> psutil.Process:
        """The replica of GPU 0, which encodes and decodes for a lone request: the one that works longer for it."""
        replicas = self.server.replicas()
        before_s = [work_s(replica) for replica in replicas]
        metrics = self.post(LONG_DECODE)["metrics"]
        took_s = [work_s(replica) - before for replica, before in zip(replicas, before_s, strict=True)]
        assert [part["gpus"] for part in metrics["schedule"] if part["kind"] == "decode"] == [[0]]
        return replicas[int(np.argmax(took_s))]

    def decodes(self, decoder: psutil.Process) -> Callable[[], bool]:
        """Says whether a lone large request, sent after this call, is in decode: one replica works, the other,
        which took part in the denoising, does not any more."""
        (other,) = (replica for replica in self.server.replicas() if replica != decoder)
        start_s = work_s(other)

        def now() -> bool:
            before_s = work_s(decoder), work_s(other)
            time.sleep(0.1)
            return work_s(decoder) > before_s[0] and work_s(other) == before_s[1] > start_s + 0.1

        return now


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    server = Server(
        write_config(
            tmp_path_factory.mktemp("faults"), PROFILE, ingresses=2, max_losses=100, step_timeout_floor_s=60
        )
    )
    yield Lab(server)
    server.stop()


def work_s(process: psutil.Process) -> float:
    """CPU seconds that it has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def until_hit(attempt: Callable[[int], bool]) -> None:
    """Try until the blow fell where it should."""
    assert any(attempt(number) for number in range(ATTEMPTS)), f"{ATTEMPTS} blows, none in the phase"


def lost(metrics: list[dict[str, Any]], kind: str, degree: int) -> bool:
    parts = [part for one in metrics for part in one["lost"]]
    return any(part["kind"] == kind and len(part["gpus"]) == degree for part in parts)


@contextlib.contextmanager
def standing(lab: Lab) -> Iterator[None]:
    """Both replicas stand still inside: what is sent to them is in flight until the end of the block."""
    replicas = lab.server.replicas()
    for replica in replicas:
        replica.suspend()
    try:
        yield
    finally:
        for replica in replicas:
            with contextlib.suppress(psutil.NoSuchProcess):
                replica.resume()


def leave_when(lab: Lab, item: dict[str, Any], condition: Callable[[], bool]) -> bool:
    """Send a request and hang up when the condition holds. False when the answer was there by then."""

    async def leave() -> bool:
        async with httpx.AsyncClient(base_url=lab.server.url, timeout=TIMEOUT_S) as client:
            answer = asyncio.create_task(client.post("/v1/images/generations", json=item))
            await asyncio.to_thread(wait_until, lambda: answer.done() or condition(), TIMEOUT_S)
            return answer.cancel()

    return asyncio.run(leave())


@pytest.mark.slow
def test_a_kill_in_encode(lab: Lab) -> None:
    """The range behind it is in flight too, on both GPUs as a rule: it must not hold up the one that lives on."""
    item = body("512x512", 3)

    def attempt(_: int) -> bool:
        victim = lab.of_gpu_0()
        (other,) = set(lab.server.replicas()) - {victim}
        with standing(lab):
            answers = lab.start(item)
            wait_until(lambda: lab.cell()["running"] > 1)
            victim.kill()
        metrics = lab.check(item, answers=answers)
        assert other in lab.server.replicas()
        return lost(metrics, "encode", 1)

    until_hit(attempt)


@pytest.mark.slow
def test_a_kill_in_denoising_at_degree_1(lab: Lab) -> None:
    """Four small requests at once share the GPUs one each."""
    load = [body("256x256", seed, num_inference_steps=50) for seed in range(4)]

    def attempt(number: int) -> bool:
        answers = lab.start(*load)
        time.sleep(0.6 + 0.2 * number)
        lab.server.replicas()[number % 2].kill()
        return lost(lab.check(*load, answers=answers), "denoise", 1)

    until_hit(attempt)


def test_a_kill_in_denoising_at_degree_2(lab: Lab) -> None:
    def attempt(number: int) -> bool:
        answers = lab.start(LARGE)
        time.sleep(1.0 + 0.2 * number)
        lab.server.replicas()[number % 2].kill()
        return lost(lab.check(LARGE, answers=answers), "denoise", 2)

    until_hit(attempt)


@pytest.mark.slow
def test_a_kill_between_two_ranges(lab: Lab) -> None:
    """A request that waits for its next range while the replica that ran the last one dies."""
    patient = body("1024x1024", 4, num_inference_steps=8, slo_ms=60_000)
    urgent = [body("512x512", seed, num_inference_steps=10, slo_ms=2500) for seed in range(4)]

    def attempt(number: int) -> bool:
        victim = lab.of_gpu_0()
        answers = lab.start(patient)
        time.sleep(1.0)
        answers += lab.start(*urgent)
        time.sleep(0.6 + 0.2 * number)
        victim.kill()
        struck_s = time.time()

        def waits(metrics: dict[str, Any]) -> bool:
            """Whether it did when the blow fell, after a range on GPU 0."""
            return any(
                0 in before["gpus"] and before["end_s"] < struck_s < after["start_s"]
                for before, after in itertools.pairwise(metrics["schedule"])
            )

        return any(map(waits, lab.check(patient, *urgent, answers=answers)))

    until_hit(attempt)


@pytest.mark.slow
def test_a_kill_in_decode(lab: Lab) -> None:
    def attempt(_: int) -> bool:
        victim = lab.of_gpu_0()
        decodes = lab.decodes(victim)
        answers = lab.start(LONG_DECODE)
        wait_until(lambda: decodes() or answers[0].done(), TIMEOUT_S)
        victim.kill()
        return lost(lab.check(LONG_DECODE, answers=answers), "decode", 1)

    until_hit(attempt)


@pytest.mark.slow
def test_both_replicas_die_at_once(lab: Lab) -> None:
    load = [LARGE, *(body("512x512", seed) for seed in range(3))]

    def attempt(number: int) -> bool:
        answers = lab.start(*load)
        time.sleep(1.0 + 0.2 * number)
        for replica in lab.server.replicas():
            replica.kill()
        return any(one["lost"] for one in lab.check(*load, answers=answers))

    until_hit(attempt)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [pytest.param("the new replica", marks=pytest.mark.long), "the survivor"])
def test_a_kill_during_recovery(lab: Lab, victim: str) -> None:
    load = [LARGE, *(body("512x512", seed, num_inference_steps=20) for seed in range(3))]
    old = {replica.pid for replica in lab.server.replicas()}
    answers = lab.start(*load)
    time.sleep(1.0)
    lab.server.replicas()[0].kill()

    def loading() -> list[psutil.Process]:
        return [replica for replica in lab.server.replicas() if replica.pid not in old]

    wait_until(loading, seconds=60)
    if victim == "the new replica":
        loading()[0].kill()
    else:
        next(replica for replica in lab.server.replicas() if replica.pid in old).kill()
    assert lab.cell()["gpus_ready"] < 2
    assert any(one["lost"] for one in lab.check(*load, answers=answers))
    assert old.isdisjoint({replica.pid for replica in lab.server.replicas()}) is (victim == "the survivor")


def test_a_cancel_in_encode(lab: Lab) -> None:
    with standing(lab):
        assert leave_when(lab, body("512x512", 5), lambda: lab.cell()["running"] > 0)
        wait_until(lambda: lab.cell()["open_requests"] == 0)
    lab.check(LARGE, answers=lab.start(LARGE))


@pytest.mark.slow
def test_a_cancel_in_decode(lab: Lab) -> None:
    """Denoising is cancelled in test_serve.py."""
    until_hit(lambda _: leave_when(lab, LONG_DECODE, lab.decodes(lab.of_gpu_0())))
    wait_until(lambda: lab.cell()["open_requests"] == 0)
    lab.check(LARGE, answers=lab.start(LARGE))


@pytest.mark.slow
def test_pictures_behind_urls_outlive_the_front_that_gave_them(lab: Lab) -> None:
    """Two ingress processes; both die, one after the other, and what they gave out stays good."""
    (item,) = lab.post(body("256x256", 6, response_format="url"))["data"]
    expected = pixels(lab.alone(body("256x256", 6))["data"][0])

    def is_whole() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.get(item["url"], timeout=10)
            return answer.status_code == 200 and np.array_equal(
                np.asarray(Image.open(io.BytesIO(answer.content))), expected
            )
        return False

    for front in lab.server.ingresses():
        assert all(is_whole() for _ in range(5))
        front.kill()
        wait_until(lambda: len(lab.server.ingresses()) == 2, seconds=60)
        wait_until(lambda: all(is_whole() for _ in range(5)), seconds=60)
    (again,) = lab.post(body("256x256", 7, response_format="url"))["data"]
    assert again["url"] != item["url"]


@pytest.mark.long
def test_a_scheduler_that_stands_still_while_its_cell_starts(tmp_path: Path) -> None:
    """Serve does not look at a cell that is starting; the cell does."""
    config = write_config(tmp_path, PROFILE)
    me = psutil.Process()
    others = {process.pid for process in me.children(recursive=True)}
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(Server, config)
        stopped: list[psutil.Process] = []

        def found() -> bool:
            for process in me.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.pid not in others and "ray::Scheduler" in " ".join(process.cmdline()):
                        process.suspend()
                        stopped.append(process)
            return bool(stopped)

        wait_until(found, seconds=60)
        server = starting.result(timeout=TIMEOUT_S)
    try:
        assert not stopped[0].is_running() or stopped[0].status() == psutil.STATUS_ZOMBIE
        Lab(server).wait_until_whole()
    finally:
        server.stop()


@pytest.mark.slow
def test_a_gpu_that_is_lost_too_often_is_cordoned(tmp_path: Path) -> None:
    server = Server(write_config(tmp_path, PROFILE, max_losses=0, step_timeout_floor_s=60))
    try:
        check_cordon(Lab(server))
    finally:
        server.stop()


def check_cordon(lab: Lab) -> None:
    answer = lab.start(LARGE)[0]
    wait_until(lambda: lab.cell()["running"] > 0)
    lab.server.replicas()[0].kill()
    metrics = answer.result(timeout=TIMEOUT_S)["metrics"]
    (gpu,) = lab.cell()["cordoned"]
    assert lab.cell()["gpus_ready"] == 1
    after = [part["gpus"] for part in metrics["schedule"] if part["kind"] == "decode"]
    assert after == [[1 - gpu]]
    assert lab.post(LARGE)["metrics"]["steps"] == [
        {"steps": LARGE["num_inference_steps"], "degree": 1, "gpus": [1 - gpu]}
    ]
