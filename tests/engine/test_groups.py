"""Groups are built when all members have come; a meeting that cannot take place is called off; a group can be left
from any thread at any moment."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from tetriserve.engine import groups
from tetriserve.engine.groups import GroupTable
from tetriserve.engine.report import GivenUp

CPU = torch.device("cpu")
SET = (0, 1)


@pytest.fixture
def tables(tmp_path: Path) -> Iterator[list[GroupTable]]:
    tables = [GroupTable(gpu, CPU, tmp_path) for gpu in SET]
    yield tables
    for table in tables:
        table.close()


def start(table: GroupTable, seq: int, gpus: tuple[int, ...] = SET) -> Future[Any]:
    """Ask for the group in a thread; a hang there must not keep the test from ending."""
    future: Future[Any] = Future()

    def ask() -> None:
        try:
            future.set_result(table.group(gpus, seq))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return future


@pytest.mark.parametrize("early", [True, False], ids=["before the range begins", "while it waits"])
def test_nobody_waits_for_a_member_that_will_not_come(tables: list[GroupTable], early: bool) -> None:
    if early:
        tables[0].call_off(7)
    waiting = start(tables[0], 7)
    if not early:
        time.sleep(0.2)
        tables[0].call_off(6)  # another range
        time.sleep(0.2)
        assert not waiting.done()
        tables[0].call_off(7)
    with pytest.raises(GivenUp, match="range 7 was called off"):
        waiting.result(timeout=10)
    built = [start(table, 8) for table in tables]
    assert all(group.result(timeout=60).gpus == SET for group in built)


def test_a_member_may_come_late_and_a_group_is_used_again(tables: list[GroupTable]) -> None:
    first = start(tables[0], 3)
    time.sleep(0.5)
    assert not first.done()
    start(tables[1], 3).result(timeout=60)
    built = first.result(timeout=60)
    assert start(tables[0], 4).result(timeout=60) is built
    assert exchanged(tables, 5) == [[0.0, 1.0], [10.0, 11.0]]


def exchanged(tables: list[GroupTable], seq: int) -> list[list[float]]:
    """What each member of `SET` has after an exchange of two numbers of its own."""

    def exchange(gpu: int) -> list[float]:
        group = tables[gpu].group(SET, seq)
        assert group is not None
        return group.all_to_all(torch.tensor([gpu, gpu + 10.0]), [1, 1], [1, 1]).tolist()

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(exchange, SET))


def member(gpu: int, folder: Path, pipe: Any) -> None:
    """A GPU in a process of its own; builds the groups it is asked for."""
    table = GroupTable(gpu, CPU, folder)
    while True:
        table.group(*pipe.recv())
        pipe.send("built")


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_whoever_dies_the_others_build_what_they_need(tmp_path: Path, victim: int) -> None:
    """Three GPUs were in a group; one is killed, and the others build the group of the two that are left."""
    context = mp.get_context("spawn")
    pipes, processes = [], []
    for gpu in range(3):
        ours, theirs = context.Pipe()
        process = context.Process(target=member, args=(gpu, tmp_path, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)

    def build(gpus: tuple[int, ...], seq: int) -> list[str]:
        for gpu in gpus:
            pipes[gpu].send((gpus, seq))
        return [pipes[gpu].recv() if pipes[gpu].poll(60) else "silence" for gpu in gpus]

    assert build((0, 1, 2), 1) == ["built"] * 3
    processes[victim].kill()
    processes[victim].join()
    rest = tuple(gpu for gpu in range(3) if gpu != victim)
    assert build(rest, 2) == ["built"] * 2
    for gpu in rest:
        processes[gpu].kill()


def meet_and_die(folder: Path) -> None:
    """Comes to the meeting and is killed before it connects."""
    table = GroupTable(1, CPU, folder)
    table._backend = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    table.group(SET, 1)


def test_a_member_that_dies_between_meeting_and_connecting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "BUILD_TIMEOUT_S", 3.0)
    process = mp.get_context("spawn").Process(target=meet_and_die, args=(tmp_path,), daemon=True)
    process.start()
    with pytest.raises(GivenUp, match="could not build their group"):
        start(GroupTable(0, CPU, tmp_path), 1).result(timeout=60)
    process.join()


class Hanging:
    """Stands for NCCL, whose exchange waits for a member until the group is left from another thread."""

    def __init__(self, *_: object) -> None:
        self.entered, self.aborted = threading.Event(), threading.Event()

    def alltoall_base(self, *_: object) -> None:
        self.entered.set()
        if not self.aborted.wait(60):
            raise AssertionError("nobody left")
        raise RuntimeError("NCCL communicator was aborted")

    def abort(self) -> None:
        self.aborted.set()


def test_a_group_can_be_left_before_its_first_exchange_is_over(
    tables: list[GroupTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Hanging()
    monkeypatch.setattr(tables[0], "_backend", lambda *_: backend)
    start(tables[1], 9)
    waiting = start(tables[0], 9)
    assert backend.entered.wait(60)
    tables[0].call_off(9)
    tables[0].leave(SET, 9)
    with pytest.raises(GivenUp, match="was aborted"):
        waiting.result(timeout=10)
    assert tables[0]._groups == {}


def test_a_group_that_was_left_says_so(tables: list[GroupTable]) -> None:
    _, built = (future.result(timeout=60) for future in [start(table, 1) for table in reversed(tables)])
    tables[0].leave(SET, 1)
    with pytest.raises(GivenUp, match=r"the group of GPUs \(0, 1\) was left"):
        built.agree(CPU)
    built.close()  # twice does no harm


def test_groups_are_left_and_dropped_from_many_threads_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody trips over another, each group is closed, and nothing is left."""
    table, closed = GroupTable(0, CPU, tmp_path), []
    sets = [(0, other) for other in range(1, 200)]

    class Backend:
        def abort(self) -> None:
            closed.append(self)

    for seq, gpus in enumerate(sets):
        table._groups[gpus] = groups.SPGroup(gpus, 0, Backend(), seq)
    begin = threading.Barrier(8)

    def tear(kind: int) -> None:
        begin.wait()
        for seq, gpus in enumerate(sets):
            if kind % 2:
                table.leave(gpus, seq)
            else:
                table.drop(gpus[1])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(tear, range(8)))
    assert len(closed) == len(sets) and table._groups == {}
