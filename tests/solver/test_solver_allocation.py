"""Deadline-aware allocation against brute force over all degree assignments."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solver.allocation import step_table

STEP_TIMES = st.dictionaries(
    st.sampled_from([1, 2, 3, 4, 6, 8]), st.floats(0.01, 2.0), min_size=1, max_size=4
)


def assignments(step_s: dict[int, float], steps: int) -> list[tuple[float, float, int]]:
    """(GPU-seconds, seconds, number of degrees) of every way to give each step a degree."""
    return [
        (sum(d * step_s[d] for d in way), sum(step_s[d] for d in way), len(set(way)))
        for way in itertools.combinations_with_replacement(step_s, steps)
    ]


@settings(max_examples=200, deadline=None)
@given(step_s=STEP_TIMES, steps=st.integers(1, 6), share=st.floats(0.0, 1.3))
def test_cheapest_equals_brute_force(step_s: dict[int, float], steps: int, share: float) -> None:
    budget_s = steps * (min(step_s.values()) * (1 - share) + max(step_s.values()) * share)
    fitting = [way for way in assignments(step_s, steps) if way[1] <= budget_s + 1e-9]
    mix = step_table(step_s).cheapest(steps, budget_s)
    if not fitting:
        assert mix is None
        return
    assert mix is not None
    assert mix.seconds <= budget_s + 1e-6
    assert sum(count for _, count in mix.steps) == steps
    assert len(mix.steps) <= 2
    assert mix.seconds == pytest.approx(sum(count * step_s[d] for d, count in mix.steps))
    assert mix.gpu_seconds == pytest.approx(sum(d * count * step_s[d] for d, count in mix.steps))
    two_degrees = min(cost for cost, _, degrees in fitting if degrees <= 2)
    assert mix.gpu_seconds == pytest.approx(two_degrees, abs=1e-6)
    # whole steps at three degrees can fill the budget a little better, by less than one step's difference
    one_step = max(d * s for d, s in step_s.items()) - min(d * s for d, s in step_s.items())
    assert mix.gpu_seconds <= min(cost for cost, _, _ in fitting) + one_step + 1e-6


def test_paper_example_meets_the_deadline_just_so() -> None:
    table = step_table({1: 0.759796, 2: 0.420343, 4: 0.225908, 8: 0.124598})
    mix = table.cheapest(28, 5.0)
    assert mix is not None
    assert mix.steps == ((4, 14), (8, 14))
    assert mix.narrowest == 4
    single = table.narrowest_single(28, 5.0)
    assert single is not None and single.steps == ((8, 28),)
    assert table.narrowest_single(28, 1.0) is None


def test_no_deadline_takes_the_cheapest_degree() -> None:
    mix = step_table({1: 1.0, 2: 0.45, 4: 0.4}).cheapest(10, math.inf)
    assert mix is not None
    assert mix.steps == ((2, 10),)


def test_useless_degrees_and_free_steps() -> None:
    assert step_table({1: 0.022, 2: 0.034, 4: 0.03, 8: 0.02}).degrees == (1, 8)
    free = step_table({1: 0.0}).cheapest(1, 0.0)
    assert free is not None and free.gpu_seconds == 0.0
    with pytest.raises(ValueError, match="at least one degree"):
        step_table({})
