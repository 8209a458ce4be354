"""The ILP against exhaustive enumeration, and what happens when the solver lets us down."""

from __future__ import annotations

import itertools
import time

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solver import selection
from solver.selection import Demand, select, watched_deadlines, weights

DEMANDS = st.lists(
    st.builds(
        Demand,
        deadline_s=st.floats(0.5, 6.0),
        gpu_seconds=st.floats(0.1, 12.0),
        set_aside=st.booleans(),
        priority=st.integers(0, 2),
    ),
    min_size=1,
    max_size=7,
)


def best_by_enumeration(demands: list[Demand], n_gpus: int) -> float:
    worth = weights(demands)
    best = 0.0
    for size in range(1, len(demands) + 1):
        for chosen in itertools.combinations(range(len(demands)), size):
            fits = all(
                sum(demands[i].gpu_seconds for i in chosen if demands[i].deadline_s <= d.deadline_s)
                <= n_gpus * d.deadline_s + 1e-7
                for d in demands
            )
            if fits:
                best = max(best, sum(worth[i] for i in chosen))
    return best


@settings(max_examples=150, deadline=None)
@given(demands=DEMANDS, n_gpus=st.integers(1, 4))
def test_objective_equals_enumeration(demands: list[Demand], n_gpus: int) -> None:
    found = select(demands, lambda d: n_gpus * d, time_limit_s=5.0)
    assert found is not None
    assert found.objective == pytest.approx(best_by_enumeration(demands, n_gpus), rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    costs=st.lists(st.lists(st.floats(0.1, 8.0), min_size=1, max_size=3), min_size=1, max_size=5),
    n_gpus=st.integers(1, 3),
)
def test_dearer_mixes_never_enter_an_optimum(costs: list[list[float]], n_gpus: int) -> None:
    """Blends of several candidate mixes (packing.md) are worth no more than the cheapest mix alone."""
    demands = [Demand(1.0 + i, min(mixes)) for i, mixes in enumerate(costs)]
    worth = weights(demands)
    problem = pulp.LpProblem("mixes", pulp.LpMaximize)
    z = [pulp.LpVariable(f"z{i}", cat=pulp.LpBinary) for i in range(len(costs))]
    x = [[pulp.LpVariable(f"x{i}_{m}", 0, 1) for m in range(len(mixes))] for i, mixes in enumerate(costs)]
    problem += pulp.lpSum(w * z_i for w, z_i in zip(worth, z, strict=True))
    for i in range(len(costs)):
        problem += pulp.lpSum(x[i]) == z[i]
        due = [cost * x_jm for j in range(i + 1) for cost, x_jm in zip(costs[j], x[j], strict=True)]
        problem += pulp.lpSum(due) <= n_gpus * (1.0 + i)
    problem.solve(pulp.PULP_CBC_CMD(msg=False))
    found = select(demands, lambda d: n_gpus * d, time_limit_s=5.0)
    assert found is not None
    assert found.objective == pytest.approx(pulp.value(problem.objective) or 0.0, rel=1e-3, abs=1e-6)


def test_thinned_deadlines_keep_the_last() -> None:
    demands = [Demand(float(i), 1.0) for i in range(1, 31)]
    watched = watched_deadlines(demands)
    assert len(watched) == selection.MAX_DEADLINES
    assert watched[-1] == 30.0
    assert watched == sorted(set(watched))


def test_victims_of_the_last_plan_stay_victims() -> None:
    for aside in range(3):
        demands = [Demand(1.0, 1.0, set_aside=i == aside) for i in range(3)]
        found = select(demands, lambda _: 2.0, time_limit_s=5.0)
        assert found is not None and found.chosen == frozenset(range(3)) - {aside}


def test_priority_breaks_ties() -> None:
    demands = [Demand(1.0, 1.0, priority=priority) for priority in (0, 5, 0)]
    found = select(demands, lambda _: 1.0, time_limit_s=5.0)
    assert found is not None and found.chosen == {1}


def test_a_solver_that_raises_brings_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: float) -> pulp.LpSolver:
        raise pulp.PulpSolverError("no licence")

    monkeypatch.setattr(selection, "_solver", broken)
    assert select([Demand(1.0, 1.0)], lambda _: 1.0) is None


def test_a_solver_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def hanging(_: float) -> pulp.LpSolver:
        time.sleep(0.5)
        return pulp.PULP_CBC_CMD(msg=False)

    monkeypatch.setattr(selection, "_solver", hanging)
    before = time.perf_counter()
    assert select([Demand(1.0, 1.0)], lambda _: 1.0, time_limit_s=0.02) is None
    assert select([Demand(1.0, 1.0)], lambda _: 1.0, time_limit_s=0.02) is None
    assert time.perf_counter() - before < 0.4
    monkeypatch.undo()
    deadline = time.perf_counter() + 10
    while select([Demand(1.0, 1.0)], lambda _: 1.0, time_limit_s=5.0) is None:
        assert time.perf_counter() < deadline, "the solver is not asked again after the one left behind ended"
        time.sleep(0.05)
