"""What was accepted on condition of being on time is; what was not is told which deadline it could have had."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from solver.ilp import IlpPolicy
from solver.problem import Phase, Snapshot
from tetriserve.scheduler.promises import RESOLUTION, earliest_deadline_s, is_missed, with_margin
from tetriserve.scheduler.rounds import RoundScheduler

POLICY = IlpPolicy(time_limit_s=5.0)
STEPS = (Phase("denoise", 10, {1: 1.0, 2: 0.6}),)


def scheduler_with(promised: int, n_gpus: int = 2) -> tuple[RoundScheduler, list[str]]:
    rounds = RoundScheduler(POLICY, n_gpus, round_s=1.0)
    for i in range(promised):
        rounds.arrived(f"r{i}", STEPS, 0.0, 12.0, reject_infeasible=True)
    snapshot = rounds.snapshot(0.0)
    packing = POLICY(snapshot)
    rejected = rounds.infeasible(snapshot, packing)
    for request_id in rejected:
        rounds.cancelled(request_id)
    rounds.commit(snapshot, packing, 0.0)
    return rounds, rejected


def test_an_accepted_request_is_kept_against_later_ones() -> None:
    rounds, rejected = scheduler_with(2)
    assert rejected == []
    for i in range(6):  # each could be on time alone, and all of them count more than the two
        rounds.arrived(f"later{i}", (Phase("denoise", 2, {1: 1.0}),), 0.5, 4.0, reject_infeasible=True)
    snapshot = rounds.snapshot(0.5)
    packing = POLICY(snapshot)
    assert len(rounds.infeasible(snapshot, packing)) >= 4
    assert not packing.set_aside & {"r0", "r1"}
    # control: without a promise they would have been given up
    free = replace(snapshot, jobs=tuple(replace(job, promised=False) for job in snapshot.jobs))
    assert POLICY(free).set_aside & {"r0", "r1"}


def test_a_refused_request_learns_the_earliest_deadline() -> None:
    rounds, _ = scheduler_with(2)
    rounds.arrived("more", STEPS, 0.0, 12.0, reject_infeasible=True)
    snapshot = rounds.snapshot(0.0)
    (refused,) = [job for job in snapshot.jobs if job.id == "more"]
    assert is_missed(refused, POLICY(snapshot), 0.0)
    named_s = earliest_deadline_s(POLICY, snapshot, refused)

    def is_accepted(deadline_s: float) -> bool:
        job = replace(refused, deadline_s=with_margin(0.0, deadline_s), slo_s=deadline_s)
        jobs = tuple(job if one.id == "more" else one for one in snapshot.jobs)
        return not is_missed(job, POLICY(replace(snapshot, jobs=jobs)), 0.0)

    assert is_accepted(named_s)
    assert not is_accepted(named_s * (1 - 2 * RESOLUTION))
    # it has the GPUs to itself once the two are done after ten seconds
    assert 15.0 <= named_s <= 20.0


def test_no_deadline_is_named_when_none_is_in_reach() -> None:
    never = Snapshot(0.0, 1.0, (math.inf, math.inf), ())
    rounds, _ = scheduler_with(1)
    (job,) = rounds.snapshot(0.0).jobs
    blind = IlpPolicy(time_limit_s=0.0)
    assert earliest_deadline_s(blind, replace(never, free_at_s=(0.0, 0.0)), job) < math.inf
    late = replace(job, deadline_s=0.1)
    assert is_missed(late, POLICY(replace(never, free_at_s=(0.0,), jobs=(late,))), 0.0)


def test_accepted_means_kept_in_bursts() -> None:
    """Bursts of twenty: whoever is let in is on time, since the steps take what the plan says."""
    for seed in range(5):
        rng = random.Random(seed)
        rounds = RoundScheduler(POLICY, 4, round_s=0.3)
        deadlines: dict[str, float] = {}
        running, finished = [], {}
        now_s, burst = 0.0, 0
        while burst < 3 or rounds.open_ids:
            if now_s >= 4.0 * burst and burst < 3:
                for i in range(20):
                    name = f"b{burst}-{i}"
                    steps, step_s = rng.randint(2, 8), rng.uniform(0.05, 0.4)
                    slo_s = rng.uniform(1.2, 4.0) * steps * step_s
                    phases = (Phase("denoise", steps, {1: step_s, 2: 0.6 * step_s, 4: 0.4 * step_s}),)
                    rounds.arrived(name, phases, now_s, now_s + slo_s, reject_infeasible=True)
                    deadlines[name] = now_s + slo_s
                burst += 1
            snapshot = rounds.snapshot(now_s)
            if snapshot.jobs:
                packing = POLICY(snapshot)
                for request_id in rounds.infeasible(snapshot, packing):
                    rounds.cancelled(request_id)
                    del deadlines[request_id]
                running += rounds.commit(snapshot, packing, now_s).assignments
            ends_s = [a.end_s for a in running] + ([4.0 * burst] if burst < 3 else [])
            now_s = min(max(min(ends_s), now_s), max(now_s + 1e-6, rounds.next_wakeup_s(now_s)))
            for ended in sorted((a for a in running if a.end_s <= now_s + 1e-9), key=lambda a: a.seq):
                running.remove(ended)
                if rounds.finished(ended.seq, ended.end_s):
                    finished[ended.request_ids[0]] = ended.end_s
        late = [name for name, end_s in finished.items() if end_s > deadlines[name] + 1e-6]
        assert len(finished) == len(deadlines) >= 15
        assert len(late) <= 0.02 * len(finished), late
