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
        if not entry.job_ids or not set(entry.job_ids) <= set(chains):
            wrong.append(f"{entry}: unknown request")
        if len(set(entry.job_ids)) < len(entry.job_ids):
            wrong.append(f"{entry}: twice the same request")
    for gpu in range(n_gpus):
        wrong += _overlaps([entry for entry in entries if gpu in entry.gpus], f"GPU {gpu}")
    for job_id in chains:
        own = sorted((e for e in entries if job_id in e.job_ids), key=lambda e: (e.start_s, e.end_s))
        wrong += _overlaps(own, job_id)
        wrong += _chain_violations(job_id, own, chains, complete)
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


def _least_step_s(entry: Entry, chains: Mapping[str, Chain]) -> float | None:
    """Of one request its own step time, of several by the batch law of the design page; None where they may not."""
    phases = []
    for job_id in entry.job_ids:
        phases += [phase for phase in chains[job_id].phases if phase.kind == entry.kind]
    degree = len(entry.gpus)
    if len(phases) != len(entry.job_ids):
        return None
    if len(phases) == 1:
        return phases[0].step_s.get(degree)
    if len({phase.company for phase in phases}) > 1 or not phases[0].company:
        return None
    terms = [phase.shared.get(degree) for phase in phases]
    if None in terms:
        return None
    floor_s = overhead_s = adds_s = 0.0
    for term in terms:
        floor_s, overhead_s = max(floor_s, term.floor_s), max(overhead_s, term.overhead_s)
        adds_s += term.add_s
    return max(floor_s, overhead_s + adds_s)


def _chain_violations(
    job_id: str, own: Sequence[Entry], chains: Mapping[str, Chain], complete: bool
) -> list[str]:
    wrong = []
    chain = chains[job_id]
    if own and own[0].start_s < chain.start_s - SLACK_S:
        wrong.append(f"{job_id}: starts at {own[0].start_s} before {chain.start_s}")
    left = [[phase.kind, phase.steps, phase.step_s] for phase in chain.phases]
    for entry in own:
        if not left or entry.kind != left[0][0] or not 1 <= entry.steps <= left[0][1]:
            wrong.append(f"{entry}: out of turn or too many steps, left {left}")
            break
        step_s = _least_step_s(entry, chains)
        if step_s is None or entry.end_s - entry.start_s < entry.steps * step_s - SLACK_S:
            wrong.append(f"{entry}: degree not allowed or too short for its steps")
        left[0][1] -= entry.steps
        if not left[0][1]:
            left.pop(0)
    if complete and left and not wrong:
        wrong.append(f"{job_id}: not finished, left {left}")
    return wrong
