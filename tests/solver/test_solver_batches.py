"""Steps that several requests share: valid, nobody late for company, and more on time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_checker import packing_violations

from solver.bound import Known, clairvoyant_bound
from solver.policies import POLICIES, make_policy
from solver.problem import Job, Packing, Phase, Shared, Snapshot, step_together_s

SMALL = {1: 0.2, 2: 0.19}
SMALL_SHARED = {1: Shared(0.2, 0.0, 0.05), 2: Shared(0.19, 0.0, 0.03)}
LARGE = {1: 1.0, 2: 0.55, 4: 0.3}
LARGE_SHARED = {degree: Shared(s, 0.0, s) for degree, s in LARGE.items()}  # no room for anybody else


def job(
    name: str,
    steps: int,
    deadline_s: float,
    *,
    company: str = "all",
    step_s: dict[int, float] = SMALL,
    shared: dict[int, Shared] = SMALL_SHARED,
    **options,
) -> Job:
    phases = (
        Phase("denoise", steps, step_s, company=company, shared=shared),
        Phase("decode", 1, {1: 0.05}),
    )
    return Job(name, 0.0, deadline_s, 0.0, phases, slo_s=deadline_s, **options)


def snapshot(jobs, n_gpus: int = 1, max_batch: int = 8, **options) -> Snapshot:
    return Snapshot(0.0, 0.4, (0.0,) * n_gpus, tuple(jobs), max_batch=max_batch, **options)


def on_time(packing: Packing, at: Snapshot) -> set[str]:
    ends_s = packing.ends_s(at.jobs)
    return {one.id for one in at.jobs if ends_s.get(one.id, math.inf) <= one.deadline_s + 1e-6}


def test_four_on_one_gpu_are_on_time_together_and_not_one_by_one() -> None:
    at = snapshot([job(f"r{i}", 10, 4.0) for i in range(4)])
    ilp = make_policy("ilp", time_limit_s=1.0)
    together = ilp(at)
    assert on_time(together, at) == {one.id for one in at.jobs}
    assert any(len(entry.job_ids) == 4 for entry in together.entries)
    assert not packing_violations(at, together.entries, complete=True)
    alone = replace(at, max_batch=1)
    assert len(on_time(ilp(alone), alone)) == 1
    two = replace(at, max_batch=2)
    assert len(on_time(ilp(two), two)) == 3
    assert max(len(entry.job_ids) for entry in ilp(two).entries) == 2


def test_where_there_is_room_everybody_has_a_gpu() -> None:
    at = snapshot([job(f"r{i}", 10, 4.0) for i in range(4)], n_gpus=4)
    packing = make_policy("ilp", time_limit_s=1.0)(at)
    assert all(len(entry.job_ids) == 1 for entry in packing.entries)


def test_no_company_without_a_bargain_or_with_strangers() -> None:
    ilp = make_policy("ilp", time_limit_s=1.0)
    large = {"step_s": LARGE, "shared": LARGE_SHARED}
    for jobs in (
        [job(f"r{i}", 5, 60.0, **large) for i in range(4)],
        [job(f"r{i}", 5, 60.0, company=f"{i}") for i in range(4)],
        [job(f"r{i}", 5, 60.0, company="") for i in range(4)],
    ):
        packing = ilp(snapshot(jobs))
        assert packing.entries and all(len(entry.job_ids) == 1 for entry in packing.entries)


def test_a_guest_that_costs_as_much_as_alone_is_welcome_with_others_that_do_not() -> None:
    """On a CPU a shared step has an overhead: two together are no gain, four are."""
    shared = {1: Shared(0.0, 0.16, 0.04)}
    terms = {"step_s": {1: 0.12}, "shared": shared}
    ilp = make_policy("ilp", time_limit_s=1.0)
    two = ilp(snapshot(job(f"r{i}", 10, 30.0, **terms) for i in range(2)))
    assert all(len(entry.job_ids) == 1 for entry in two.entries)
    four = ilp(snapshot(job(f"r{i}", 10, 30.0, **terms) for i in range(4)))
    assert any(len(entry.job_ids) == 4 for entry in four.entries)


def test_nobody_is_late_for_company() -> None:
    """The first has no time to lose: whoever joined it would take it beyond its deadline."""
    tight = job("tight", 10, 2.08)
    others = [job(f"r{i}", 10, 30.0) for i in range(6)]
    slow = {1: Shared(0.2, 0.0, 0.12), 2: Shared(0.19, 0.0, 0.11)}
    at = snapshot(
        replace(one, phases=(replace(one.phases[0], shared=slow), one.phases[1])) for one in [tight, *others]
    )
    packing = make_policy("ilp", time_limit_s=1.0)(at)
    assert "tight" in on_time(packing, at)
    assert all(entry.job_ids == ("tight",) for entry in packing.entries if "tight" in entry.job_ids)
    assert any(len(entry.job_ids) > 1 for entry in packing.entries)


@st.composite
def snapshots(draw) -> Snapshot:
    jobs = []
    for i in range(draw(st.integers(1, 10))):
        is_large = draw(st.booleans())
        deadline_s = draw(st.floats(0.3, 12.0)) if draw(st.integers(0, 9)) else math.inf
        company = draw(st.sampled_from(["", "a", "a", "b"]))
        terms = {"step_s": LARGE, "shared": LARGE_SHARED} if is_large else {}
        jobs.append(job(f"r{i}", draw(st.integers(1, 12)), deadline_s, company=company, **terms))
    free_s = draw(st.lists(st.sampled_from([0.0, 0.0, 0.3, math.inf]), min_size=1, max_size=4))
    return Snapshot(0.0, 0.4, tuple(free_s), tuple(jobs), max_batch=draw(st.integers(1, 4)))


@pytest.mark.parametrize("name", POLICIES)
@given(at=snapshots())
@settings(max_examples=60, deadline=None)
def test_every_packing_is_valid(name: str, at: Snapshot) -> None:
    packing = make_policy(name, time_limit_s=0.05)(at)
    assert packing_violations(at, packing.entries, complete=False) == []
    assert all(len(entry.job_ids) <= at.max_batch for entry in packing.entries)


@given(at=snapshots())
@settings(max_examples=60, deadline=None)
def test_the_bound_stays_above_with_batches(at: Snapshot) -> None:
    at = replace(at, free_at_s=(0.0,) * len(at.free_at_s))
    jobs = [one for one in at.jobs if all(min(p.step_s) <= len(at.free_at_s) for p in one.phases)]
    at = replace(at, jobs=tuple(jobs))
    packing = make_policy("ilp", time_limit_s=0.05)(at)
    timely = [one for one in at.jobs if one.deadline_s < math.inf]
    known = [Known(one.arrival_s, one.deadline_s, one.phases) for one in timely]
    bound = clairvoyant_bound(known, len(at.free_at_s), time_limit_s=5.0)
    assert len(on_time(packing, at) & {one.id for one in timely}) <= bound.on_time


def test_the_law() -> None:
    phases = [
        Phase("denoise", 1, SMALL, company="a", shared={1: Shared(0.2, 0.05, 0.1 * i)}) for i in (1, 2, 3)
    ]
    assert step_together_s(phases[:1], 1) == SMALL[1]
    assert step_together_s(phases[:2], 1) == pytest.approx(0.35)
    assert step_together_s(phases, 1) == pytest.approx(0.65)
    assert step_together_s([replace(phases[0])] * 2, 1) == pytest.approx(0.25)
