"""The order in which a GPU replica runs its ranges."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from deployments.replica import PlanOrder


def test_ranges_wait_for_the_one_before_and_pass_one_that_never_came() -> None:
    order, ran = PlanOrder(niceness=0), list[int]()
    with ThreadPoolExecutor(4) as pool:
        third = pool.submit(order.run_after, 4, 9, lambda: ran.append(9))
        first = pool.submit(order.run_after, -1, 2, lambda: ran.append(2))
        first.result(timeout=10)
        assert not third.done()
        order.skip(2, 4)  # its arguments were lost: it never comes
        third.result(timeout=10)
        order.skip(4, 9)  # ran and failed: nothing to pass
        pool.submit(order.run_after, 9, 11, lambda: ran.append(11)).result(timeout=10)
    assert ran == [2, 9, 11]


def test_a_range_that_waits_is_not_passed() -> None:
    order, ran = PlanOrder(niceness=0), list[int]()
    with ThreadPoolExecutor(4) as pool:
        second = pool.submit(order.run_after, 0, 1, lambda: ran.append(1))
        while not order._waiting:
            pass
        order.skip(0, 1)
        pool.submit(order.run_after, -1, 0, lambda: ran.append(0)).result(timeout=10)
        second.result(timeout=10)
    assert ran == [0, 1]
