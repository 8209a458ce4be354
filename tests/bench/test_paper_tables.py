"""What `bench/paper_tables.py` rests on: the exhaustive search and the switches of the ablation."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from solver.knapsack import KnapsackPolicy
from solver.problem import Job, Phase, Snapshot
from tetriserve.profile import Profile
from tetriserve.request import Shape

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))
exhaustive = importlib.import_module("exhaustive")
Block, Exhaustive = exhaustive.Block, exhaustive.Exhaustive

SHAPE = Shape(256, 256)
TWICE = {1: 1.0, 2: 0.5}


@pytest.mark.parametrize("prune", [False, True])
def test_the_search_on_instances_worked_by_hand(prune: bool) -> None:
    def best(requests: list[tuple[int, dict[int, float], float]], n_gpus: int) -> int:
        blocks = [Block(SHAPE, steps, block_s, due_s) for steps, block_s, due_s in requests]
        search = Exhaustive(blocks, n_gpus, 60.0, prune)
        assert search.finished
        return int(search.best)

    assert best([(2, {1: 1.0}, 1.9)], 4) == 0
    # three times two seconds on one GPU within four; a second GPU takes all of them
    assert best([(2, {1: 1.0}, 4.0)] * 3, 1) == 2
    assert best([(2, {1: 1.0}, 4.0)] * 3, 2) == 3
    # one after the other on both GPUs, not side by side: the first is due too soon
    assert best([(2, TWICE, 1.0), (2, TWICE, 2.0)], 2) == 2
    assert best([(2, TWICE, 1.0), (2, TWICE, 1.5)], 2) == 1
    # only a change of degree lets both be on time: one block beside the other request, then two on both GPUs
    assert best([(3, TWICE, 2.5), (1, {1: 1.5}, 1.5)], 2) == 2
    assert best([(3, TWICE, 2.4), (1, {1: 1.5}, 1.5)], 2) == 1
    # giving up the large one saves the two small ones
    assert best([(3, {1: 1.0}, 3.0), (2, {1: 1.0}, 2.0), (1, {1: 1.0}, 3.0)], 1) == 2


def test_pruning_changes_nothing_and_no_packer_is_above_the_optimum() -> None:
    profile = Profile.load(BENCH / "profiles" / "flux_h100_derived.yaml")
    reached = settled = 0
    for seed in range(20):
        n_gpus = (2, 4)[seed % 2]
        requests = exhaustive.instance(2 + seed % 3, n_gpus, seed, profile)
        exact = Exhaustive(requests, n_gpus, 60.0, True)
        few = [Block(r.shape, 2, r.block_s, r.due_s / 2) for r in requests[:2]]
        assert Exhaustive(few, n_gpus, 60.0, True).best == Exhaustive(few, n_gpus, 60.0, False).best
        for name in ("ilp", "dp"):
            on_time = sum(outcome.met for outcome in exhaustive.packed(name, requests, n_gpus).outcomes)
            assert on_time <= exact.best, f"{name} seed {seed}"
            if name == "ilp":
                reached, settled = reached + on_time, settled + exact.best
    assert reached >= 0.9 * settled


def test_out_of_time_the_search_says_so() -> None:
    assert not Exhaustive([Block(SHAPE, 6, TWICE, 99.0)] * 4, 4, 0.01, False).finished


def test_the_switches_of_the_ablation() -> None:
    def gpus(policy: KnapsackPolicy) -> tuple[int, ...]:
        phases = (Phase("denoise", 8, {1: 0.5, 2: 0.3, 4: 0.2}),)
        job = Job("r0", 0.0, 20.0, 0.0, phases, gpus=(2,), slo_s=20.0)
        return policy(Snapshot(0.0, 1.0, (0.0,) * 4, (job,))).entries[0].gpus

    assert gpus(KnapsackPolicy()) == (0, 1, 2, 3)
    assert gpus(KnapsackPolicy(scales_up=False)) == (2,)
    assert gpus(KnapsackPolicy(scales_up=False, keeps_gpus=False)) == (0,)
