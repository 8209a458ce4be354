"""Every policy's packing is valid on generated boards, and each keeps its own promises."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_checker import packing_violations

from solver import ilp, selection
from solver.board import Board, OpenJob
from solver.ilp import IlpPolicy
from solver.knapsack import Option, group_knapsack, options, steps_in_round
from solver.policies import POLICIES, make_policy
from solver.problem import Entry, Job, Packing, Phase, Snapshot

LARGE = {1: 0.76, 2: 0.42, 4: 0.226, 8: 0.125}
MEDIUM = {1: 0.154, 2: 0.096, 4: 0.058, 8: 0.042}
SMALL = {1: 0.022, 2: 0.034, 4: 0.037, 8: 0.039}


def job(id_: str, steps: int, step_s: dict[int, float], deadline_s: float, **more: object) -> Job:
    fields = {"arrival_s": 0.0, "ready_s": 0.0, "slo_s": deadline_s} | more
    return Job(id_, deadline_s=deadline_s, phases=(Phase("denoise", steps, step_s),), **fields)  # type: ignore[arg-type]


def open_job(one: Job) -> OpenJob:
    return Board(Snapshot(0.0, 1.0, (0.0,) * 8, (one,))).jobs[0]


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    n_gpus = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    degrees = [d for d in (1, 2, 3, 4, 6, 8) if d <= n_gpus]
    now_s = draw(st.sampled_from([0.0, 7.5]))
    jobs = []
    for i in range(draw(st.integers(0, 6))):
        phases = []
        if draw(st.booleans()):
            phases.append(Phase("encode", 1, {1: draw(st.sampled_from([0.0, 0.05]))}))
        allowed = draw(st.lists(st.sampled_from(degrees), min_size=1, unique=True))
        step_s = {d: draw(st.floats(0.02, 1.0)) for d in allowed}
        phases.append(Phase("denoise", draw(st.integers(1, 9)), step_s))
        if draw(st.booleans()):
            phases.append(Phase("decode", 1, {1: draw(st.sampled_from([0.0, 0.12]))}))
        arrival_s = now_s - draw(st.floats(0.0, 3.0))
        slo_s = draw(st.one_of(st.just(math.inf), st.floats(0.05, 8.0)))
        started = draw(st.booleans()) and phases[0].kind != "encode"
        width = draw(st.sampled_from(allowed))
        jobs.append(
            Job(
                id=f"r{i}",
                arrival_s=arrival_s,
                deadline_s=arrival_s + slo_s,
                ready_s=draw(st.sampled_from([arrival_s, now_s, now_s + 0.1])),
                phases=tuple(phases),
                gpus=tuple(range(width)) if started else (),
                set_aside=draw(st.booleans()),
                priority=draw(st.integers(0, 1)),
                slo_s=slo_s,
            )
        )
    free = st.sampled_from([now_s - 1.0, now_s, now_s + 0.07, now_s + 0.5])
    return Snapshot(
        now_s=now_s,
        round_s=draw(st.sampled_from([0.1, 0.3, 1.0])),
        free_at_s=tuple(draw(free) for _ in range(n_gpus)),
        jobs=tuple(jobs),
        next_boundary_s=draw(st.sampled_from([None, now_s + 0.05])),
    )


def promised_violations(snapshot: Snapshot, packing: Packing) -> list[str]:
    """What is wrong with a packing that must end for all who are to be on time, and by when it must."""
    wrong = packing_violations(snapshot, packing.entries, complete=False)
    for one in snapshot.jobs:
        own = [entry for entry in packing.entries if entry.job_ids[0] == one.id]
        if one.deadline_s == math.inf or one.is_late(snapshot.now_s) or one.id in packing.set_aside:
            continue
        if sum(entry.steps for entry in own) != sum(phase.steps for phase in one.phases):
            wrong.append(f"{one.id}: neither set aside nor finished")
        elif max(entry.end_s for entry in own) > one.deadline_s + 1e-6:
            wrong.append(f"{one.id}: late and not set aside")
    return wrong


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=60, deadline=None)
@given(snapshot=snapshots())
def test_every_packing_is_valid(name: str, snapshot: Snapshot) -> None:
    packing = make_policy(name, time_limit_s=5.0)(snapshot)
    # these plan best effort, or anything, only as far as it will be committed
    assert packing_violations(snapshot, packing.entries, complete=name not in ("dp", "ilp", "slack")) == []
    assert packing.set_aside <= {job.id for job in snapshot.jobs}


@settings(max_examples=100, deadline=None)
@given(snapshot=snapshots())
def test_ilp_plans_to_the_end_for_those_to_be_on_time(snapshot: Snapshot) -> None:
    assert promised_violations(snapshot, IlpPolicy(time_limit_s=5.0)(snapshot)) == []


@settings(max_examples=60, deadline=None)
@given(snapshot=snapshots())
def test_ilp_without_time_gives_a_valid_packing_that_keeps_gpus_busy(snapshot: Snapshot) -> None:
    packing = IlpPolicy(time_limit_s=0.0)(snapshot)
    assert packing_violations(snapshot, packing.entries, complete=False) == []
    now_s = snapshot.now_s

    def takes_one_gpu(job: Job) -> bool:
        """Nothing else would have it on time; what needs more GPUs may wait for them."""
        alone_s = sum(phase.steps * phase.step_s.get(1, math.inf) for phase in job.phases)
        return job.is_late(now_s) or now_s + alone_s <= job.deadline_s

    can_start = [
        job
        for job in snapshot.jobs
        if job.ready_s <= now_s and 1 in job.phases[0].step_s and takes_one_gpu(job)
    ]
    if can_start and min(snapshot.free_at_s) <= now_s:
        assert any(entry.start_s <= now_s for entry in packing.entries)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25, deadline=None)
@given(snapshot=snapshots(), data=st.data())
def test_lost_gpus_are_never_used(name: str, snapshot: Snapshot, data: st.DataObject) -> None:
    lost = data.draw(st.sets(st.integers(0, len(snapshot.free_at_s) - 1)))
    free_at_s = tuple(math.inf if g in lost else free for g, free in enumerate(snapshot.free_at_s))
    board = Snapshot(snapshot.now_s, snapshot.round_s, free_at_s, snapshot.jobs, snapshot.next_boundary_s)
    packing = make_policy(name)(board)
    assert packing_violations(board, packing.entries, complete=False) == []
    assert not lost & {gpu for entry in packing.entries for gpu in entry.gpus}


@pytest.mark.parametrize("name", ["ilp", "edf", "dp"])
@settings(max_examples=60, deadline=None)
@given(snapshot=snapshots())
def test_no_gpu_idles_while_a_request_could_run_on_it(name: str, snapshot: Snapshot) -> None:
    """On a board with nothing committed, every request that may use one GPU is running or every GPU is."""
    jobs = tuple(
        Job(j.id, j.arrival_s, j.deadline_s, snapshot.now_s, (Phase("denoise", 3, LARGE),), slo_s=j.slo_s)
        for j in snapshot.jobs
    )
    free_at_s = (snapshot.now_s,) * len(snapshot.free_at_s)
    board = Snapshot(snapshot.now_s, snapshot.round_s, free_at_s, jobs)
    starting = [e for e in make_policy(name)(board).entries if e.start_s <= board.now_s + 1e-9]
    used = {gpu for entry in starting for gpu in entry.gpus}
    assert len(starting) == len(jobs) or len(used) == len(free_at_s)


def test_names_and_defaults() -> None:
    assert set(POLICIES) == {"ilp", "dp", "slack", "sp1", "sp2", "sp4", "sp8", "rssp", "edf"}
    for name in POLICIES:
        assert make_policy(name).name == name
    assert make_policy("dp").round_steps == 2
    assert not make_policy("dp").replans_on_arrival
    assert make_policy("ilp").replans_on_arrival
    with pytest.raises(ValueError, match="ilp, dp, slack, sp1, sp2, sp4, sp8, rssp, edf"):
        make_policy("fifo")


# ---- ilp ----------------------------------------------------------------------------------------------------


def overloaded() -> Snapshot:
    """Three large requests of which two can be on time, and small ones that always can."""
    large = [job(f"large{i}", 28, LARGE, 7.2) for i in range(3)]
    small = [job(f"small{i}", 28, SMALL, 1.5) for i in range(4)]
    return Snapshot(0.0, 0.125, (0.0,) * 8, tuple(large + small))


def finishes(packing: Packing) -> dict[str, float]:
    return {entry.job_ids[0]: entry.end_s for entry in packing.entries}


def test_ilp_sets_one_aside_and_keeps_it_aside() -> None:
    snapshot = overloaded()
    packing = IlpPolicy(time_limit_s=5.0)(snapshot)
    end_s = finishes(packing)
    on_time = {job.id for job in snapshot.jobs if end_s.get(job.id, math.inf) <= job.deadline_s + 1e-6}
    assert {"small0", "small1", "small2", "small3"} <= on_time
    assert len([id_ for id_ in on_time if id_.startswith("large")]) == 1 + (len(packing.set_aside) == 1)
    assert packing.set_aside and packing.set_aside.isdisjoint(on_time)
    assert packing.info["ilps"] >= 1


def test_ilp_takes_the_cheap_path_when_everybody_fits() -> None:
    packing = IlpPolicy()(
        Snapshot(0.0, 0.125, (0.0,) * 8, (job("a", 28, LARGE, 5.0), job("b", 28, SMALL, 1.5)))
    )
    assert packing.info["ilps"] == 0
    assert packing.set_aside == frozenset()
    assert all(end_s <= {"a": 5.0, "b": 1.5}[id_] for id_, end_s in finishes(packing).items())


def test_ilp_without_time_or_solver_is_still_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = overloaded()
    packing = IlpPolicy(time_limit_s=0.0)(snapshot)
    assert packing_violations(snapshot, packing.entries, complete=False) == []
    assert packing.info == {"completions": 1, "ilps": 0, "riders": 0}
    monkeypatch.setattr(ilp, "select", lambda *_, **__: None)
    without = IlpPolicy(time_limit_s=5.0)(snapshot)
    assert promised_violations(snapshot, without) == []
    assert len(without.set_aside) <= 2  # by hand
    monkeypatch.undo()
    monkeypatch.setattr(selection, "_solver", lambda _: 1 / 0)
    assert promised_violations(snapshot, IlpPolicy()(snapshot)) == []


def test_late_requests_run_on_idle_gpus_without_delaying_others() -> None:
    timely = job("timely", 10, MEDIUM, 1.2)
    late = job("late", 28, LARGE, 0.5)
    alone = finishes(IlpPolicy()(Snapshot(0.0, 0.125, (0.0,) * 3, (timely,))))
    packing = IlpPolicy()(Snapshot(0.0, 0.125, (0.0,) * 3, (timely, late)))
    assert finishes(packing)["timely"] <= max(alone["timely"], timely.deadline_s)
    assert math.isfinite(finishes(packing)["late"])
    assert packing.set_aside == frozenset()


def test_starving_request_goes_first() -> None:
    now_s = 120.0
    busy = [
        job(f"b{i}", 28, MEDIUM, now_s + 4.5, arrival_s=now_s, ready_s=now_s, slo_s=4.5) for i in range(8)
    ]
    for deadline_s in (1.0, math.inf):
        starving = job("starving", 5, LARGE, deadline_s)
        for name in ("ilp", "dp"):
            packing = make_policy(name)(Snapshot(now_s, 0.125, (now_s,) * 8, (*busy, starving)))
            assert "starving" in {e.job_ids[0] for e in packing.entries if e.start_s == now_s}


def test_requests_without_deadline_get_gpus_before_others_are_widened() -> None:
    jobs = (
        job("timed", 28, MEDIUM, 10.0),
        job("free0", 5, LARGE, math.inf),
        job("free1", 5, LARGE, math.inf),
    )
    for name in ("ilp", "edf"):
        packing = make_policy(name)(Snapshot(0.0, 0.125, (0.0,) * 4, jobs))
        assert {entry.job_ids[0] for entry in packing.entries if entry.start_s == 0.0} == {
            "timed",
            "free0",
            "free1",
        }
        assert packing.set_aside == frozenset()


def test_decode_stays_with_the_latents() -> None:
    phases = (Phase("denoise", 2, {2: 0.1}), Phase("decode", 1, {1: 0.1}))
    late_gpus = Snapshot(0.0, 0.1, (1.0, 1.0, 0.0, 0.0), (Job("a", 0.0, 9.0, 0.0, phases),))
    for name in ("ilp", "edf", "sp2"):
        denoise, decode = make_policy(name)(late_gpus).entries[0], make_policy(name)(late_gpus).entries[-1]
        assert denoise.gpus == (2, 3)
        assert decode.kind == "decode" and set(decode.gpus) <= {2, 3}


# ---- dp -----------------------------------------------------------------------------------------------------


def test_survival_test_and_steps_of_a_round() -> None:
    assert steps_in_round(10, 0.3, 1.0) == 3
    assert steps_in_round(2, 0.3, 1.0) == 2
    board = open_job(job("a", 10, {1: 0.4, 2: 0.25}, 3.0))
    by_degree = {o.degree: o for o in options(board, 0.0, 1.0)}
    # cheapest mix in 3 s: three steps at 1, seven at 2; in a round of 1 s two and four of them
    assert {d: o.steps for d, o in by_degree.items()} == {1: 2, 2: 4}
    assert by_degree[1].survives == (1.0 + 8 * 0.25 <= 3.0)
    assert by_degree[2].survives
    assert options(open_job(job("late", 10, {1: 0.4, 2: 0.25}, 2.0)), 0.0, 1.0) == ()


def test_a_step_longer_than_the_round_runs_all_the_same() -> None:
    (option,) = options(open_job(job("a", 3, {1: 2.0}, 60.0)), 0.0, 0.5)
    assert option.steps == 1
    packing = make_policy("dp")(Snapshot(0.0, 0.5, (0.0,), (job("a", 3, {1: 2.0}, 60.0),)))
    assert [(entry.steps, entry.end_s) for entry in packing.entries] == [(1, 2.0)]


@settings(max_examples=80, deadline=None)
@given(
    groups=st.lists(
        st.lists(
            st.builds(
                Option,
                degree=st.sampled_from([1, 2, 4]),
                steps=st.just(1),
                survives=st.booleans(),
                progress=st.floats(0, 1),
                gpu_seconds=st.floats(0, 3),
            ),
            max_size=2,
        ),
        min_size=1,
        max_size=5,
    ),
    n_gpus=st.integers(1, 6),
    data=st.data(),
)
def test_knapsack_equals_enumeration(groups: list[list[Option]], n_gpus: int, data: st.DataObject) -> None:
    unserved = data.draw(st.lists(st.booleans(), min_size=len(groups), max_size=len(groups)))
    value, picks = group_knapsack(groups, unserved, n_gpus)

    def search(i: int, left: int) -> tuple[int, float, float]:
        if i == len(groups):
            return (0, 0.0, 0.0)
        rest = search(i + 1, left)
        best = (rest[0] + unserved[i], rest[1], rest[2])
        for option in groups[i]:
            if option.degree <= left:
                tail = search(i + 1, left - option.degree)
                best = max(
                    best, (tail[0] + option.survives, tail[1] + option.progress, tail[2] - option.gpu_seconds)
                )
        return best

    assert value[0] == search(0, n_gpus)[0]
    assert value[1] == pytest.approx(search(0, n_gpus)[1], abs=1e-9)
    assert sum(option.degree for option in picks if option) <= n_gpus


# ---- baselines ----------------------------------------------------------------------------------------------


def test_rssp_reproduces_the_degrees_of_the_paper() -> None:
    derived = {
        256: {1: 0.022, 2: 0.034205, 4: 0.036778, 8: 0.039268},
        512: {1: 0.042251, 2: 0.035549, 4: 0.037787, 8: 0.039857},
        1024: {1: 0.153571, 2: 0.095714, 4: 0.058214, 8: 0.04221},
        2048: {1: 0.759796, 2: 0.420343, 4: 0.225908, 8: 0.124598},
    }
    slo_s = {256: 1.5, 512: 2.0, 1024: 3.0, 2048: 5.0}
    degrees = {}
    for side, step_s in derived.items():
        snapshot = Snapshot(0.0, 0.1, (0.0,) * 8, (job("a", 28, step_s, slo_s[side]),))
        degrees[side] = make_policy("rssp")(snapshot).entries[0].degree
    assert degrees == {256: 1, 512: 1, 1024: 2, 2048: 8}


def test_fixed_degree_is_first_come_first_served_and_runs_to_completion() -> None:
    first, second = job("first", 10, MEDIUM, 99.0), job("second", 10, MEDIUM, 1.0, arrival_s=0.1)
    packing = make_policy("sp8")(Snapshot(0.1, 0.1, (0.1,) * 8, (second, first)))
    assert [entry.job_ids[0] for entry in packing.entries] == ["first", "second"]
    assert packing.entries[0].steps == 10
    started = job("second", 4, MEDIUM, 1.0, arrival_s=0.1, gpus=(0, 1))
    packing = make_policy("sp2")(Snapshot(0.2, 0.1, (0.2, 0.2, 9.0, 9.0), (first, started)))
    assert packing.entries[0] == Entry(("second",), "denoise", (0, 1), 4, 0.2, 0.2 + 4 * MEDIUM[2])


def test_fixed_degree_falls_back_to_what_the_shape_allows() -> None:
    snapshot = Snapshot(
        0.0, 0.1, (0.0,) * 8, (job("a", 2, {1: 0.2, 2: 0.15}, 9.0), job("b", 2, {4: 0.2}, 9.0))
    )
    degrees = {e.job_ids[0]: e.degree for e in make_policy("sp8")(snapshot).entries}
    assert degrees == {"a": 2, "b": 4}
    assert {e.job_ids[0]: e.degree for e in make_policy("sp1")(snapshot).entries} == {"a": 1, "b": 4}


def test_edf_serves_the_earliest_deadline_first() -> None:
    jobs = (job("later", 5, {1: 0.2}, 9.0), job("sooner", 5, {1: 0.2}, 2.0))
    packing = make_policy("edf")(Snapshot(0.0, 0.1, (0.0,), jobs))
    assert packing.entries[0].job_ids[0] == "sooner"
    assert finishes(packing)["sooner"] == pytest.approx(1.0)


def test_the_solver_package_imports_no_torch_no_ray() -> None:
    for path in Path(ilp.__file__).parent.glob("*.py"):
        text = path.read_text()
        assert "import torch" not in text and "import ray" not in text, path.name
