"""The ILP: which requests can be on time together, by their demand for GPU-seconds (packing.md).

    maximise    sum_i w_i z_i
    subject to  sum over d_i <= d of c_i z_i  <=  capacity(d)      for the watched deadlines d
                z_i in {0, 1}

c_i is the cost in GPU-seconds of the cheapest mix that fits the deadline. The dearer candidate mixes of
packing.md cannot enter an optimum of this model: they relax no row, so they matter for the completion only.

Up to `CORE` requests this is solved as it stands. Of more, the relaxation decides most: all but as many columns as
there are rows come out whole. Whole numbers are then only asked of the `CORE` requests that are fractional or nearest
to a change of mind by their reduced cost; this loses a few hundredths of a request and saves nine tenths of the time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import pulp

MAX_DEADLINES = 8
SET_ASIDE_COST = 0.02
WORK_COST = 0.25
"""Weight of a request's share of all the work: 0.2 for room it takes from others, 0.05 as cost of its GPU-seconds."""
PRIORITY_GAIN = 0.01
CORE = 12
WHOLE = 1e-6
JOIN_S = 0.002
"""The solver may come back this much after its limit; it looks at its clock only now and then."""
LEFT_BEHIND = "tetriserve-solver-left-behind"
"""Name of a solver thread that did not come back in time."""


Row = tuple[dict[int, float], float]


@dataclass(frozen=True)
class Demand:
    """One request as the ILP sees it: finite deadline, GPU-seconds it needs until then, what it is worth on time."""

    deadline_s: float
    gpu_seconds: float
    set_aside: bool = False
    priority: int = 0
    weight: float = 1.0


@dataclass(frozen=True)
class Selection:
    """A choice of requests by their index, and what it is worth."""

    objective: float
    chosen: frozenset[int]


def weights(demands: Sequence[Demand]) -> list[float]:
    """What it is worth to have each request on time: about its weight, less for the dear and those already set aside.

    Sticking to last round's victims keeps a plan from changing them until nobody is on time.
    """
    total = sum(demand.gpu_seconds for demand in demands) or 1.0
    ranks = {p: rank for rank, p in enumerate(sorted({demand.priority for demand in demands}))}
    return [
        demand.weight
        * (
            1.0
            - SET_ASIDE_COST * demand.set_aside
            - WORK_COST * demand.gpu_seconds / total
            + PRIORITY_GAIN * ranks[demand.priority] / len(ranks)
        )
        for demand in demands
    ]


def watched_deadlines(demands: Sequence[Demand]) -> list[float]:
    """At most eight of the deadlines, evenly thinned, the last one always among them."""
    distinct = sorted({demand.deadline_s for demand in demands})
    if len(distinct) <= MAX_DEADLINES:
        return distinct
    return [distinct[(i + 1) * len(distinct) // MAX_DEADLINES - 1] for i in range(MAX_DEADLINES)]


def _rows(demands: Sequence[Demand], capacity: Callable[[float], float]) -> list[Row]:
    """Coefficients by request and the upper bound: a row per watched deadline."""
    return [
        (
            {i: d.gpu_seconds for i, d in enumerate(demands) if d.deadline_s <= deadline_s},
            max(0.0, capacity(deadline_s)),
        )
        for deadline_s in watched_deadlines(demands)
    ]


def select(
    demands: Sequence[Demand],
    capacity: Callable[[float], float],
    *,
    time_limit_s: float = 0.05,
) -> Selection | None:
    """The best selection, or the best found within the limit; None when the solver brought none.

    Args:
        capacity: GPU-seconds free between now and a deadline.
    """
    stop_s = time.perf_counter() + time_limit_s
    worth = weights(demands)
    rows = _rows(demands, capacity)
    chosen = _beside(worth, rows, stop_s)
    if chosen is None or not _fits(rows, chosen):
        return None
    return Selection(sum(worth[i] for i in chosen), chosen)


def fits_all(demands: Sequence[Demand], capacity: Callable[[float], float]) -> bool:
    """Whether there is room for everybody as far as the model can see."""
    return all(
        sum([d.gpu_seconds for d in demands if d.deadline_s <= deadline_s]) <= max(0.0, capacity(deadline_s))
        for deadline_s in watched_deadlines(demands)
    )


def _fits(rows: Sequence[Row], chosen: Collection[int]) -> bool:
    return all(sum(row.get(i, 0.0) for i in chosen) <= bound + WHOLE for row, bound in rows)


def _beside(worth: Sequence[float], rows: Sequence[Row], stop_s: float) -> frozenset[int] | None:
    """Run the solver; None when it failed or did not come back in time.

    HiGHS has been seen to hang past its own limit (packing.md), so it runs beside us and is left behind then.
    """
    if any(thread.name == LEFT_BEHIND for thread in threading.enumerate()):
        return None  # do not pile up more of them
    solved: list[frozenset[int]] = []

    def call() -> None:
        try:
            solved.append(_solve(worth, rows, stop_s))
        except Exception:  # whatever the solver trips over, the caller has a plan without it
            return

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(max(0.0, stop_s - time.perf_counter()) + JOIN_S)
    if thread.is_alive():
        thread.name = LEFT_BEHIND
        return None
    return solved[0] if solved else None


def _solve(worth: Sequence[float], rows: Sequence[Row], stop_s: float) -> frozenset[int]:
    """Relax, then ask for whole numbers where the relaxation leaves doubt. Raises PulpSolverError on failure."""
    core, fixed = list(range(len(worth))), frozenset[int]()
    if len(core) > CORE:
        relaxed = _optimum(worth, rows, core, fixed, pulp.LpContinuous, stop_s)
        doubt = sorted((min(abs(z.varValue), abs(1 - z.varValue)) <= WHOLE, abs(z.dj), i) for i, z in relaxed)
        core = sorted(i for _, _, i in doubt[:CORE])
        fixed = frozenset(i for i, z in relaxed if z.varValue > 0.5).difference(core)
    whole = _optimum(worth, rows, core, fixed, pulp.LpBinary, stop_s)
    return fixed.union(i for i, z in whole if z.varValue > 0.5)


def _optimum(
    worth: Sequence[float],
    rows: Sequence[Row],
    free: Sequence[int],
    fixed: Collection[int],
    category: str,
    stop_s: float,
) -> list[tuple[int, pulp.LpVariable]]:
    """The free columns at their best with the fixed ones chosen. Raises PulpSolverError when there is none."""
    problem = pulp.LpProblem("selection", pulp.LpMaximize)
    z = {i: pulp.LpVariable(f"z{i}", 0, 1, category) for i in free}
    problem += pulp.LpAffineExpression([(z[i], worth[i]) for i in free])
    for row, bound in rows:
        left = bound - sum(row.get(i, 0.0) for i in fixed)
        problem += pulp.LpAffineExpression([(z[i], row[i]) for i in free if i in row]) <= left
    status = problem.solve(_solver(max(1e-3, stop_s - time.perf_counter())))
    if status != pulp.LpStatusOptimal or any(one.varValue is None for one in z.values()):
        raise pulp.PulpSolverError(f"no solution: {pulp.LpStatus[status]}")
    return list(z.items())


def _solver(time_limit_s: float) -> pulp.LpSolver:
    highs = pulp.HiGHS(msg=False, timeLimit=time_limit_s, threads=1)
    if highs.available():
        return highs
    return pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit_s, threads=1)
