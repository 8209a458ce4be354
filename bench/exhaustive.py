"""Single-shot instances and their optimum by exhaustive search, to hold the packers against (paper, Table 6)."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from policies import PLAN_LIMIT_S

from tetriserve.profile import Profile
from tetriserve.request import Shape
from tetriserve.simulation.simulate import Simulation, named_policy, simulate
from tetriserve.simulation.trace import TraceRequest

BLOCKS = 4
"""Step ranges of a request: as many as let two requests on 8 GPUs finish."""
STEPS = 28
SLACK_S = 1e-6


@dataclass(frozen=True)
class Block:
    """A request of a single-shot instance: `blocks` step ranges of `block_s` seconds by degree."""

    shape: Shape
    blocks: int
    block_s: Mapping[int, float]
    due_s: float


class Exhaustive:
    """The most requests that any schedule of whole blocks can have on time, all of them there at time 0.

    A schedule is an order of blocks with a degree each; each takes the GPUs that are free first, as early as it
    can. Going through all orders misses nothing: taken in order of their starts, the blocks of any schedule start no
    later this way. Any GPUs may form a set, so this is never below what aligned sets reach.

    Args:
        prune: skip what cannot beat the best so far, states seen before and orders that go back in time; the
            result is the same.
    """

    def __init__(self, requests: Sequence[Block], n_gpus: int, limit_s: float, prune: bool) -> None:
        self._due_s = [request.due_s + SLACK_S for request in requests]
        self._block_s = [{k: s for k, s in r.block_s.items() if k <= n_gpus} for r in requests]
        self._prune = prune
        self._seen: set[tuple[Any, ...]] = set()
        self._nodes = 0
        self.best = 0
        self.finished = True
        began_s = time.perf_counter()
        self._stop_s = began_s + limit_s
        try:
            self._search(tuple(r.blocks for r in requests), (0.0,) * len(requests), (0.0,) * n_gpus, 0.0)
        except TimeoutError:
            self.finished = False
        self.seconds = time.perf_counter() - began_s

    def _search(
        self, left: tuple[int, ...], ready_s: tuple[float, ...], free_s: tuple[float, ...], last_s: float
    ) -> None:
        self._nodes += 1
        if self._nodes % 1024 == 0 and time.perf_counter() > self._stop_s:
            raise TimeoutError
        on_time = sum(not n and r <= due for n, r, due in zip(left, ready_s, self._due_s, strict=True))
        self.best = max(self.best, on_time)
        todo = [i for i, n in enumerate(left) if n]
        if self._prune:
            todo = [
                i
                for i in todo
                if max(ready_s[i], last_s) + left[i] * min(self._block_s[i].values()) <= self._due_s[i]
            ]
            state = (left, ready_s, free_s, last_s)
            if on_time + len(todo) <= self.best or state in self._seen:
                return
            self._seen.add(state)
        for i in todo:
            for degree, seconds in self._block_s[i].items():
                start_s = max(ready_s[i], free_s[degree - 1])
                if self._prune and start_s < last_s:
                    continue
                end_s = start_s + seconds
                self._search(
                    (*left[:i], left[i] - 1, *left[i + 1 :]),
                    (*ready_s[:i], end_s, *ready_s[i + 1 :]),
                    tuple(sorted((*free_s[degree:], *(end_s,) * degree))),
                    start_s,
                )


def instance(n_requests: int, n_gpus: int, seed: int, profile: Profile) -> list[Block]:
    """Requests of random shapes, due between barely possible and comfortable when alone."""
    rng = random.Random(seed)
    requests = []
    for _ in range(n_requests):
        shape = rng.choice(sorted(profile.step_seconds))
        block_s = {k: STEPS / BLOCKS * s for k, s in profile.step_seconds[shape].items() if k <= n_gpus}
        due_s = BLOCKS * min(block_s.values()) * rng.uniform(1.1, 2.5)
        requests.append(Block(shape, BLOCKS, block_s, due_s))
    return requests


def packed(name: str, requests: Sequence[Block], n_gpus: int) -> Simulation:
    """The same instance under a policy; a block is one step to it."""
    degrees = tuple(k for k in (1, 2, 4, 8) if k <= n_gpus)
    profile = Profile("", "", "", degrees, {r.shape: r.block_s for r in requests})
    trace = [
        TraceRequest(f"r{i}", 0.0, r.shape.height, r.shape.width, r.blocks, slo_s=r.due_s)
        for i, r in enumerate(requests)
    ]
    return simulate(trace, profile, named_policy(name, n_gpus, PLAN_LIMIT_S, round_steps=1.0), n_gpus)
