"""What becomes of late requests, of ranges that newcomers would have to wait for, and of promises."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_driver import Arrival, drive
from test_solver_policies import LARGE, MEDIUM, job, snapshots

from solver.allocation import short_steps, step_table
from solver.ilp import IlpPolicy
from solver.problem import Job, Packing, Phase, Snapshot

PATIENT = IlpPolicy(time_limit_s=5.0)


def on_time(snapshot: Snapshot, packing: Packing) -> set[str]:
    """Who is planned to its end by its deadline."""
    ends: dict[str, list[float]] = {}
    for entry in packing.entries:
        ends.setdefault(entry.job_ids[0], []).append(entry.end_s)
    steps = {one.id: sum(e.steps for e in packing.entries if e.job_ids[0] == one.id) for one in snapshot.jobs}
    return {
        one.id
        for one in snapshot.jobs
        if one.deadline_s < math.inf
        and steps[one.id] == sum(phase.steps for phase in one.phases)
        and max(ends[one.id]) <= one.deadline_s + 1e-6
    }


@settings(max_examples=150, deadline=None)
@given(snapshot=snapshots(), extra_s=st.lists(st.floats(0.05, 3.0), min_size=1, max_size=6))
def test_riders_make_nobody_late(snapshot: Snapshot, extra_s: list[float]) -> None:
    """The late ones are owed their 1 % only after a while: here they have just become ready."""
    now_s = snapshot.now_s
    timely = replace(snapshot, jobs=tuple(j for j in snapshot.jobs if not j.is_late(now_s)))
    timely = replace(timely, jobs=tuple(j for j in timely.jobs if j.deadline_s < math.inf))
    late = tuple(
        Job(
            f"late{i}",
            now_s - 9.0,
            now_s - 1.0,
            now_s,
            (Phase("denoise", 4, {1: seconds}),),
            slo_s=8.0,
            alone_s=4 * seconds,
        )
        for i, seconds in enumerate(extra_s)
    )
    both = replace(timely, jobs=timely.jobs + late)
    assert len(on_time(both, PATIENT(both))) >= len(on_time(timely, PATIENT(timely)))


def first_start_s(packing: Packing, job_id: str) -> float:
    return min((entry.start_s for entry in packing.entries if entry.job_ids[0] == job_id), default=math.inf)


def test_who_needs_a_decode_only_goes_first() -> None:
    """Eight requests with minutes of slack hold all eight GPUs of each round; before, the decode waited for a gap."""
    slow = {1: 0.76}
    jobs = tuple(job(f"r{i}", 28, slow, 100.0 + i) for i in range(8))
    decode = Job("late", -30.0, -20.0, 0.0, (Phase("decode", 1, {1: 0.05}),), slo_s=10.0, alone_s=3.0)
    packing = PATIENT(Snapshot(0.0, 0.5, (0.0,) * 8, (*jobs, decode)))
    assert first_start_s(packing, "late") == 0.0
    assert packing.info["riders"] == 1
    # control: the same with nothing to spare
    tight = tuple(job(f"r{i}", 28, slow, 28 * 0.76 + 0.01) for i in range(8))
    packing = PATIENT(Snapshot(0.0, 0.5, (0.0,) * 8, (*tight, decode)))
    assert first_start_s(packing, "late") >= 28 * 0.76
    assert packing.info["riders"] == 0


def test_beside_those_that_need_no_time_at_all() -> None:
    """What is left of them is a decode that the profile does not know, and so takes no time."""
    done = Job("done", 0.0, 9.0, 0.0, (Phase("decode", 1, {1: 0.0}),), slo_s=9.0)
    late = Job("late", -9.0, -1.0, 0.0, (Phase("denoise", 4, {1: 0.5}),), slo_s=8.0, alone_s=2.0)
    snapshot = Snapshot(0.0, 0.5, (0.0,), (done, late))
    packing = PATIENT(snapshot)
    assert on_time(snapshot, packing) == {"done"}
    assert first_start_s(packing, "late") == 0.0


def test_the_cheap_ones_ride_when_not_all_can() -> None:
    """A rider that would take what newcomers need is left behind, the short one beside it is not."""
    timely = tuple(job(f"r{i}", 10, {1: 1.0}, 13.0) for i in range(2))
    late = [
        Job(name, -9.0, -1.0, 0.0, (Phase("denoise", steps, {1: 1.0}),), slo_s=8.0, alone_s=1.0 * steps)
        for name, steps in (("short", 1), ("long", 40))
    ]
    packing = PATIENT(Snapshot(0.0, 4.0, (0.0, 0.0), (*timely, *late)))
    assert first_start_s(packing, "short") < 5.0
    assert on_time(Snapshot(0.0, 4.0, (0.0, 0.0), timely), packing) == {"r0", "r1"}


@pytest.mark.parametrize(
    ("step_s", "longest_s", "degrees"),
    [
        (LARGE, math.inf, (1, 2, 4, 8)),
        (LARGE, 0.5, (2, 4, 8)),
        (LARGE, 0.2, (8,)),
        (LARGE, 0.1, (8,)),  # none: 1 x .76^2, 2 x .42^2, 4 x .226^2, 8 x .125^2
        ({1: 4.67, 2: 2.85, 4: 1.48, 8: 1.28}, 1.0, (4, 8)),  # none: 21.8, 16.2, 8.8, 13.1
        (MEDIUM, 0.5, (1, 2, 4, 8)),
    ],
)
def test_degrees_whose_steps_newcomers_can_wait_for(
    step_s: dict[int, float], longest_s: float, degrees: tuple[int, ...]
) -> None:
    assert short_steps(step_table(step_s), longest_s).degrees == degrees


@settings(max_examples=80, deadline=None)
@given(snapshot=snapshots(), slack_s=st.floats(0.05, 2.0))
def test_no_range_is_longer_than_newcomers_can_wait(snapshot: Snapshot, slack_s: float) -> None:
    held = PATIENT(replace(snapshot, newcomer_slack_s=slack_s))
    steps_s = {(one.id, p.kind): p.step_s for one in snapshot.jobs for p in one.phases}
    for entry in held.entries:
        if entry.start_s <= snapshot.now_s:
            longest_s = max(slack_s, steps_s[entry.job_ids[0], entry.kind][entry.degree])
            assert entry.end_s - entry.start_s <= longest_s + 1e-6
            # a longer step than that only where no degree has a shorter one
            if longest_s > slack_s:
                assert min(steps_s[entry.job_ids[0], entry.kind].values()) > slack_s


def test_a_promise_counts_more_than_any_number_without_one() -> None:
    """Ten small ones or one large one can be on time."""
    small = tuple(job(f"s{i}", 1, {1: 1.0}, 5.0) for i in range(10))
    large = job("large", 10, {1: 1.0}, 10.0)
    alone = Snapshot(0.0, 1.0, (0.0,), (*small, large))
    assert "large" not in on_time(alone, PATIENT(alone))
    promised = Snapshot(0.0, 1.0, (0.0,), (*small, replace(large, promised=True)))
    assert on_time(promised, PATIENT(promised)) == {"large"}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n_gpus=st.sampled_from([1, 2, 4]))
def test_the_wait_of_best_effort_is_bounded_by_the_work(seed: int, n_gpus: int) -> None:
    """Whatever arrives: GPUs that are free do not idle beside work that fits them, so all is done in due course."""
    rng = random.Random(seed)
    trace, now_s = [], 0.0
    for i in range(25):
        now_s += rng.expovariate(n_gpus / 1.5)
        steps, step_s = rng.randint(1, 6), rng.uniform(0.05, 0.4)
        slo_s = rng.choice([math.inf, 0.01, rng.uniform(1.0, 3.0) * steps * step_s])
        trace.append(Arrival(f"r{i}", now_s, slo_s, (Phase("denoise", steps, {1: step_s}),)))
    outcome = drive(PATIENT, trace, n_gpus)
    work_s = sum(one.phases[0].steps * one.phases[0].step_s[1] for one in trace)
    assert set(outcome.finish_s) == {one.id for one in trace}
    for one in trace:
        assert outcome.finish_s[one.id] <= now_s + work_s + 1e-6
