"""Clairvoyant upper bound on SLO attainment: a MILP on event-aligned windows that is provably a relaxation.

All arrivals are known. Time is cut at arrivals and deadlines into windows w of length l_w. Per request i: z_i, on
time or not; per window, seconds x_ikw at degree k:

    minimise    sum_i (1 - z_i)
    subject to  sum_kw x_ikw / T_i(k)  =  steps_i z_i         per phase of i: all its steps, in fractions
                sum_k x_ikw            <= o_iw z_i            o_iw: overlap of w with [arrival_i, deadline_i]
                sum_ik k x_ikw         <= N l_w
                z_i in {0, 1},  x >= 0

Why it is a relaxation: take any valid schedule and let x_ikw be the seconds that it spends in w on request i at
degree k, for the requests that it finishes on time, 0 for the others. Whole steps at their profiled times give the
first row; a request never runs twice at a time, nor before its arrival or, when on time, after its deadline, which
gives the second; no GPU runs two ranges at a time: the third. A step that several share counts for each with the
seconds that it takes alone, which are no more than it lasts, and with the GPU-seconds that it adds, which are no more
than it takes for all of them. So every schedule is a point of the model, with its requests on time as objective. Left
out, and so granted to the clairvoyant: whole steps, GPU sets, the order of phases, switching. A longer step than
profiled (switching cost) only takes more room; times below the profile (jitter) are outside the bound.

Two simplifications lose nothing or stay a relaxation. A degree above the lower convex hull of (seconds, GPU-seconds)
per step is left out: the mix of its hull neighbours takes no more of either in the same window. Where a trace has
too many windows, neighbours are merged; their rows are then sums of the rows they replace.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pulp

from solver.problem import Phase, least_work_s

DEADLINE_SLACK_S = 1e-6
"""Executed schedules are compared with deadlines up to rounding; the bound grants them the same."""
MAX_CELLS = 6000
"""Pairs of request and window in one model; with more, the shortest windows are merged."""


@dataclass(frozen=True)
class Known:
    """A request that the clairvoyant knows from the start; times in seconds."""

    arrival_s: float
    deadline_s: float
    phases: tuple[Phase, ...]

    @property
    def can_be_on_time(self) -> bool:
        return self.arrival_s + least_work_s(self.phases) <= self.deadline_s + DEADLINE_SLACK_S


@dataclass(frozen=True)
class Bound:
    """What no schedule can beat.

    Attributes:
        on_time: at most so many requests can be on time.
        found: so many are in the best point of the model that was found; below `on_time` if time ran out.
        gpu_seconds: no schedule with `found` or more on time spends less on those.
        chosen: the requests that are on time in that point.
    """

    requests: int
    on_time: int
    found: int
    gpu_seconds: float
    chosen: tuple[Known, ...] = ()

    @property
    def slo_attainment(self) -> float:
        return self.on_time / self.requests

    @property
    def is_optimal(self) -> bool:
        """The model was solved to its optimum; else `on_time` is the solver's dual bound, still valid."""
        return self.found == self.on_time


def clairvoyant_bound(
    requests: Sequence[Known],
    n_gpus: int,
    *,
    time_limit_s: float = 60.0,
    on_solved: Callable[[int], object] = lambda _: None,
) -> Bound:
    """Bound a trace.

    Args:
        time_limit_s: for all solver calls together; afterwards bounds are weaker, never wrong.
        on_solved: called with the number of requests that were settled since the last call.
    """
    hopeful = [request for request in requests if request.can_be_on_time]
    on_solved(len(requests) - len(hopeful))
    groups = sorted(independent_groups(hopeful), key=len)
    end_s = time.perf_counter() + time_limit_s
    on_time = found = 0
    gpu_seconds = 0.0
    chosen: list[Known] = []
    for index, group in enumerate(groups):
        # the small ones go first and leave most of their share to the large
        left_s = max(end_s - time.perf_counter(), 0.05) / (len(groups) - index)
        model = _Model(group, n_gpus)
        bound, best = model.most_on_time(left_s / 2)
        on_time, found = on_time + bound, found + best
        gpu_seconds += model.least_gpu_seconds(best, left_s / 2)
        chosen += [request for request, is_on_time in zip(group, model.on_time, strict=True) if is_on_time]
        on_solved(len(group))
    return Bound(len(requests), on_time, found, gpu_seconds, tuple(chosen))


def independent_groups(requests: Sequence[Known]) -> list[list[Known]]:
    """Split where nobody is between arrival and deadline: what comes after has nothing to do with what was before."""
    groups: list[list[Known]] = []
    busy_until_s = -math.inf
    for request in sorted(requests, key=lambda r: r.arrival_s):
        if request.arrival_s >= busy_until_s:
            groups.append([])
        groups[-1].append(request)
        busy_until_s = max(busy_until_s, request.deadline_s + DEADLINE_SLACK_S)
    return groups


def hull(phase: Phase, n_gpus: int) -> dict[int, tuple[float, float]]:
    """(seconds, GPU-seconds) of a step at the degrees on their lower convex hull, narrowest first.

    A step that may be shared costs no more GPU-seconds than it adds to a shared one, of which it is one of many.
    """
    kept: list[tuple[float, float, int]] = []
    costs = []
    for degree, step_s in phase.step_s.items():
        terms = phase.shared.get(degree) if phase.company else None
        costs.append((step_s, degree * (step_s if terms is None else min(step_s, terms.add_s)), degree))
    for seconds, cost, degree in sorted(one for one in costs if one[2] <= n_gpus):
        if kept and cost >= kept[-1][1]:
            continue
        while len(kept) > 1 and _is_above(kept[-1], kept[-2], (seconds, cost, degree)):
            kept.pop()
        kept.append((seconds, cost, degree))
    return {degree: (seconds, cost) for seconds, cost, degree in reversed(kept)}


