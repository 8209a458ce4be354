"""Which concrete GPU sets a degree may use, and which of them to take.

Every set a process group needs should exist before serving starts, and all C(8, k) sets are too many (TetriServe
paper, section 5 of our notes). Aligned power-of-two blocks are few and nest, so that widths which fit by count fit by
place on an empty board. On one node a four may be any two pairs: 11 groups instead of 7 on 8 GPUs, and two halves
that are idle apart are no longer wasted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

NODE_GPUS = 8
"""On larger boards fours are aligned like the rest: the sets would be too many to build and to look through."""


@dataclass(frozen=True)
class GpuSet:
    """A GPU set that a degree may use.

    Attributes:
        mask: bit g is set when GPU g belongs to it.
        parents: masks of the larger power-of-two sets around it, narrowest first.
    """

    gpus: tuple[int, ...]
    mask: int
    parents: tuple[int, ...]


def mask_of(gpus: Sequence[int]) -> int:
    return sum(1 << gpu for gpu in gpus)


@lru_cache(maxsize=1024)
def gpu_sets(n_gpus: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """The GPU sets that `degree` may use on `n_gpus` GPUs.

    A power of two gets its aligned blocks, a four on one node any two aligned pairs; another degree gets the
    windows at the start and at the end of the blocks of the next power of two, clipped to the GPUs there are.
    Empty when the degree does not fit. Raises ValueError for a degree below 1.
    """
    if degree < 1:
        raise ValueError(f"degree must be at least 1, got {degree}")
    if degree == 4 and n_gpus <= NODE_GPUS:
        return tuple(first + second for first, second in combinations(gpu_sets(n_gpus, 2), 2))
    block = 1 << (degree - 1).bit_length()
    sets: dict[tuple[int, ...], None] = {}
    for start in range(0, n_gpus, block):
        end = min(start + block, n_gpus)
        if end - start >= degree:
            sets[tuple(range(start, start + degree))] = None
            sets[tuple(range(end - degree, end))] = None
    return tuple(sets)


def group_sets(n_gpus: int) -> tuple[tuple[int, ...], ...]:
    """All power-of-two sets of at least two GPUs: the process groups to build before serving."""
    degrees = [1 << power for power in range(1, n_gpus.bit_length())]
    return tuple(gpus for degree in degrees for gpus in gpu_sets(n_gpus, degree))


@lru_cache(maxsize=1024)
def sets_of(n_gpus: int, degree: int) -> tuple[GpuSet, ...]:
    """`gpu_sets` with masks, for the packers."""
    blocks = [mask_of(gpus) for gpus in group_sets(n_gpus)]
    sets = []
    for gpus in gpu_sets(n_gpus, degree):
        mask = mask_of(gpus)
        parents = tuple(block for block in blocks if block & mask == mask and block != mask)
        sets.append(GpuSet(gpus, mask, parents))
    return tuple(sets)


def choose(sets: Sequence[GpuSet], idle: int, previous: int) -> GpuSet | None:
    """The set inside `idle` that keeps most of the `previous` GPUs, then breaks up the least free space.

    Args:
        idle: mask of the GPUs that may be used.
        previous: mask of the request's last GPUs, which hold its latents.
    """
    best: GpuSet | None = None
    best_key = (0, 0)
    for candidate in sets:
        if candidate.mask & ~idle:
            continue
        kept = (candidate.mask & previous).bit_count()
        broken = sum(1 for parent in candidate.parents if not parent & ~idle)
        key = (-kept, broken)
        if best is None or key < best_key:
            best, best_key = candidate, key
    return best


@lru_cache(maxsize=1 << 17)
def _choose_on_node(n_gpus: int, degree: int, idle: int, previous: int) -> GpuSet | None:
    """`choose`, remembered: a node has few states and look-aheads come back to them all the time."""
    return choose(sets_of(n_gpus, degree), idle, previous)


@dataclass(frozen=True)
class Blocks:
    """The aligned blocks of a board as bits, so that a free one is found by a few shifts.

    Attributes:
        starts: for each power-of-two width, the mask of the first GPUs of its blocks.
        sets: the sets of the powers of two, by width and first GPU.
        masks: the masks of all of these sets.
    """

    n_gpus: int
    starts: tuple[tuple[int, int], ...]
    sets: Mapping[int, Mapping[int, GpuSet]]
    masks: frozenset[int]

    def find(self, degree: int, idle: int, previous: int) -> GpuSet | None:
        """What `choose` takes out of `sets_of(n_gpus, degree)`."""
        if self.n_gpus <= NODE_GPUS:
            return _choose_on_node(self.n_gpus, degree, idle, previous)
        if degree not in self.sets or (previous & idle and previous not in self.masks):
            return choose(sets_of(self.n_gpus, degree), idle, previous)
        fits, touched = idle, previous
        for width, starts in self.starts:
            if width > degree:
                break
            fits &= fits >> width // 2 & starts
            touched = (touched | touched >> width // 2) & starts
        if not fits:
            return None
        # blocks nest: those that touch a previous block keep equally many of its GPUs
        left = fits & touched or fits
        larger = fits
        for width, starts in self.starts:
            if width <= degree:
                continue
            larger &= larger >> width // 2 & starts
            outside = left & ~(larger * ((1 << width) - 1))
            if outside or not larger:
                left = outside or left
                break
        return self.sets[degree][(left & -left).bit_length() - 1]


@lru_cache(maxsize=64)
def blocks_of(n_gpus: int) -> Blocks:
    widths = [1 << power for power in range(n_gpus.bit_length())]
    sets = {width: {one.gpus[0]: one for one in sets_of(n_gpus, width)} for width in widths}
    starts = tuple((width, mask_of(list(sets[width]))) for width in widths if width > 1)
    return Blocks(
        n_gpus, starts, sets, frozenset(one.mask for level in sets.values() for one in level.values())
    )


def earliest(
    sets: Sequence[GpuSet], free_at_s: Sequence[float], not_before_s: float, previous: int
) -> tuple[float, GpuSet] | None:
    """The earliest start on any of `sets` and the set to take then; None when every set has a lost GPU.

    Ties as in `choose`, with the GPUs that are free by that start as the free space.
    """
    starts = [max(not_before_s, *(free_at_s[gpu] for gpu in candidate.gpus)) for candidate in sets]
    start_s = min(starts, default=math.inf)
    if start_s == math.inf:
        return None
    free = mask_of([gpu for gpu, free_s in enumerate(free_at_s) if free_s <= start_s])
    ties = [candidate for candidate, at_s in zip(sets, starts, strict=True) if at_s == start_s]
    chosen = choose(ties, free, previous)
    assert chosen is not None, "a set whose start is known is free by then"
    return start_s, chosen
