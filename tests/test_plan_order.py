"""The order in which a GPU replica runs its ranges."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from deployments.replica import PlanOrder


def fail() -> None:
    raise ValueError("this range failed")


def test_ranges_wait_for_the_one_before_also_when_that_one_failed() -> None:
    order, ran = PlanOrder(niceness=0), list[int]()
    with ThreadPoolExecutor(4) as pool:
        third = pool.submit(order.run_after, 4, 9, lambda: ran.append(9))
        first = pool.submit(order.run_after, -1, 2, lambda: ran.append(2))
        first.result(timeout=10)
        assert not third.done()
        with pytest.raises(ValueError, match="this range failed"):
            pool.submit(order.run_after, 2, 4, fail).result(timeout=10)
        third.result(timeout=10)
    assert ran == [2, 9]
