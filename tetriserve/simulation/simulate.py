"""Simulated execution: the production scheduler on a clock that jumps from event to event (design: "One brain").

`RoundScheduler` and the policies are those of the server; this module only plays the GPUs and the arrivals.
"""

from __future__ import annotations

import heapq
import math
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from solver.policies import make_policy
from solver.problem import Phase, Policy, least_work_s
from tetriserve.errors import ConfigError, TetriserveError
from tetriserve.profile import Profile
from tetriserve.scheduler.assignment import EPSILON_S, Assignment
from tetriserve.scheduler.rounds import RoundScheduler
from tetriserve.simulation.result import Executed, Outcome, percentile
from tetriserve.simulation.trace import TraceRequest

MAX_IDLE_DECISIONS = 1000
"""So many decisions in a row on an idle cell with open requests mean that the policy starves them."""


@dataclass(frozen=True)
class Disturbance:
    """What a real machine adds to the times of the profile.

    Attributes:
        switch_s: added to a range that runs on another GPU set than the one before it of the same request.
        jitter: standard deviation of step times as a share of them; log-normal with mean 1. The steps of one
            range share a draw, since what slows a GPU down (clocks, neighbours) outlasts a step.
    """

    switch_s: float = 0.0
    jitter: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Reuse:
    """Whether steps are extrapolated: `when` is "never", "late" or "always"; then only every `k`-th is computed."""

    when: str = "never"
    k: int = 2


@dataclass
class Simulation:
    """What happened: outcomes in order of the trace, ranges in order of their start, seconds per decision."""

    outcomes: list[Outcome] = field(default_factory=list)
    schedule: list[Executed] = field(default_factory=list)
    plan_s: list[float] = field(default_factory=list)

    @property
    def plan_ms(self) -> tuple[float, float]:
        """Median and 99th percentile of the time of a decision."""
        return 1000 * percentile(self.plan_s, 50), 1000 * percentile(self.plan_s, 99)


class _Machine:
    """GPUs that run what is committed to them in plan order."""

    def __init__(self, n_gpus: int, disturbance: Disturbance) -> None:
        self._disturbance = disturbance
        self._rng = np.random.default_rng(disturbance.seed)
        self._spread = math.sqrt(math.log1p(disturbance.jitter**2))
        self._queues: list[deque[int]] = [deque() for _ in range(n_gpus)]
        self._waiting: list[Assignment] = []
        self._running: list[tuple[float, int, Executed]] = []
        self._last_gpus: dict[str, tuple[int, ...]] = {}

    @property
    def is_idle(self) -> bool:
        return not self._running and not self._waiting

    @property
    def next_end_s(self) -> float:
        return self._running[0][0] if self._running else math.inf

    def take(self, assignments: Sequence[Assignment], now_s: float) -> list[Executed]:
        """Queue what was committed and start what can start; returns what was started."""
        for assignment in assignments:
            self._waiting.append(assignment)
            for gpu in assignment.gpus:
                self._queues[gpu].append(assignment.seq)
        started, waiting = [], []
        busy = {request_id for _, _, entry in self._running for request_id in entry.request_ids}
        for assignment in self._waiting:
            in_turn = all(self._queues[gpu][0] == assignment.seq for gpu in assignment.gpus)
            if in_turn and busy.isdisjoint(assignment.request_ids):
                started.append(self._start(assignment, now_s))
            else:
                waiting.append(assignment)
            busy.update(assignment.request_ids)
        self._waiting = waiting
        return started

    def finish(self, until_s: float) -> list[tuple[int, Executed]]:
        """Ranges that end by then, in order, with their sequence numbers."""
        ended = []
        while self._running and self._running[0][0] <= until_s:
            _, seq, entry = heapq.heappop(self._running)
            for gpu in entry.gpus:
                self._queues[gpu].popleft()
            ended.append((seq, entry))
        return ended

    def _start(self, assignment: Assignment, now_s: float) -> Executed:
        seconds = assignment.end_s - assignment.start_s
        if self._spread:
            seconds *= float(self._rng.lognormal(-(self._spread**2) / 2, self._spread))
        for request_id in assignment.request_ids:
            if self._last_gpus.get(request_id, assignment.gpus) != assignment.gpus:
                seconds += self._disturbance.switch_s
            self._last_gpus[request_id] = assignment.gpus
        end_s = now_s + seconds
        entry = Executed(
            now_s,
            end_s,
            assignment.gpus,
            assignment.request_ids,
            assignment.steps,
            assignment.kind,
            assignment.component,
        )
        heapq.heappush(self._running, (end_s, assignment.seq, entry))
        return entry


