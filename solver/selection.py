"""The ILP: which requests can be on time together, by their demand for GPU-seconds (packing.md).

    maximise    sum_i w_i z_i
    subject to  sum over d_i <= d of c_i z_i  <=  capacity(d)      for the watched deadlines d
                sum over i in C of z_i        <=  |C| - 1          for every cut C
                z_i in {0, 1}

c_i is the cost in GPU-seconds of the cheapest mix that fits the deadline. The dearer candidate mixes of
packing.md cannot enter an optimum of this model: they relax no row, so they matter for the completion only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import pulp

MAX_DEADLINES = 8
SET_ASIDE_COST = 0.02
WORK_COST = 0.25
"""Weight of a request's share of all the work: 0.2 for room it takes from others, 0.05 as cost of its GPU-seconds."""
PRIORITY_GAIN = 0.01
LEFT_BEHIND = "tetriserve-solver-left-behind"
"""Name of a solver thread that did not come back in time."""


@dataclass(frozen=True)
class Demand:
    """One request as the ILP sees it: finite deadline, GPU-seconds it needs until then."""

    deadline_s: float
    gpu_seconds: float
    set_aside: bool = False
    priority: int = 0


@dataclass(frozen=True)
class Selection:
    """A choice of requests by their index, and what it is worth."""

    objective: float
    chosen: frozenset[int]


def weights(demands: Sequence[Demand]) -> list[float]:
    """What it is worth to have each request on time: about 1, less for the dear and for those already set aside.

    Sticking to last round's victims keeps a plan from changing them until nobody is on time.
    """
    total = sum(demand.gpu_seconds for demand in demands) or 1.0
    ranks = {p: rank for rank, p in enumerate(sorted({demand.priority for demand in demands}))}
    return [
        1.0
        - SET_ASIDE_COST * demand.set_aside
        - WORK_COST * demand.gpu_seconds / total
        + PRIORITY_GAIN * ranks[demand.priority] / len(ranks)
        for demand in demands
    ]


def watched_deadlines(demands: Sequence[Demand]) -> list[float]:
    """At most eight of the deadlines, evenly thinned, the last one always among them."""
    distinct = sorted({demand.deadline_s for demand in demands})
    if len(distinct) <= MAX_DEADLINES:
        return distinct
    return [distinct[(i + 1) * len(distinct) // MAX_DEADLINES - 1] for i in range(MAX_DEADLINES)]


def select(
    demands: Sequence[Demand],
    capacity: Callable[[float], float],
    *,
    cuts: Sequence[Collection[int]] = (),
    time_limit_s: float = 0.05,
) -> Selection | None:
    """The best selection, or the best found within the limit; None when the solver brought none.

    Args:
        capacity: GPU-seconds free between now and a deadline.
        cuts: sets of indices that cannot all be on time.
    """
    worth = weights(demands)
    problem = pulp.LpProblem("selection", pulp.LpMaximize)
    z = [pulp.LpVariable(f"z{i}", cat=pulp.LpBinary) for i in range(len(demands))]
    problem += pulp.LpAffineExpression(list(zip(z, worth, strict=True)))
    for deadline_s in watched_deadlines(demands):
        due = [(z[i], d.gpu_seconds) for i, d in enumerate(demands) if d.deadline_s <= deadline_s]
        problem += pulp.LpAffineExpression(due) <= max(0.0, capacity(deadline_s))
    for cut in cuts:
        problem += pulp.LpAffineExpression([(z[i], 1) for i in cut]) <= len(cut) - 1
    if not _solve(problem, time_limit_s):
        return None
    values = [variable.varValue for variable in z]
    if any(value is None for value in values) or not problem.valid(eps=1e-6):
        return None
    chosen = frozenset(i for i, value in enumerate(values) if value > 0.5)
    return Selection(sum(worth[i] for i in chosen), chosen)


def _solve(problem: pulp.LpProblem, time_limit_s: float) -> bool:
    """Run the solver; False when it failed or did not come back in time.

    HiGHS has been seen to hang past its own limit (packing.md), so it runs beside us and is left behind then.
    """
    if any(thread.name == LEFT_BEHIND for thread in threading.enumerate()):
        return False  # do not pile up more of them
    solved: list[int] = []
    thread = threading.Thread(target=_call_solver, args=(problem, time_limit_s, solved), daemon=True)
    thread.start()
    thread.join(2 * time_limit_s + 0.01)
    if thread.is_alive():
        thread.name = LEFT_BEHIND
        return False
    return bool(solved) and solved[0] == pulp.LpStatusOptimal


def _call_solver(problem: pulp.LpProblem, time_limit_s: float, solved: list[int]) -> None:
    try:
        solved.append(problem.solve(_solver(time_limit_s)))
    except Exception:  # whatever the solver trips over, the caller has a plan without it
        return


def _solver(time_limit_s: float) -> pulp.LpSolver:
    highs = pulp.HiGHS(msg=False, timeLimit=time_limit_s, threads=1)
    if highs.available():
        return highs
    return pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit_s, threads=1)
