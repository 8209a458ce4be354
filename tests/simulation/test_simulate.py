"""The simulator: valid schedules under every policy, the result contract, disturbances, views, the command line."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from schedule_checker import Chain, violations

from solver.bound import Known, clairvoyant_bound
from solver.policies import POLICIES, make_policy
from solver.problem import Entry, Packing, Phase, Snapshot
from tetriserve.errors import ConfigError, TetriserveError
from tetriserve.profile import Profile
from tetriserve.request import Shape
from tetriserve.simulation.result import Outcome, result_of
from tetriserve.simulation.simulate import Disturbance, Simulation, named_policy, simulate
from tetriserve.simulation.timeline import timeline
from tetriserve.simulation.trace import TraceRequest, write_trace
from tetriserve.simulation.workload import SloRule, Workload, parse_shapes

PROFILES = Path(__file__).parents[2] / "bench" / "profiles"
H100 = PROFILES / "flux_h100_derived.yaml"
PATIENT_S = 10.0
"""Planning limit that nothing here reaches, so that outcomes do not depend on the machine's speed."""
SIZES = (Shape(256, 256), Shape(512, 512), Shape(1024, 1024))


def random_profile(rng: random.Random) -> Profile:
    """Three sizes with more or less speed-up at two or more degrees, with or without encode and decode."""
    degrees = tuple(rng.choice([(1, 2), (1, 2, 4), (1, 3, 4), (1, 2, 4, 8)]))
    steps = {}
    for shape, base_s in zip(SIZES, (0.05, 0.2, 0.7), strict=True):
        gain = rng.uniform(0.0, 0.95)
        times = {degree: base_s * rng.uniform(0.8, 1.2) / degree**gain for degree in degrees}
        steps[shape] = times
    ends = {shape: rng.uniform(0.01, 0.1) for shape in SIZES} if rng.random() < 0.5 else {}
    return Profile("m", "d", "made up", degrees, steps, encode_seconds=ends, decode_seconds=ends)


def random_trace(rng: random.Random, profile: Profile, n_gpus: int) -> list[TraceRequest]:
    """Tight enough that not all can be on time."""
    trace, now_s = [], 0.0
    for index in range(rng.randint(2, 12)):
        now_s += rng.choice([0.0, rng.expovariate(2.0)])
        shape = rng.choice(SIZES)
        request = TraceRequest(f"r{index}", now_s, shape.height, shape.width, rng.randint(1, 9))
        alone_s = SloRule(times_best=rng.uniform(0.9, 4.0)).slo_s(request, profile, n_gpus)
        late = rng.random() < 0.2
        trace.append(TraceRequest(**{**request.__dict__, "slo_s": alone_s, "drop_late": late}))
    return trace


def faults(
    done: Simulation, trace: list[TraceRequest], profile: Profile, n_gpus: int, shortest: float = 1.0
) -> list[str]:
    """What the independent checker says; `shortest` is how short a step may be as a share of the profile's."""
    finished = {outcome.id for outcome in done.outcomes if outcome.finish_s is not None}
    chains = {}
    for request in trace:
        phases = tuple(
            Phase(phase.kind, phase.steps, {d: shortest * s for d, s in phase.step_s.items()})
            for phase in request.chain(profile, n_gpus)
        )
        chains[request.id] = Chain(request.arrival_s, phases)
    entries = [Entry(e.request_ids, e.kind, e.gpus, e.steps, e.start_s, e.end_s) for e in done.schedule]
    whole = {name: chain for name, chain in chains.items() if name in finished}
    part = {name: chain for name, chain in chains.items() if name not in finished}
    return violations([e for e in entries if e.job_ids[0] in whole], whole, n_gpus) + violations(
        [e for e in entries if e.job_ids[0] in part], part, n_gpus, complete=False
    )


@pytest.mark.parametrize("name", POLICIES)
def test_every_schedule_is_valid_and_none_beats_the_bound(name: str) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        n_gpus = rng.choice([1, 2, 4, 6, 8])
        profile = random_profile(rng)
        trace = random_trace(rng, profile, n_gpus)
        done = simulate(trace, profile, make_policy(name, time_limit_s=PATIENT_S), n_gpus)
        assert faults(done, trace, profile, n_gpus) == [], f"seed {seed}"
        dropped = {o.id for o in done.outcomes if o.finish_s is None}
        assert dropped <= {r.id for r in trace if r.drop_late}, f"seed {seed}"
        known = [Known(r.arrival_s, r.deadline_s, r.chain(profile, n_gpus)) for r in trace]
        best = clairvoyant_bound(known, n_gpus)
        assert best.is_optimal
        assert sum(o.met for o in done.outcomes) <= best.on_time, f"seed {seed}"