def named_policy(name: str, n_gpus: int, plan_limit_s: float, round_steps: float | None = None) -> Policy:
    """The policy of that name for a cell of `n_gpus`, with another round length if one is given.

    Raises ConfigError for an unknown name and for a fixed degree that the cell has no GPUs for.
    """
    try:
        policy = make_policy(name, time_limit_s=plan_limit_s)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    fixed = re.fullmatch(r"sp(\d+)", name)
    if fixed and int(fixed[1]) > n_gpus:
        raise ConfigError(f"policy {name} needs {fixed[1]} GPUs, there are {n_gpus}")
    if round_steps is None:
        return policy
    changed: Policy = replace(cast(Any, policy), round_steps=round_steps)
    return changed


def simulate(
    trace: Sequence[TraceRequest],
    profile: Profile,
    policy: Policy,
    n_gpus: int,
    *,
    round_s: float | None = None,
    min_round_s: float = 0.0,
    lead_s: float = 0.0,
    disturbance: Disturbance | None = None,
    reuse: Reuse | None = None,
    max_batch: int = 1,
    on_settled: Callable[[], object] = lambda: None,
) -> Simulation:
    """Run a trace to its end.

    Args:
        trace: in order of arrival.
        round_s, min_round_s, lead_s: as in `RoundScheduler`.
        reuse: of steps.
        max_batch: so many requests may share a step, where the profile says what such steps take.
        on_settled: called whenever a request is finished or dropped.

    Raises:
        ConfigError: a shape does not fit the profile or the GPUs.
        TetriserveError: the policy leaves requests waiting on idle GPUs for ever.
    """
    reuse = reuse or Reuse()
    every = reuse.k if reuse.when == "always" else 1
    chains = {request.id: request.chain(profile, n_gpus, every) for request in trace}
    cheaper: dict[str, tuple[Phase, ...]] = {}
    if reuse.when == "late":
        cheaper = {request.id: request.chain(profile, n_gpus, reuse.k) for request in trace}
    scheduler = RoundScheduler(
        policy, n_gpus, round_s=round_s, min_round_s=min_round_s, lead_s=lead_s, max_batch=max_batch
    )
    machine = _Machine(n_gpus, disturbance or Disturbance())
    done = Simulation()
    finish_s: dict[str, float] = {}
    arrivals = deque(trace)
    now_s, idle_decisions = 0.0, 0
    while arrivals or scheduler.open_ids:
        arrival_s = arrivals[0].arrival_s if arrivals else math.inf
        now_s = max(now_s, min(arrival_s, machine.next_end_s, scheduler.next_wakeup_s(now_s)))
        # ends that differ by rounding are one event, so that a wide set is seen free as a whole
        for seq, entry in machine.finish(now_s + EPSILON_S):
            if scheduler.finished(seq, entry.end_s):
                finish_s.update(dict.fromkeys(entry.request_ids, entry.end_s))
                on_settled()
        while arrivals and arrivals[0].arrival_s <= now_s + EPSILON_S:
            request = arrivals.popleft()
            _arrive(scheduler, request, chains[request.id], cheaper.get(request.id, ()))
        for request_id in scheduler.expired(now_s):
            scheduler.cancelled(request_id)
            on_settled()
        committed: tuple[Assignment, ...] = ()
        if scheduler.is_due(now_s):
            started_s = time.perf_counter()
            snapshot = scheduler.snapshot(now_s)
            if snapshot.jobs:
                committed = scheduler.commit(snapshot, policy(snapshot), now_s).assignments
                done.plan_s.append(time.perf_counter() - started_s)
        done.schedule += machine.take(committed, now_s)
        idle_decisions = idle_decisions + 1 if machine.is_idle and not arrivals else 0
        if idle_decisions > MAX_IDLE_DECISIONS:
            waiting = ", ".join(scheduler.open_ids[:3])
            raise TetriserveError(f"policy {policy.name} starves {waiting} at {now_s:.1f} s")
    done.outcomes = [
        Outcome(
            r.id,
            r.shape,
            r.arrival_s,
            math.inf if r.slo_s is None else r.slo_s,
            finish_s.get(r.id),
            least_work_s(chains[r.id]),
        )
        for r in trace
    ]
    return done


def _arrive(
    scheduler: RoundScheduler,
    request: TraceRequest,
    chain: tuple[Phase, ...],
    cheaper: tuple[Phase, ...],
) -> None:
    scheduler.arrived(
        request.id,
        chain,
        request.arrival_s,
        request.deadline_s,
        priority=request.priority,
        drop_late=request.drop_late,
        cheaper=cheaper,
    )
