"""The order in which a GPU replica runs its ranges."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from deployments.cell.plan_order import PlanOrder
from deployments.cell.replica import GPUReplica
from tetriserve.errors import GenerationFailed, OutOfMemory


def fail() -> None:
    raise ValueError("this range failed")


def test_ranges_wait_for_the_one_before_also_when_that_one_failed() -> None:
    order, ran = PlanOrder(niceness=0, dies=print), list[int]()
    with ThreadPoolExecutor(4) as pool:
        third = pool.submit(order.run_after, 4, 9, lambda: ran.append(9))
        first = pool.submit(order.run_after, -1, 2, lambda: ran.append(2))
        first.result(timeout=10)
        assert not third.done()
        with pytest.raises(ValueError, match="this range failed"):
            pool.submit(order.run_after, 2, 4, fail).result(timeout=10)
        third.result(timeout=10)
    assert ran == [2, 9]


def test_what_nobody_waits_for_runs_between_ranges() -> None:
    order, ran = PlanOrder(niceness=0, dies=print), list[str]()
    begun, over = threading.Event(), threading.Event()

    def long_range() -> None:
        begun.set()
        over.wait(10)
        ran.append("range")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(order.run_after, -1, 0, long_range)
        assert begun.wait(10)
        posted = order.post(lambda: ran.append("posted"))
        assert not posted.done()
        over.set()
        posted.result(timeout=10)
    assert ran == ["range", "posted"]


def test_an_engine_thread_that_dies_ends_its_process_and_says_why() -> None:
    """Cancelled from outside, a call's result has nowhere to go: the thread does not survive that."""
    program = """
import time
from deployments.cell.plan_order import PlanOrder
order = PlanOrder(niceness=0, dies=print)
order.post(lambda: time.sleep(0.5))
order.post(print).cancel()
time.sleep(60)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 1
    assert "the engine thread died" in ended.stderr and "InvalidStateError" in ended.stderr
    assert "InvalidStateError" in ended.stdout  # what the console of a starting server says


def test_a_priority_that_may_not_be_had_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.setpriority", refuse)
    assert PlanOrder(niceness=19, dies=print).run(lambda: 5) == 5


@pytest.mark.parametrize(
    ("says", "failure", "text"),
    [
        ("no such token: xylograph", GenerationFailed, "ValueError, its text quotes the request"),
        ("no such token", ValueError, "no such token"),
        ("CUDA out of memory", OutOfMemory, "CUDA out of memory"),  # whatever the prompt is about
    ],
)
def test_an_error_that_quotes_the_prompt_is_not_told(
    says: str, failure: type[Exception], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    replica, dropped = GPUReplica.__new__(GPUReplica), list[str]()
    replica._engine = SimpleNamespace(abandon=lambda request_id, *_: dropped.append(request_id))

    def encode() -> None:
        raise RuntimeError(says) if failure is OutOfMemory else ValueError(says)

    with pytest.raises(failure) as caught:
        replica._or_abandon(encode, "r", (0,), 0, "r", "encode", ("Xylograph in memory", None))
    assert (type(caught.value), str(caught.value), dropped) == (failure, text, ["r"])
    assert "xylograph" not in caplog.text.lower()