@pytest.mark.parametrize("name", POLICIES)
def test_disturbed_runs_are_valid_and_a_function_of_the_seed(name: str) -> None:
    for seed in range(8):
        rng = random.Random(seed)
        profile = random_profile(rng)
        trace = random_trace(rng, profile, 8)
        disturbance = Disturbance(switch_s=0.01, jitter=0.2, seed=seed)
        one, two = (
            simulate(trace, profile, make_policy(name, time_limit_s=PATIENT_S), 8, disturbance=disturbance)
            for _ in range(2)
        )
        assert one.schedule == two.schedule and one.outcomes == two.outcomes
        assert faults(one, trace, profile, 8, shortest=0.2) == [], f"seed {seed}"


class Hopper:
    """One step at a time, on GPU 0 and 1 in turn."""

    name = "hopper"
    round_steps = 1.0
    replans_on_arrival = True

    def __call__(self, snapshot: Snapshot) -> Packing:
        job = snapshot.jobs[0]
        gpu = 1 - job.gpus[0] if job.gpus else 0
        start_s = max(snapshot.now_s, job.ready_s)
        step_s = job.phases[0].step_s[1]
        return Packing((Entry((job.id,), job.phases[0].kind, (gpu,), 1, start_s, start_s + step_s),))


class Refuser(Hopper):
    name = "refuser"

    def __call__(self, snapshot: Snapshot) -> Packing:
        return Packing(())


def tiny(**fields: Any) -> tuple[list[TraceRequest], Profile]:
    profile = Profile("m", "d", "made up", (1,), {Shape(256, 256): {1: 0.1}})
    return [TraceRequest("r0", 1.0, 256, 256, 5, **{"slo_s": 1.0, **fields})], profile


def test_switching_costs_once_for_every_change_of_gpus() -> None:
    trace, profile = tiny()
    free = simulate(trace, profile, Hopper(), 2)
    assert [entry.gpus for entry in free.schedule] == [(0,), (1,), (0,), (1,), (0,)]
    assert free.outcomes[0].finish_s == pytest.approx(1.5)
    dear = simulate(trace, profile, Hopper(), 2, disturbance=Disturbance(switch_s=0.02))
    assert dear.outcomes[0].finish_s == pytest.approx(1.5 + 4 * 0.02)
    still = simulate(trace, profile, make_policy("sp1"), 2, disturbance=Disturbance(switch_s=0.02))
    assert still.outcomes[0].finish_s == pytest.approx(1.5)


def test_jitter_has_its_mean_and_spread() -> None:
    _, profile = tiny()
    many = [TraceRequest(f"r{i}", float(i), 256, 256, 1, slo_s=1.0) for i in range(2000)]
    done = simulate(many, profile, make_policy("sp1"), 1, disturbance=Disturbance(jitter=0.1, seed=1))
    seconds = [entry.end_s - entry.start_s for entry in done.schedule]
    mean_s = sum(seconds) / len(seconds)
    spread_s = (sum((s - mean_s) ** 2 for s in seconds) / len(seconds)) ** 0.5
    assert mean_s == pytest.approx(0.1, rel=0.01) and spread_s == pytest.approx(0.01, rel=0.1)


def test_hopeless_requests_are_dropped_only_when_they_say_so() -> None:
    trace, profile = tiny(slo_s=0.4, drop_late=True)
    done = simulate(trace, profile, make_policy("ilp"), 1)
    assert done.outcomes[0].finish_s is None and not done.outcomes[0].met and not done.schedule
    trace, profile = tiny(slo_s=0.4)
    assert simulate(trace, profile, make_policy("ilp"), 1).outcomes[0].finish_s == pytest.approx(1.5)


def test_a_policy_that_starves_requests_is_found_out() -> None:
    trace, profile = tiny()
    with pytest.raises(TetriserveError, match="refuser starves r0"):
        simulate(trace, profile, Refuser(), 2)


