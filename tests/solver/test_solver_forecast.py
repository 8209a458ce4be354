"""Room for newcomers: what is expected from the recent past, and what it changes in a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solver.forecast import Newcomers, planned_budget_s, with_room_for_newcomers
from solver.ilp import IlpPolicy
from solver.problem import Job, Load, Packing, Phase, Snapshot
from tetriserve.profile import Profile
from tetriserve.scheduler.load import WINDOW_S, RecentLoad
from tetriserve.simulation.simulate import simulate
from tetriserve.simulation.workload import SloRule, Workload, parse_shapes

L20 = Path(__file__).parents[2] / "bench" / "profiles" / "flux_l20.yaml"
LARGE = {1: 4.0, 2: 2.4, 4: 1.3}


def snapshot(*jobs: Job, expected: tuple[Load, ...] = (), lost: int = 0) -> Snapshot:
    return Snapshot(100.0, 1.0, (math.inf,) * lost + (0.0,) * (4 - lost), jobs, expected=expected)


def job(steps: int, due_in_s: float) -> Job:
    return Job("a", 100.0, 100.0 + due_in_s, 100.0, (Phase("denoise", steps, LARGE),))


LOADS = st.lists(st.tuples(st.floats(0.1, 1e3), st.floats(0.0, 10.0)).map(lambda pair: Load(*pair)))


@given(st.floats(-1e3, 1e4), LOADS, st.booleans())
def test_running_sums_are_the_plain_formula(budget_s: float, loads: list[Load], at_a_load: bool) -> None:
    """Load by load, also for a budget that is the SLO of one of them."""
    if at_a_load and loads:
        budget_s = loads[0].slo_s
    plain = sum(load.gpus * max(0.0, budget_s - load.slo_s) for load in loads)
    assert Newcomers(loads).work_before(budget_s) == pytest.approx(plain, rel=1e-9, abs=1e-6)


@given(
    st.floats(0.0, 1e4),
    LOADS,
    st.integers(1, 64),
)
def test_only_those_due_earlier_take_room(budget_s: float, loads: list[Load], n_gpus: int) -> None:
    planned_s = planned_budget_s(budget_s, Newcomers(loads), n_gpus)
    assert planned_s <= budget_s
    if all(load.slo_s >= budget_s for load in loads):
        assert planned_s == budget_s
    elif any(load.slo_s < budget_s - 1e-3 and load.gpus > 1e-3 for load in loads):
        assert planned_s < budget_s


def test_a_request_gives_way_to_half_the_board() -> None:
    """Newcomers due within 10 s that keep 2 of 4 GPUs busy take half of what lies between 10 and 90 s."""
    assert planned_budget_s(90.0, Newcomers([Load(10.0, 2.0)]), 4) == pytest.approx(50.0)
    planned = with_room_for_newcomers(snapshot(job(10, 90.0), expected=(Load(10.0, 2.0),)))
    assert planned.jobs[0].deadline_s == pytest.approx(150.0)
    fewer = with_room_for_newcomers(snapshot(job(10, 90.0), expected=(Load(10.0, 2.0),), lost=1))
    assert fewer.jobs[0].deadline_s == pytest.approx(190.0 - 80.0 * 2 / 3)


def test_who_has_no_room_to_give_keeps_its_deadline() -> None:
    tight, patient = job(60, 80.0), replace(job(60, 80.0), deadline_s=math.inf)
    planned = with_room_for_newcomers(snapshot(tight, patient, expected=(Load(10.0, 2.0),)))
    assert planned.jobs == (tight, patient)


def test_recent_load_counts_the_cheapest_way_and_forgets() -> None:
    load = RecentLoad()
    steps = (Phase("denoise", 10, LARGE),)
    load.arrived(steps, 100.0, 0.0)  # one GPU is enough: 40 GPU-seconds
    load.arrived(steps, 13.0, 10.0)  # only four are fast enough: 52
    load.arrived(steps, math.inf, 10.0)
    load.arrived(steps, -1.0, 10.0)
    assert {one.slo_s: one.gpus * WINDOW_S for one in load.expected(20.0)} == pytest.approx(
        {100.0: 40.0, 13.0: 52.0}
    )
    assert [one.slo_s for one in load.expected(WINDOW_S + 5.0)] == [13.0]
    assert load.expected(2 * WINDOW_S) == ()


@dataclass(frozen=True)
class _Blind(IlpPolicy):
    """Without the forecast."""

    def __call__(self, snapshot: Snapshot) -> Packing:
        return super().__call__(replace(snapshot, expected=()))


@pytest.mark.slow
def test_overload_costs_little_more_than_what_is_too_much() -> None:
    """L20, twice what 8 GPUs can do: a quarter of the requests ask for nine tenths of the work.

    All the others can be on time; a scheduler that thrashes loses them too.
    """
    profile = Profile.load(L20)
    shapes = parse_shapes("256x256,512x512,1024x1024,2048x2048")
    slo = SloRule.parse("2.5x")
    workload = Workload("uniform", 18.0, 100, shapes=shapes, slo=slo, seed=1, profile=profile)
    trace = workload.generate()
    met = {
        policy.__class__: sum(o.met for o in simulate(trace, profile, policy, 8).outcomes) / len(trace)
        for policy in (IlpPolicy(time_limit_s=1.0), _Blind(time_limit_s=1.0))
    }
    assert met[IlpPolicy] >= 0.78
    assert met[IlpPolicy] >= met[_Blind]
