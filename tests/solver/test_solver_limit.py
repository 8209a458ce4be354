"""The time limit of `ilp` bounds a decision, whatever the board, and never costs validity."""

from __future__ import annotations

import random
import statistics
import time

import pytest
from schedule_checker import packing_violations

from solver.ilp import IlpPolicy
from solver.problem import Job, Phase, Snapshot

TABLES = (
    {1: 0.022},
    {1: 0.154, 2: 0.096, 4: 0.058, 8: 0.042},
    {1: 0.76, 2: 0.42, 4: 0.226, 8: 0.125},
)
SLACK_S = 0.02
"""What reading the board and a busy machine may add to the limit."""


def overloaded(n_gpus: int, n_open: int, seed: int) -> Snapshot:
    """Far more work than fits: deadlines from barely possible to eight times the least work."""
    rng = random.Random(seed)
    jobs = []
    for i in range(n_open):
        step_s, steps = rng.choice(TABLES), rng.randint(1, 28)
        deadline_s = steps * min(step_s.values()) * rng.uniform(0.8, 8.0)
        jobs.append(Job(f"r{i}", 0.0, deadline_s, 0.0, (Phase("denoise", steps, step_s),), slo_s=deadline_s))
    return Snapshot(0.0, 0.125, (0.0,) * n_gpus, tuple(jobs))


@pytest.mark.parametrize(("n_gpus", "n_open"), [(1, 1), (8, 64), (64, 512)])
@pytest.mark.parametrize("limit_s", [0.0, 1e-6, 0.001])
def test_an_absurd_limit_gives_a_valid_packing_at_once(n_gpus: int, n_open: int, limit_s: float) -> None:
    snapshot = overloaded(n_gpus, n_open, seed=1)
    times_s = []
    for _ in range(5):
        before_s = time.perf_counter()
        packing = IlpPolicy(time_limit_s=limit_s)(snapshot)
        times_s.append(time.perf_counter() - before_s)
        assert packing_violations(snapshot, packing.entries, complete=False) == []
        busy = {gpu for entry in packing.entries if entry.start_s == 0.0 for gpu in entry.gpus}
        assert n_open == 1 or len(busy) == n_gpus, "no GPU waits because the planner had no time"
    assert statistics.median(times_s) < limit_s + SLACK_S * max(1, n_open / 128)


@pytest.mark.parametrize(("n_gpus", "n_open", "limit_s"), [(8, 64, 0.01), (64, 512, 0.05)])
def test_a_decision_ends_at_its_limit(n_gpus: int, n_open: int, limit_s: float) -> None:
    times_s = []
    for seed in range(7):
        snapshot = overloaded(n_gpus, n_open, seed)
        before_s = time.perf_counter()
        packing = IlpPolicy(limit_s)(snapshot)
        times_s.append(time.perf_counter() - before_s)
        assert packing_violations(snapshot, packing.entries, complete=False) == []
    assert statistics.median(times_s) < limit_s + SLACK_S


def test_with_time_to_spare_the_clock_has_no_say() -> None:
    for seed in range(3):
        snapshot = overloaded(8, 24, seed)
        first, second = (IlpPolicy(limit_s)(snapshot) for limit_s in (20.0, 60.0))
        assert first == second