def test_encode_and_decode_run_where_the_profile_has_them() -> None:
    trace, profile = tiny()
    ends = {Shape(256, 256): 0.3}
    profile = Profile("m", "d", "made up", (1,), profile.step_seconds, ends, {Shape(256, 256): 0.2})
    done = simulate(trace, profile, make_policy("ilp"), 2)
    assert [entry.kind for entry in done.schedule][0 :: len(done.schedule) - 1] == ["encode", "decode"]
    assert done.outcomes[0].finish_s == pytest.approx(1.0 + 0.3 + 0.5 + 0.2)


def test_shapes_and_policies_that_do_not_fit_are_refused() -> None:
    trace, profile = tiny()
    with pytest.raises(ConfigError, match="512x512 is outside the profile"):
        simulate([TraceRequest("r0", 0.0, 512, 512, 5)], profile, make_policy("ilp"), 1)
    wide = Profile("m", "d", "made up", (4,), {Shape(256, 256): {4: 0.1}})
    with pytest.raises(ConfigError, match="no degree for 256x256 fits on 2 GPUs"):
        simulate(trace, wide, make_policy("ilp"), 2)
    with pytest.raises(ConfigError, match="sp8 needs 8 GPUs"):
        named_policy("sp8", 4, 1.0)
    with pytest.raises(ConfigError, match="unknown policy"):
        named_policy("magic", 4, 1.0)
    assert named_policy("dp", 4, 1.0, round_steps=3.5).round_steps == 3.5


def small_run() -> dict[str, Any]:
    profile = Profile.load(H100)
    slo = SloRule.parse("256x256=1.5,2048x2048=5")
    trace = Workload("uniform", 30, 12, parse_shapes("256x256,2048x2048"), slo, seed=2).generate()
    done = simulate(trace, profile, make_policy("ilp", time_limit_s=PATIENT_S), 8)
    return result_of("ilp", 8, done.outcomes, done.schedule, done.plan_ms)


def test_result_has_exactly_the_keys_of_the_contract() -> None:
    result = small_run()
    result = json.loads(json.dumps(result))
    assert set(result) == {"summary", "requests", "schedule"}
    assert set(result["summary"]) == set(
        "policy slo_attainment goodput_rps mean_s p50_s p95_s p99_s gpu_utilisation gpu_seconds plan_ms_p50 "
        "plan_ms_p99 by_shape lateness_mean_s lateness_p99_s slowdown_mean slowdown_p99".split()
    )
    assert set(result["summary"]["by_shape"]) == {"256x256", "2048x2048"}
    assert all(set(row) == {"id", "arrival_s", "finish_s", "slo_s", "met"} for row in result["requests"])
    assert all(
        set(row) == {"start_s", "end_s", "gpus", "request_ids", "steps", "kind", "component"}
        for row in result["schedule"]
    )
    met = sum(row["met"] for row in result["requests"])
    assert result["summary"]["slo_attainment"] == met / 12
    busy = sum((row["end_s"] - row["start_s"]) * len(row["gpus"]) for row in result["schedule"])
    assert result["summary"]["gpu_seconds"] == pytest.approx(busy)
    assert 0 < result["summary"]["gpu_utilisation"] <= 1
    assert sum(row["steps"] for row in result["schedule"]) == 12 * 28


def test_lateness_is_of_late_ones_and_slowdown_of_all_that_finished() -> None:
    shape = Shape(256, 256)
    outcomes = [
        Outcome("on time", shape, 0.0, 2.0, 1.5, 1.0),
        Outcome("late", shape, 1.0, 2.0, 7.0, 2.0),
        Outcome("later", shape, 2.0, 2.0, 10.0, 2.0),
        Outcome("dropped", shape, 3.0, 2.0, None, 1.0),
        Outcome("nobody knows", shape, 4.0, math.inf, 5.0),
    ]
    summary = result_of("ilp", 1, outcomes, [], (0.0, 0.0))["summary"]
    assert summary["lateness_mean_s"] == pytest.approx((4 + 6) / 2)
    assert summary["lateness_p99_s"] == pytest.approx(6, abs=0.05)
    assert summary["slowdown_mean"] == pytest.approx((1.5 + 3 + 4) / 3)
    nobody = result_of("ilp", 1, outcomes[:1], [], (0.0, 0.0))["summary"]
    assert nobody["lateness_mean_s"] is nobody["lateness_p99_s"] is None


