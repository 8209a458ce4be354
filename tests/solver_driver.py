"""Drives the real RoundScheduler through a trace in simulated time, for the tests of the policies."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from schedule_checker import Chain, violations

from solver.problem import Entry, Phase, Policy
from tetriserve.scheduler.assignment import Assignment
from tetriserve.scheduler.rounds import RoundScheduler


@dataclass(frozen=True)
class Arrival:
    id: str
    arrival_s: float
    slo_s: float
    phases: tuple[Phase, ...]


@dataclass
class Outcome:
    """What was executed; `finish_s` has the requests that were finished before `until_s`."""

    finish_s: dict[str, float] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    def on_time(self, trace: Sequence[Arrival]) -> int:
        return sum(self.finish_s.get(r.id, math.inf) <= r.arrival_s + r.slo_s + 1e-6 for r in trace)


def drive(
    policy: Policy,
    trace: Sequence[Arrival],
    n_gpus: int,
    *,
    round_s: float | None = None,
    until_s: float = math.inf,
) -> Outcome:
    """Run the trace to its end (or to `until_s`), with steps that last exactly what the profile says."""
    scheduler = RoundScheduler(policy, n_gpus, round_s=round_s)
    arrivals = sorted(trace, key=lambda request: request.arrival_s)
    running: list[tuple[float, int, Assignment]] = []
    outcome = Outcome()
    now_s = 0.0
    while True:
        instants = [arrivals[0].arrival_s] if arrivals else []
        instants += [running[0][0]] if running else []
        now_s = max(now_s, min([*instants, scheduler.next_wakeup_s(now_s)]))
        if now_s >= until_s:
            return outcome
        while running and running[0][0] <= now_s + 1e-9:
            end_s, seq, assignment = heapq.heappop(running)
            if scheduler.finished(seq, end_s):
                outcome.finish_s[assignment.request_ids[0]] = end_s
        while arrivals and arrivals[0].arrival_s <= now_s + 1e-9:
            request = arrivals.pop(0)
            scheduler.arrived(request.id, request.phases, now_s, request.arrival_s + request.slo_s)
        for a in scheduler.plan(now_s).assignments:
            heapq.heappush(running, (a.end_s, a.seq, a))
            outcome.entries.append(Entry(a.request_ids, a.kind, a.gpus, a.steps, a.start_s, a.end_s))


def executed_violations(trace: Sequence[Arrival], outcome: Outcome, n_gpus: int) -> list[str]:
    chains = {request.id: Chain(request.arrival_s, request.phases) for request in trace}
    return violations(outcome.entries, chains, n_gpus)
