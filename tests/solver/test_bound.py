"""The clairvoyant bound: never below what a schedule reaches, exact where that can be worked out by hand."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from solver.bound import Known, clairvoyant_bound, hull, independent_groups, windows
from solver.problem import Phase, Shared
from tetriserve.profile import Profile
from tetriserve.simulation.trace import TraceRequest, write_trace
from tetriserve.simulation.workload import SloRule, Workload, parse_shapes

PROFILES = Path(__file__).parents[2] / "bench" / "profiles"
ONE = {1: 1.0}


def known(arrival_s: float, deadline_s: float, steps: int, step_s: dict[int, float]) -> Known:
    return Known(arrival_s, deadline_s, (Phase("denoise", steps, step_s),))


def test_worked_by_hand() -> None:
    # three requests of 2 s of work each, due after 4 s on one GPU: two fit
    best = clairvoyant_bound([known(0, 4, 2, ONE)] * 3, 1)
    assert (best.on_time, best.found, best.is_optimal) == (2, 2, True)
    assert best.gpu_seconds == pytest.approx(4.0, abs=1e-3)
    # with room in different windows all fit; capacity before an arrival is of no use to it
    assert clairvoyant_bound([known(0, 4, 2, ONE), known(0, 4, 2, ONE), known(3, 6, 2, ONE)], 1).on_time == 3
    assert (
        clairvoyant_bound([known(0, 4, 2, ONE), known(3.9, 6, 2, ONE), known(4, 6, 1, ONE)], 1).on_time == 2
    )
    # one request can never use two windows' time at once: 3 steps of 1 s need 3 s however many GPUs there are
    assert clairvoyant_bound([known(0, 2.9, 3, ONE)], 8).on_time == 0


def test_the_least_gpu_seconds_are_those_of_the_cheapest_mix() -> None:
    # 10 steps in 15 s: 5 at 2 s on one GPU and 5 at 1 s on four
    best = clairvoyant_bound([known(0, 15, 10, {1: 2.0, 4: 1.0})], 4)
    assert best.gpu_seconds == pytest.approx(5 * 2 + 5 * 4, abs=1e-3)
    assert clairvoyant_bound([known(0, 20, 10, {1: 2.0, 4: 1.0})], 4).gpu_seconds == pytest.approx(
        20, abs=1e-3
    )


def test_phases_share_the_time_of_their_request() -> None:
    chain = (Phase("encode", 1, ONE), Phase("denoise", 2, {1: 1.0, 2: 0.6}), Phase("decode", 1, ONE))
    assert clairvoyant_bound([Known(0, 3.3, chain)], 2).on_time == 1
    assert clairvoyant_bound([Known(0, 3.1, chain)], 2).on_time == 0


def test_degrees_that_no_mix_needs_are_left_out() -> None:
    def seconds(step_s: dict[int, float], n_gpus: int) -> dict[int, float]:
        return {d: s for d, (s, _) in hull(Phase("denoise", 1, step_s), n_gpus).items()}

    assert seconds({1: 1.0, 2: 1.1, 4: 0.9, 8: 0.2}, 8) == {1: 1.0, 8: 0.2}
    assert seconds({1: 1.0, 2: 0.5, 4: 0.4}, 8) == {2: 0.5, 4: 0.4}
    assert seconds({1: 1.0, 2: 0.6, 4: 0.4, 8: 0.3}, 4) == {1: 1.0, 2: 0.6, 4: 0.4}
    shared = {1: Shared(1.0, 0.0, 0.3), 2: Shared(0.6, 0.0, 0.2)}
    phase = Phase("denoise", 1, {1: 1.0, 2: 0.6}, company="all", shared=shared)
    assert hull(phase, 8) == {1: (1.0, 0.3), 2: (0.6, 0.4)}


def test_groups_are_split_where_nobody_is_open() -> None:
    one, two, three = known(0, 2, 1, ONE), known(1, 3, 1, ONE), known(5, 6, 1, ONE)
    assert independent_groups([three, one, two]) == [[one, two], [three]]


def test_merged_windows_only_loosen_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(8):
        rng = random.Random(seed)
        trace = []
        for _ in range(14):
            arrival_s = rng.uniform(0, 12)
            trace.append(
                known(arrival_s, arrival_s + rng.uniform(1.5, 6), rng.randint(1, 5), {1: 0.9, 2: 0.5})
            )
        fine = clairvoyant_bound(trace, 2)
        monkeypatch.setattr("solver.bound.MAX_CELLS", 30)
        coarse = clairvoyant_bound(trace, 2)
        monkeypatch.undo()
        assert coarse.on_time >= fine.on_time
    assert len(windows(trace, 10**9)) == 27 and len(windows(trace, 30)) < 27


def test_out_of_time_the_bound_is_still_a_bound() -> None:
    profile = Profile.load(PROFILES / "flux_l20.yaml")
    shapes = parse_shapes("256x256,512x512,1024x1024,2048x2048")
    slo = SloRule.parse("2.5x")
    trace = Workload("uniform", 60, 30, shapes, slo, seed=1, profile=profile).generate()
    requests = [Known(r.arrival_s, r.deadline_s, r.chain(profile, 8)) for r in trace]
    exact = clairvoyant_bound(requests, 8, time_limit_s=60)
    hasty = clairvoyant_bound(requests, 8, time_limit_s=0.01)
    assert exact.found <= exact.on_time <= hasty.on_time <= 30
    assert hasty.found <= exact.on_time and hasty.gpu_seconds >= 0


def test_close_to_the_figures_of_the_design_page() -> None:
    profile = Profile.load(PROFILES / "flux_h100_derived.yaml")
    shapes = parse_shapes("256x256,512x512,1024x1024,2048x2048")
    slo = SloRule.parse("256x256=1.5,512x512=2,1024x1024=3,2048x2048=5")
    for mix, published in (("uniform", 0.976), ("skewed", 0.930)):
        found = []
        for seed in range(3):
            trace = Workload(mix, 12, 300, shapes, slo, seed=seed).generate()
            requests = [Known(r.arrival_s, r.deadline_s, r.chain(profile, 8)) for r in trace]
            found.append(clairvoyant_bound(requests, 8).slo_attainment)
        assert sum(found) / len(found) == pytest.approx(published, abs=0.02)


def test_the_command(tmp_path: Path) -> None:
    def bound(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tetriserve.cli", "bound", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    trace = [TraceRequest(f"r{i}", 0.0, 2048, 2048, 28, slo_s=5.0) for i in range(2)]
    write_trace(tmp_path / "t.jsonl", trace)
    profile = str(PROFILES / "flux_h100_derived.yaml")
    done = bound("--profile", profile, "--trace", str(tmp_path / "t.jsonl"), "--gpus", "8")
    assert done.returncode == 0 and "at most 0.5000: 1 of 2" in done.stdout, done.stderr
    done = bound("--profile", profile, "--trace", str(tmp_path / "none.jsonl"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