def test_timeline_says_what_the_schedule_says() -> None:
    result = small_run()
    events = json.loads(json.dumps(timeline({0: result})))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    expected = [
        (gpu, " + ".join(row["request_ids"]), row["start_s"] * 1e6, (row["end_s"] - row["start_s"]) * 1e6)
        for row in result["schedule"]
        for gpu in row["gpus"]
    ]
    found = [(event["tid"], event["name"], event["ts"], event["dur"]) for event in slices]
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert [x for row in found for x in row[2:]] == pytest.approx([x for row in expected for x in row[2:]])
    starts = {event["name"]: event["ts"] for event in events if event["ph"] == "b"}
    ends = {event["name"]: event["ts"] for event in events if event["ph"] == "e"}
    assert starts == {row["id"]: row["arrival_s"] * 1e6 for row in result["requests"]}
    assert ends == {row["id"]: row["finish_s"] * 1e6 for row in result["requests"]}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tetriserve.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_writes_result_timeline_and_board(tmp_path: Path) -> None:
    trace, _ = tiny()
    write_trace(tmp_path / "t.jsonl", trace)
    files = [tmp_path / name for name in ("result.json", "timeline.json", "board.png")]
    arguments = [
        "--profile",
        str(H100),
        "--trace",
        str(tmp_path / "t.jsonl"),
        "--policy",
        "dp",
        "--gpus",
        "4",
    ]
    views = ["--out", str(files[0]), "--timeline", str(files[1]), "--plot", str(files[2])]
    done = run("simulate", *arguments, *views, "--round-steps", "3", "--switch-ms", "2", "--jitter", "0.03")
    assert done.returncode == 0, done.stderr
    assert "100.0%" in done.stdout and "policy dp" in done.stdout
    assert json.loads(files[0].read_text())["summary"]["slo_attainment"] == 1.0
    assert json.loads(files[1].read_text())["traceEvents"]
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_the_command_says_why_a_request_ran_as_it_did(tmp_path: Path) -> None:
    """Alone on 8 GPUs, then beside one whose deadline takes all of them."""
    trace = [
        TraceRequest("calm", 0.0, 1024, 1024, 10, slo_s=5.0, drop_late=True),
        TraceRequest("hurried", 5.0, 2048, 2048, 10, slo_s=1.4),
        TraceRequest("hopeless", 5.1, 2048, 2048, 10, slo_s=1.3, drop_late=True),
    ]
    write_trace(tmp_path / "t.jsonl", trace)
    files = ["--trace", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "result.json")]

    def why(name: str) -> list[str]:
        done = run("simulate", "--profile", str(H100), *files, "--policy", "ilp", "--verbose", name)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\n\n")[1].splitlines()

    title, _, only, end = why("calm")
    assert title == "calm  1024x1024  10 steps  deadline 5 s"
    assert "1 would be in time for" in only and only.endswith("no other request was open")
    assert end.startswith("  done after ") and end.endswith("s before the deadline")
    hurried = why("hurried")
    assert " 0,1,2,3,4,5,6,7 " in hurried[2]
    assert hurried[2].endswith("s late, 8 is the cheapest in time")
    assert why("hopeless")[-1] == "  given up"


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    good, empty, huge = tmp_path / "t.jsonl", tmp_path / "empty.jsonl", tmp_path / "huge.jsonl"
    write_trace(good, tiny()[0])
    empty.touch()
    write_trace(huge, [TraceRequest("r0", 0.0, 8192, 8192, 5, slo_s=1.0)])
    out = str(tmp_path / "result.json")
    for trace, more, says in [
        (empty, [], "no requests"),
        (huge, [], "outside the profile"),
        (good, ["--policy", "magic"], "unknown policy"),
        (good, ["--policy", "sp8", "--gpus", "4"], "needs 8 GPUs"),
        (good, ["--slo", "soon"], "--slo"),
        (good, ["--out", str(tmp_path / "no" / "where.json")], "no such folder"),
        (good, ["--out", str(tmp_path)], "is a folder"),
        (good, ["--plot", str(tmp_path / "board.txt")], "suffix"),
        (good, ["--profile", str(tmp_path / "none.yaml")], "none.yaml"),
        (good, ["--verbose", "r9"], "r9: "),
    ]:
        done = run("simulate", "--profile", str(H100), "--trace", str(trace), "--out", out, *more)
        assert done.returncode == 2 and done.stdout == "", done.stderr
        [line] = done.stderr.splitlines()
        assert line.startswith("tetriserve: error: ") and says in line


def test_plot_without_matplotlib_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tetriserve.simulation.plot import draw_board

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="needs matplotlib"):
        draw_board({}, 1, tmp_path / "board.png")
