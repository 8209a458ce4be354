"""Independent check of schedules by the rule of the design page: it shares no code with the packers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from solver.problem import Entry, Phase, Snapshot

SLACK_S = 1e-6


@dataclass(frozen=True)
class Chain:
    """What one request is to go through: not before `start_s`, these phases in order."""

    start_s: float
    phases: tuple[Phase, ...]


def is_allowed_set(gpus: Sequence[int], n_gpus: int) -> bool:
    """Consecutive GPUs at the start or the end of a block of the next power of two, clipped; fours on a node of
    at most 8 GPUs: two aligned pairs."""
    if len(gpus) == 4 and n_gpus <= 8:
        a, b, c, d = gpus
        return a % 2 == 0 and b == a + 1 and c % 2 == 0 and d == c + 1 and b < c and a >= 0 and d < n_gpus
    first, last, width = gpus[0], gpus[-1], len(gpus)
    if list(gpus) != list(range(first, last + 1)) or first < 0 or last >= n_gpus:
        return False
    block = 1
    while block < width:
        block *= 2
    block_start = first - first % block
    block_last = min(block_start + block, n_gpus) - 1
    return last <= block_last and (first == block_start or (last == block_last and width != block))


def violations(
    entries: Sequence[Entry],
    chains: Mapping[str, Chain],
    n_gpus: int,
    *,
    free_at_s: Sequence[float] | None = None,
    complete: bool = True,
) -> list[str]:
    """Everything that is wrong with a schedule, in words; empty when it is valid.

    Args:
        free_at_s: per GPU, when earlier commitments end.
        complete: every chain must be run to its end, not only a prefix of it.
    """
    wrong: list[str] = []
    free_at_s = [float("-inf")] * n_gpus if free_at_s is None else free_at_s
    for entry in entries:
        if not entry.gpus or not is_allowed_set(entry.gpus, n_gpus):
            wrong.append(f"{entry}: GPU set not allowed")
        elif entry.start_s < max(free_at_s[gpu] for gpu in entry.gpus) - SLACK_S:
            wrong.append(f"{entry}: starts on a busy or lost GPU")
        if entry.job_id not in chains:
            wrong.append(f"{entry}: unknown request")
    for gpu in range(n_gpus):
        wrong += _overlaps([entry for entry in entries if gpu in entry.gpus], f"GPU {gpu}")
    for job_id, chain in chains.items():
        own = sorted((e for e in entries if e.job_id == job_id), key=lambda e: (e.start_s, e.end_s))
        wrong += _overlaps(own, job_id)
        wrong += _chain_violations(job_id, own, chain, complete)
    return wrong


def packing_violations(snapshot: Snapshot, entries: Sequence[Entry], *, complete: bool) -> list[str]:
    """`violations` of a policy's answer to a snapshot."""
    chains = {job.id: Chain(max(job.ready_s, snapshot.now_s), job.phases) for job in snapshot.jobs}
    wrong = violations(
        entries, chains, len(snapshot.free_at_s), free_at_s=snapshot.free_at_s, complete=complete
    )
    if any(entry.start_s < snapshot.now_s - SLACK_S for entry in entries):
        wrong.append("starts in the past")
    if list(entries) != sorted(entries, key=lambda entry: entry.start_s):
        wrong.append("entries are not in order of start")
    return wrong


def _overlaps(entries: Sequence[Entry], whose: str) -> list[str]:
    ordered = sorted(entries, key=lambda e: (e.start_s, e.end_s))
    return [
        f"{whose}: {before} overlaps {after}"
        for before, after in itertools.pairwise(ordered)
        if after.start_s < before.end_s - SLACK_S
    ]


def _chain_violations(job_id: str, own: Sequence[Entry], chain: Chain, complete: bool) -> list[str]:
    wrong = []
    if own and own[0].start_s < chain.start_s - SLACK_S:
        wrong.append(f"{job_id}: starts at {own[0].start_s} before {chain.start_s}")
    left = [[phase.kind, phase.steps, phase.step_s] for phase in chain.phases]
    for entry in own:
        if not left or entry.kind != left[0][0] or not 1 <= entry.steps <= left[0][1]:
            wrong.append(f"{entry}: out of turn or too many steps, left {left}")
            break
        step_s = left[0][2].get(len(entry.gpus))
        if step_s is None or entry.end_s - entry.start_s < entry.steps * step_s - SLACK_S:
            wrong.append(f"{entry}: degree not allowed or too short for its steps")
        left[0][1] -= entry.steps
        if not left[0][1]:
            left.pop(0)
    if complete and left and not wrong:
        wrong.append(f"{job_id}: not finished, left {left}")
    return wrong
