"""Groups are built when all members have come, and a meeting that cannot take place is called off."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from tetriserve.engine.groups import GroupTable, open_store

SET = (0, 1)


@pytest.fixture
def tables() -> Iterator[list[GroupTable]]:
    port, store = open_store()
    tables = [GroupTable(gpu, torch.device("cpu")) for gpu in SET]
    for table in tables:
        table.join(0, port)
    yield tables
    for table in tables:
        table.close()
    del store


def start(table: GroupTable, seq: int) -> Future[object]:
    """Ask for the group in a thread; a hang there must not keep the test from ending."""
    future: Future[object] = Future()

    def ask() -> None:
        try:
            future.set_result(table.group(SET, 0, seq))
        except RuntimeError as error:
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
    with pytest.raises(RuntimeError, match="range 7 was called off"):
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
    with ThreadPoolExecutor(2) as pool:
        sent = [torch.tensor([gpu, gpu + 10.0]) for gpu in SET]
        got = list(
            pool.map(lambda gpu: tables[gpu].group(SET, 0, 5).all_to_all(sent[gpu], [1, 1], [1, 1]), SET)
        )
    assert [each.tolist() for each in got] == [[0.0, 1.0], [10.0, 11.0]]
