"""The round state machine under random events: promises 2 to 4 of the design, whatever the policy says."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solver.policies import make_policy
from solver.problem import Entry, Packing, Phase, Shared, Snapshot
from tetriserve.scheduler.assignment import Assignment
from tetriserve.scheduler.committed import QUEUE_DEPTH
from tetriserve.scheduler.rounds import RoundScheduler

N_GPUS = 4
STEP_S = {1: 0.4, 2: 0.25, 4: 0.15}


def chain(steps: int) -> tuple[Phase, ...]:
    return (
        Phase("encode", 1, {1: 0.05}),
        Phase("denoise", steps, STEP_S),
        Phase("decode", 1, {1: 0.1}),
    )


class Dice:
    """Packs jobs in random order at random degrees on random GPUs, behind what is committed."""

    name = "dice"
    round_steps = 2.0
    replans_on_arrival = True

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)

    def __call__(self, snapshot: Snapshot) -> Packing:
        free_at = list(snapshot.free_at_s)
        entries = []
        jobs = list(snapshot.jobs)
        self._dice.shuffle(jobs)
        for job in jobs:
            start_s = job.ready_s
            for phase in job.phases:
                alive = [gpu for gpu in range(len(free_at)) if free_at[gpu] < math.inf]
                degrees = [degree for degree in phase.step_s if degree <= len(alive)]
                if not degrees:
                    break
                degree = self._dice.choice(degrees)
                gpus = tuple(sorted(self._dice.sample(alive, degree)))
                start_s = max(start_s, snapshot.now_s, *(free_at[gpu] for gpu in gpus))
                end_s = start_s + phase.steps * phase.step_s[degree]
                entries.append(Entry((job.id,), phase.kind, gpus, phase.steps, start_s, end_s))
                for gpu in gpus:
                    free_at[gpu] = end_s
                start_s = end_s
        return Packing(tuple(sorted(entries, key=lambda e: e.start_s)))


class Cell:
    """GPUs that run assignments in `after` order with jittered durations."""

    def __init__(self, dice: random.Random, jitter: float) -> None:
        self.dice, self.jitter = dice, jitter
        self.now_s = 0.0
        self.pending: dict[int, Assignment] = {}
        self.ends: dict[int, float] = {}
        self.last_seq = [-1] * N_GPUS
        self.done: dict[str, list[Assignment]] = {}

    def take(self, assignments: tuple[Assignment, ...]) -> None:
        for assignment in assignments:
            assert len(set(assignment.gpus)) == len(assignment.gpus) > 0
            assert assignment.steps >= 1
            self.pending[assignment.seq] = assignment
        for gpu in range(N_GPUS):
            assert sum(gpu in a.gpus for a in self.pending.values()) <= QUEUE_DEPTH
        self.start()

    def start(self) -> None:
        earlier: set[str] = set()  # a range waits for the latents of the one before it
        for seq in sorted(self.pending):
            assignment = self.pending[seq]
            ready = assignment.request_ids[0] not in earlier
            earlier.add(assignment.request_ids[0])
            turn = all(
                self.last_seq[gpu] == after
                for gpu, after in zip(assignment.gpus, assignment.after, strict=True)
            )
            free = not any(set(assignment.gpus) & set(self.pending[s].gpus) for s in self.ends)
            if seq in self.ends or not (turn and free and ready):
                continue
            duration_s = (assignment.end_s - assignment.start_s) * (1 + self.jitter * self.dice.random())
            self.ends[seq] = self.now_s + duration_s

    def finish_next(self) -> Assignment:
        seq = min(self.ends, key=lambda s: (self.ends[s], s))
        self.now_s = max(self.now_s, self.ends.pop(seq))
        assignment = self.pending.pop(seq)
        for gpu in assignment.gpus:
            self.last_seq[gpu] = seq
        return assignment


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_requests=st.integers(1, 8),
    lead_s=st.sampled_from([0.0, 0.03, 0.2]),
    jitter=st.sampled_from([0.0, 0.3]),
    abort_share=st.sampled_from([0.0, 0.2]),
    cancel=st.booleans(),
    lose_gpu=st.booleans(),
)
def test_everything_accepted_is_run_once_and_in_order(
    seed: int, n_requests: int, lead_s: float, jitter: float, abort_share: float, cancel: bool, lose_gpu: bool
) -> None:
    dice = random.Random(seed)
    scheduler = RoundScheduler(Dice(seed), N_GPUS, lead_s=lead_s)
    cell = Cell(dice, jitter)
    arrivals = sorted(dice.uniform(0, 3) for _ in range(n_requests))
    wanted = {f"r{i}": dice.randint(1, 12) for i in range(n_requests)}
    finished: dict[str, float] = {}
    cancelled: set[str] = set()
    aborting: set[str] = set()
    lost: int | None = None
    waiting = list(wanted)
    for _ in range(4000):
        times = [cell.ends[min(cell.ends, key=lambda s: cell.ends[s])]] if cell.ends else []
        times += [arrivals[len(wanted) - len(waiting)]] if waiting else []
        wakeup_s = scheduler.next_wakeup_s(cell.now_s)
        if not times and wakeup_s == math.inf:
            break
        assert wakeup_s > cell.now_s
        now_s = min([*times, wakeup_s])
        if waiting and now_s == arrivals[len(wanted) - len(waiting)]:
            cell.now_s = now_s
            request_id = waiting.pop(0)
            scheduler.arrived(request_id, chain(wanted[request_id]), now_s, now_s + 5)
            if lose_gpu and lost is None and not any(3 in a.gpus for a in cell.pending.values()):
                lost = 3
                scheduler.gpu_lost(3)
        elif cell.ends and now_s == min(cell.ends.values()):
            assignment = cell.finish_next()
            request_id = assignment.request_ids[0]
            behind = any(request_id in a.request_ids for a in cell.pending.values())
            request_open = request_id in scheduler.open_ids
            if request_id in aborting or dice.random() < abort_share:
                # like a failed range: everything committed behind it for this request fails too
                aborting.add(request_id)
                scheduler.aborted(assignment.seq, cell.now_s)
                if not behind:
                    aborting.discard(request_id)
                assert request_open or request_id in cancelled
            else:
                cell.done.setdefault(request_id, []).append(assignment)
                if scheduler.finished(assignment.seq, cell.now_s):
                    finished[request_id] = cell.now_s
            if cancel and dice.random() < 0.1 and scheduler.open_ids:
                victim = dice.choice(scheduler.open_ids)
                cancelled.add(victim)
                assert scheduler.cancelled(victim)
                assert not scheduler.cancelled(victim)
        else:
            cell.now_s = now_s
        plan = scheduler.plan(cell.now_s)
        if lost is not None:
            assert all(lost not in a.gpus for a in plan.assignments)
        cell.take(plan.assignments)
        cell.start()
    else:
        raise AssertionError("requests starve")
    assert not cell.pending and not scheduler.running and not scheduler.open_ids
    assert set(finished) | cancelled == set(wanted)
    for request_id in finished:
        ranges = cell.done[request_id]
        assert ranges[0].kind == "encode" and ranges[-1].kind == "decode"
        denoise = [a for a in ranges if a.kind == "denoise"]
        expected = 0
        for assignment in denoise:
            assert assignment.first_steps == (expected,)
            expected += assignment.steps
        assert expected == wanted[request_id]
        assert sum(a.kind == "encode" for a in ranges) == sum(a.kind == "decode" for a in ranges) == 1


class Alone:
    """Everything at degree 1 on GPU 0, one after the other."""

    name = "alone"
    round_steps = 1.0
    replans_on_arrival = True

    def __call__(self, snapshot: Snapshot) -> Packing:
        entries, t = [], max(snapshot.now_s, snapshot.free_at_s[0])
        for job in snapshot.jobs:
            for phase in job.phases:
                end = t + phase.steps * phase.step_s[1]
                entries.append(Entry((job.id,), phase.kind, (0,), phase.steps, t, end))
                t = end
        return Packing(tuple(entries))


def test_ranges_are_cut_to_whole_steps_that_reach_the_boundary() -> None:
    scheduler = RoundScheduler(Alone(), 1, round_s=1.0)
    scheduler.arrived("a", (Phase("denoise", 10, {1: 0.4}),), 0.0)
    (first,) = scheduler.plan(0.0).assignments
    assert (first.steps, first.start_s, first.end_s) == (3, 0.0, pytest.approx(1.2))
    assert scheduler.next_wakeup_s(0.0) == pytest.approx(1.0)
    assert scheduler.plan(1.0).assignments == ()  # the step in flight is never cut
    assert not scheduler.finished(first.seq, 1.2)
    (second,) = scheduler.plan(1.2).assignments
    assert (second.first_steps, second.steps, second.after) == ((3,), 2, (first.seq,))


def test_lead_queues_the_next_range_before_the_gpu_is_free() -> None:
    scheduler = RoundScheduler(Alone(), 1, round_s=1.0, lead_s=0.1)
    scheduler.arrived("a", (Phase("denoise", 10, {1: 0.5}),), 0.0)
    (first,) = scheduler.plan(0.0).assignments
    assert scheduler.next_wakeup_s(0.0) == pytest.approx(0.9)
    (second,) = scheduler.plan(0.9).assignments
    assert (second.start_s, second.steps, second.after) == (pytest.approx(1.0), 2, (first.seq,))
    scheduler.finished(first.seq, 1.1)  # late by 0.1 s: what is behind moves with it
    assert scheduler.snapshot(1.1).free_at_s == (pytest.approx(2.1),)


class Pair:
    """Encode on GPU 0, then everything at degree 2."""

    name = "pair"
    round_steps = 1.0
    replans_on_arrival = True

    def __call__(self, snapshot: Snapshot) -> Packing:
        entries, t = [], max(snapshot.now_s, *snapshot.free_at_s)
        for job in snapshot.jobs:
            for phase in job.phases:
                gpus = (0,) if phase.kind == "encode" else (0, 1)
                end = t + phase.steps * phase.step_s[len(gpus)]
                entries.append(Entry((job.id,), phase.kind, gpus, phase.steps, t, end))
                t = end
        return Packing(tuple(entries))


def test_a_late_range_moves_what_waits_behind_it_on_all_gpus_alike() -> None:
    scheduler = RoundScheduler(Pair(), 2, round_s=1.0, lead_s=0.1)
    scheduler.arrived("a", (Phase("encode", 1, {1: 0.05}), Phase("denoise", 10, {2: 0.5})), 0.0)
    encode, denoise = scheduler.plan(0.0).assignments
    assert scheduler.snapshot(0.01).free_at_s == pytest.approx((1.05, 1.05))
    assert scheduler.snapshot(0.3).free_at_s == pytest.approx((1.3, 1.3))  # encode is overdue
    scheduler.finished(encode.seq, 0.4)
    snapshot = scheduler.snapshot(0.5)
    assert snapshot.free_at_s == pytest.approx((1.4, 1.4))
    assert snapshot.jobs[0].ready_s == pytest.approx(1.4)
    scheduler.finished(denoise.seq, 0.9)  # sooner than predicted
    assert scheduler.snapshot(0.95).free_at_s == pytest.approx((0.9, 0.9))


def test_a_gpu_lost_while_a_plan_is_in_flight_gets_nothing_of_it() -> None:
    rounds = RoundScheduler(Pair(), 2, round_s=1.0, lead_s=10.0)
    rounds.arrived("a", (Phase("encode", 1, {1: 0.05}), Phase("denoise", 10, {2: 0.5})), 0.0)
    rounds.arrived("b", (Phase("encode", 1, {1: 0.05}), Phase("denoise", 10, {2: 0.5})), 0.0)
    snapshot = rounds.snapshot(0.0)
    packing = rounds.policy(snapshot)
    assert any(1 in entry.gpus for entry in packing.entries)
    rounds.gpu_lost(1)
    rounds.cancelled("b")
    assignments = rounds.commit(snapshot, packing, 0.0).assignments
    assert [(a.kind, a.gpus, a.request_ids) for a in assignments] == [("encode", (0,), ("a",))]
    rounds.finished(assignments[0].seq, 0.1)
    rounds.gpu_back(1, 1.0)
    assert [(a.kind, a.gpus) for a in rounds.plan(1.0).assignments] == [("denoise", (0, 1))]


def test_drop_late_is_reported_once_hopeless() -> None:
    scheduler = RoundScheduler(Alone(), 1)
    scheduler.arrived("a", (Phase("denoise", 10, {1: 0.5}),), 0.0, deadline_s=6.0, drop_late=True)
    assert scheduler.expired(0.9) == []
    assert scheduler.expired(1.1) == ["a"]


def test_reject_infeasible_is_judged_once_by_the_first_plan() -> None:
    policy = make_policy("ilp", time_limit_s=5.0)
    rounds = RoundScheduler(policy, 2)
    steps = (Phase("denoise", 10, {1: 1.0, 2: 0.6}),)  # 6 s at best, 10 s on one GPU
    rounds.arrived("first", steps, 0.0, 12.0, reject_infeasible=True)
    rounds.arrived("second", steps, 0.0, 12.0, reject_infeasible=True)
    rounds.arrived("too many", steps, 0.0, 12.5, reject_infeasible=True)
    rounds.arrived("hopeless", steps, 0.0, 5.0, reject_infeasible=True)
    rounds.arrived("patient", steps, 0.0, 5.0)
    snapshot = rounds.snapshot(0.0)
    packing = policy(snapshot)
    rejected = rounds.infeasible(snapshot, packing)
    assert len(rejected) == 2 and "hopeless" in rejected and "patient" not in rejected
    assert rounds.infeasible(snapshot, packing) == []
    for request_id in rejected:
        rounds.cancelled(request_id)
    plan = rounds.commit(snapshot, packing, 0.0)
    assert {i for a in plan.assignments for i in a.request_ids}.isdisjoint(rejected)


def test_a_plan_that_only_begins_a_request_rejects_nothing() -> None:
    rounds = RoundScheduler(make_policy("dp"), 2)
    rounds.arrived("a", (Phase("denoise", 10, {1: 1.0}),), 0.0, 30.0, reject_infeasible=True)
    snapshot = rounds.snapshot(0.0)
    assert rounds.infeasible(snapshot, rounds.policy(snapshot)) == []


POLICY_NAMES = ["ilp", "dp", "sp1", "sp2", "sp4", "rssp", "edf"]


@pytest.mark.parametrize("too_narrow", [1, 2])
@pytest.mark.parametrize("name", POLICY_NAMES)
def test_after_out_of_memory_only_wider_degrees_are_planned(name: str, too_narrow: int) -> None:
    """From the last confirmed step; the others keep their degrees."""
    rounds = RoundScheduler(make_policy(name), 4)
    rounds.arrived("large", (Phase("denoise", 10, STEP_S), Phase("decode", 1, {1: 0.1})), 0.0, 60.0)
    now_s = 0.0
    (first,) = rounds.plan(now_s).assignments
    now_s = first.end_s
    assert not rounds.finished(first.seq, now_s)
    (failed,) = rounds.plan(now_s).assignments
    rounds.aborted(failed.seq, now_s)
    assert rounds.widened("large", too_narrow, 4)
    rounds.arrived("other", (Phase("denoise", 4, STEP_S),), now_s, now_s + 60.0)
    resumed = {}
    for _ in range(100):
        for assignment in rounds.plan(now_s).assignments:
            (request_id,) = assignment.request_ids
            resumed.setdefault(request_id, assignment)
            assert request_id == "other" or assignment.kind == "decode" or assignment.degree > too_narrow
        if not rounds.running:
            break
        ends_first = min(rounds.running, key=lambda assignment: (assignment.end_s, assignment.seq))
        now_s = max(now_s, ends_first.end_s)
        rounds.finished(ends_first.seq, now_s)
    assert rounds.open_ids == []
    assert resumed["large"].first_steps == (first.steps,)


def test_what_no_degree_can_hold_is_said() -> None:
    rounds = RoundScheduler(Alone(), 4)
    rounds.arrived("a", chain(3), 0.0)
    assert rounds.widened("a", 1, 4) and rounds.stranded(2) == [] and rounds.stranded(1) == ["a"]
    assert not rounds.widened("a", 2, 2)  # degree 4 needs four GPUs
    assert rounds.stranded(2) == []  # a refusal changes nothing
    assert not rounds.widened("a", 4, 4)
    assert not rounds.widened("unknown", 1, 4)


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="n_gpus"):
        RoundScheduler(Alone(), 0)
    with pytest.raises(ValueError, match="round_s"):
        RoundScheduler(Alone(), 1, round_s=-1)
    scheduler = RoundScheduler(Alone(), 1)
    scheduler.arrived("a", chain(1), 0.0)
    with pytest.raises(ValueError, match="already open"):
        scheduler.arrived("a", chain(1), 0.0)
    with pytest.raises(ValueError, match="denoise phase"):
        scheduler.arrived("b", (Phase("denoise", 3, {2: 0.1}),), 0.0)


class Script:
    """Packs what it is told."""

    name = "script"
    round_steps = 2.0
    replans_on_arrival = True

    def __init__(self, *entries: Entry, set_aside: str = "") -> None:
        self._packing = Packing(entries, frozenset(set_aside))

    def __call__(self, snapshot: Snapshot) -> Packing:
        return self._packing


SHARED = {1: Shared(0.4, 0.0, 0.1)}


def test_a_shared_range_moves_all_of_its_requests_on() -> None:
    """Those who are gone by then are left out, the others go on; lost, all of them are planned again."""
    script = Script(Entry(("a", "b", "c", "d"), "denoise", (0,), 3, 0.0, 1.2))
    scheduler = RoundScheduler(script, 1, round_s=10.0, max_batch=4)
    for name, steps in (("a", 3), ("b", 5), ("c", 4), ("d", 4)):
        phases = (
            Phase("denoise", steps, {1: 0.4}, company="all", shared=SHARED),
            Phase("decode", 1, {1: 0.1}),
        )
        scheduler.arrived(name, phases, 0.0)
    scheduler.cancelled("c")
    (first,) = scheduler.plan(0.0).assignments
    assert (first.request_ids, first.first_steps, first.steps) == (("a", "b", "d"), (0, 0, 0), 3)
    assert first.end_s == pytest.approx(3 * 0.4) and first.others == 0
    scheduler.aborted(first.seq, 0.5)
    again = scheduler.plan(0.5).assignments[0]
    assert (again.request_ids, again.first_steps) == (("a", "b", "d"), (0, 0, 0))
    assert not scheduler.finished(again.seq, 1.7)
    assert [job.phases[0].kind for job in scheduler.snapshot(1.7).jobs] == ["decode", "denoise", "denoise"]
    assert scheduler.snapshot(1.7).max_batch == 4
    scheduler.part("b")
    assert [job.phases[0].company for job in scheduler.snapshot(1.7).jobs] == ["", "", "all"]
    scheduler.crowded(3)
    assert scheduler.snapshot(1.7).max_batch == 2


def test_predicted_finish() -> None:
    """From the packing where that has a request to its end, else when all that is open is done."""
    whole = (
        Entry(("a",), "encode", (0,), 1, 0.0, 0.05),
        Entry(("a",), "denoise", (0,), 4, 0.05, 1.65),
        Entry(("a",), "decode", (0,), 1, 3.0, 3.1),  # it waits for something
        Entry(("b",), "encode", (1,), 1, 0.0, 0.05),
    )
    scheduler = RoundScheduler(Script(*whole, set_aside="b"), 2, round_s=10.0)
    two = tuple(Phase(p.kind, p.steps, {d: s for d, s in p.step_s.items() if d <= 2}) for p in chain(4))
    for name in "ab":
        scheduler.arrived(name, two, 0.0)
    alone_s = 0.05 + 4 * 0.25 + 0.1
    assert scheduler.predictions.finish_s("c", 0.0) == math.inf
    assert scheduler.predictions.finish_s("a", 0.0) == pytest.approx(
        0.05 + 4 * 0.4 + 0.1
    )  # both, on two GPUs
    plan = scheduler.plan(0.0)
    assert scheduler.predictions.finish_s("a", 0.0) == pytest.approx(3.1)
    assert alone_s <= scheduler.predictions.finish_s("b", 0.0) < 3.1
    # never before what is left could end at best
    assert scheduler.predictions.finish_s("a", 50.0) > 51.0
    # all of it committed: the end of what runs
    for entry in whole[1:3]:
        for assignment in plan.assignments:
            scheduler.finished(assignment.seq, 4.0)
        scheduler.policy = Script(entry)
        plan = scheduler.plan(4.0)
    assert [(assignment.kind, assignment.others) for assignment in plan.assignments] == [("decode", 1)]
    assert scheduler.predictions.finish_s("a", 4.0) == pytest.approx(4.1)
    for gpu in (0, 1):
        scheduler.gpu_lost(gpu)
    scheduler.plan(4.0)
    assert scheduler.predictions.finish_s("b", 4.0) == math.inf


def cheap_chain(steps: int) -> tuple[Phase, ...]:
    return tuple(Phase(p.kind, 2 if p.kind == "denoise" else 1, p.step_s) for p in chain(steps))


@pytest.mark.parametrize(
    ("slo_s", "others", "steps"),
    [
        (20.0, 0, 10),  # in time as it is
        (1.2, 0, 2),  # only with fewer steps
        (0.3, 0, 10),  # not even so: then it is not made worse for nothing
        (math.inf, 0, 10),
        (8.0, 6, 2),  # in time alone, but not behind the others
    ],
)
def test_a_cheaper_chain_is_taken_where_the_deadline_would_be_missed(
    slo_s: float, others: int, steps: int
) -> None:
    rounds = RoundScheduler(make_policy("edf"), 1)
    for index in range(others):
        rounds.arrived(f"other {index}", chain(5), 0.0, 0.1 + index)
    deadline_s = 0.0 + slo_s
    rounds.arrived("r", chain(10), 0.0, deadline_s, cheaper=cheap_chain(10))
    now_s, ran = 0.0, {"r": 0}
    while rounds.open_ids:
        for assignment in rounds.plan(now_s).assignments:
            if assignment.request_ids == ("r",) and assignment.kind == "denoise":
                ran["r"] += assignment.steps
        running = rounds.running
        if running:
            now_s = max(now_s, running[0].end_s)
            rounds.finished(running[0].seq, now_s)
        else:
            now_s = rounds.next_wakeup_s(now_s)
    assert ran["r"] == steps


def test_what_has_begun_stays_as_it_is() -> None:
    rounds = RoundScheduler(make_policy("edf"), 1)
    rounds.arrived("r", chain(10), 0.0, 20.0, cheaper=cheap_chain(10))
    (first,) = rounds.plan(0.0).assignments
    assert first.kind == "encode"
    rounds.arrived("urgent", chain(40), 0.0, 16.5)
    rounds.finished(first.seq, 0.05)
    rounds.plan(0.05)
    assert sum(phase.steps for phase in rounds.phases_of("r")) == 12


def test_how_many_will_be_done_before_is_counted_as_each_would_count_it() -> None:
    """Also by one who came since the last decision."""
    rounds = RoundScheduler(make_policy("edf"), 1)
    dice = random.Random(0)
    for index in range(12):
        rounds.arrived(f"r{index}", chain(dice.randint(1, 9)), 0.0, dice.uniform(1, 40))
    rounds.plan(0.0)
    rounds.arrived("late comer", chain(1), 0.0, 0.1)
    ends_s = {name: rounds.predictions.finish_s(name, 0.0) for name in rounds.open_ids}
    assert len(set(ends_s.values())) > 6
    for name, own_s in ends_s.items():
        assert rounds.predictions.ahead(name, 0.0) == sum(end_s < own_s for end_s in ends_s.values())