def _is_above(point: tuple[float, ...], left: tuple[float, ...], right: tuple[float, ...]) -> bool:
    share = (point[0] - left[0]) / (right[0] - left[0])
    return point[1] >= left[1] + share * (right[1] - left[1])


def windows(requests: Sequence[Known], max_cells: int = MAX_CELLS) -> list[tuple[float, float]]:
    """Windows between all arrivals and deadlines; the shortest merged until requests x windows is small enough."""
    spans = [(r.arrival_s, r.deadline_s + DEADLINE_SLACK_S) for r in requests]
    edges = sorted({edge for span in spans for edge in span})
    cells = sum(_inside(edges, span) for span in spans)
    while cells > max_cells and len(edges) > 2:
        inner = min(range(1, len(edges) - 1), key=lambda i: edges[i + 1] - edges[i - 1])
        edge = edges.pop(inner)
        cells -= sum(start_s < edge < end_s for start_s, end_s in spans)
    return list(pairwise(edges))


def _inside(edges: Sequence[float], span: tuple[float, float]) -> int:
    return sum(span[0] <= edge < span[1] for edge in edges)


class _Model:
    """The MILP of one group.

    Attributes:
        on_time: who is on time in the last point found.
    """

    def __init__(self, requests: Sequence[Known], n_gpus: int) -> None:
        self.on_time = [False] * len(requests)
        self._on_time = [pulp.LpVariable(f"z{i}", cat=pulp.LpBinary) for i in range(len(requests))]
        self._rows: list[pulp.LpConstraint] = []
        gpu_seconds: list[tuple[pulp.LpVariable, float]] = []
        cuts = windows(requests)
        used: list[list[tuple[pulp.LpVariable, float]]] = [[] for _ in cuts]
        for i, request in enumerate(requests):
            done: list[list[tuple[pulp.LpVariable, float]]] = [[] for _ in request.phases]
            for w, (start_s, end_s) in enumerate(cuts):
                due_s = request.deadline_s + DEADLINE_SLACK_S
                overlap_s = min(end_s, due_s) - max(start_s, request.arrival_s)
                if overlap_s <= 0:
                    continue
                spent: list[tuple[pulp.LpVariable, float]] = []
                for p, phase in enumerate(request.phases):
                    for degree, (step_s, gpu_s) in hull(phase, n_gpus).items():
                        if step_s <= 0:
                            continue
                        x = pulp.LpVariable(f"x{i}_{p}_{degree}_{w}", lowBound=0)
                        spent.append((x, 1.0))
                        done[p].append((x, 1.0 / step_s))
                        used[w].append((x, gpu_s / step_s))
                self._rows.append(pulp.LpAffineExpression([*spent, (self._on_time[i], -overlap_s)]) <= 0)
            for steps, phase in zip(done, request.phases, strict=True):
                if steps:
                    row = pulp.LpAffineExpression([*steps, (self._on_time[i], -phase.steps)])
                    self._rows.append(row == 0)
        for terms, (start_s, end_s) in zip(used, cuts, strict=True):
            self._rows.append(pulp.LpAffineExpression(terms) <= n_gpus * (end_s - start_s))
            gpu_seconds += terms
        self._gpu_seconds = pulp.LpAffineExpression(gpu_seconds)

    def most_on_time(self, time_limit_s: float) -> tuple[int, int]:
        """(upper bound, found) of the number on time."""
        missed = pulp.LpAffineExpression([(z, -1.0) for z in self._on_time]) + len(self._on_time)
        # counts are whole, so a gap below 1 settles them
        bound, best = self._solve(missed, [], time_limit_s, gap=0.999)
        most = len(self._on_time) - math.ceil(max(bound, 0.0) - 1e-6)
        return most, 0 if best is None else min(most, len(self._on_time) - round(best))

    def least_gpu_seconds(self, on_time: int, time_limit_s: float) -> float:
        """Lower bound on the GPU-seconds of any schedule with so many on time."""
        if not on_time:
            return 0.0
        enough = pulp.LpAffineExpression([(z, 1.0) for z in self._on_time]) >= on_time
        bound, _ = self._solve(self._gpu_seconds, [enough], time_limit_s, gap=None)
        return max(bound, 0.0)

    def _solve(
        self,
        objective: pulp.LpAffineExpression,
        more: Sequence[pulp.LpConstraint],
        time_limit_s: float,
        gap: float | None,
    ) -> tuple[float, float | None]:
        """Minimise. Returns the solver's dual bound and the best value found, None for none."""
        problem = pulp.LpProblem("bound", pulp.LpMinimize)
        problem += objective
        for row in (*self._rows, *more):
            problem += row
        solver = pulp.HiGHS(msg=False, timeLimit=time_limit_s, threads=1, gapAbs=gap)
        found = problem.solve(solver) == pulp.LpStatusOptimal
        if found:
            self.on_time = [z.varValue > 0.5 for z in self._on_time]
        dual = problem.solverModel.getInfo().mip_dual_bound + objective.constant
        return dual, float(pulp.value(objective)) if found else None
