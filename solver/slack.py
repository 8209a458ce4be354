"""PatchedServe's scheduler (`slack`): batches of mixed shapes, admitted by slack, one GPU each, nobody preempted.

Its section 4 as published: the slack of a request is what is left of its time beyond the work that is left, over what
it takes alone. A GPU goes on with those it has begun. While there is room in its batch the waiting request with the
least slack is looked at: one that would be late is passed over, one that is in no hurry makes way for the candidate
that adds least to the batch, and nobody is let in who would make the least slack of those running negative. GPUs are
independent of each other; a new request goes where least is to be done.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from solver.board import EPSILON_S, Board, OpenJob
from solver.problem import Entry, Packing, Phase, Snapshot, step_together_s

RELAXED = 2.0
"""Slack beyond so many times the work that is left is no hurry (as in the released code)."""
FIRST = {"decode": 0, "encode_image": 1, "encode": 2}
"""What is not a step goes before the next one, ends before beginnings."""


@dataclass(frozen=True)
class SlackPolicy:
    """Steps are planned for one round at a time."""

    name: str = "slack"
    round_steps: float = 1.0
    replans_on_arrival: bool = True

    def __call__(self, snapshot: Snapshot) -> Packing:
        board = Board(snapshot)
        ready = [job for job in board.jobs if job.start_s <= snapshot.now_s + EPSILON_S]
        begun: defaultdict[tuple[int, ...], list[OpenJob]] = defaultdict(list)
        waiting = []
        for job in ready:
            gpus = _begun_on(board, job)
            if gpus is None:
                waiting.append(job)
            else:
                begun[gpus].append(job)
        entries: list[Entry] = []
        narrowest = min((min(phase.step_s) for job in ready for phase in job.job.phases), default=1)
        sets = [one.gpus for one in board.sets.get(narrowest, ())]
        idle = [
            gpus for gpus in sets if all(board.free_at_s[gpu] <= snapshot.now_s + EPSILON_S for gpu in gpus)
        ]
        # a GPU that is in a range keeps those it has begun
        for gpus in sorted(idle, key=lambda gpus: sum(job.least_s for job in begun[gpus])):
            batch = self._admit(snapshot, begun[gpus], waiting)
            waiting = [job for job in waiting if job not in batch]
            entries += self._run(snapshot, gpus, batch)
        return Packing(tuple(sorted(entries, key=lambda entry: (entry.start_s, entry.end_s))))

    def _admit(
        self, snapshot: Snapshot, begun: Sequence[OpenJob], waiting: Sequence[OpenJob]
    ) -> list[OpenJob]:
        """Those begun, and who joins them."""
        now_s, batch = snapshot.now_s, list(begun)
        candidates = sorted(waiting, key=lambda job: _slack(job, job.least_s, now_s))
        while candidates and len(batch) < snapshot.max_batch:
            first = candidates[0]
            left_s = first.job.deadline_s - now_s - first.least_s
            if left_s > RELAXED * first.least_s and batch:
                first = min(candidates, key=lambda job: _pace([*batch, job]))
            candidates.remove(first)
            together = [*batch, first]
            if batch and not _may_share(together):
                continue
            pace = _pace(together)
            if not first.is_late and _slack(first, pace * first.least_s, now_s) < 0 and batch:
                continue  # late with them: another GPU may be better
            if any(
                _slack(job, pace * job.least_s, now_s) < 0 <= _slack(job, job.least_s, now_s) for job in batch
            ):
                break
            batch.append(first)
        return batch

    def _run(self, snapshot: Snapshot, gpus: tuple[int, ...], batch: Sequence[OpenJob]) -> list[Entry]:
        """What is before and behind the steps, one request after the other, then the steps up to the boundary."""
        at_s, degree = snapshot.now_s, len(gpus)
        entries: list[Entry] = []
        steps: list[tuple[str, Phase]] = []
        for job in sorted(batch, key=lambda job: FIRST.get(job.job.phases[0].kind, len(FIRST))):
            phase = job.job.phases[0]
            if phase.kind in FIRST:
                part = gpus[: max((width for width in phase.step_s if width <= degree), default=0)]
                if part:
                    end_s = at_s + phase.steps * phase.step_s[len(part)]
                    entries.append(Entry((job.job.id,), phase.kind, part, phase.steps, at_s, end_s))
                    at_s = end_s
                phase = job.job.phases[1] if len(job.job.phases) > 1 else phase
            if phase.kind not in FIRST and degree in phase.step_s:
                steps.append((job.job.id, phase))
        for together in _companies(steps, snapshot.max_batch):
            step_s = step_together_s([phase for _, phase in together], degree)
            left = min(phase.steps for _, phase in together)
            reach = math.ceil((snapshot.boundary_s - at_s) / max(step_s, EPSILON_S) - 1e-6)
            count = min(left, max(1, reach))
            ids = tuple(job_id for job_id, _ in together)
            entries.append(Entry(ids, together[0][1].kind, gpus, count, at_s, at_s + count * step_s))
            at_s += count * step_s
        return entries


def _begun_on(board: Board, job: OpenJob) -> tuple[int, ...] | None:
    """Where it was begun, None if nowhere or there no more."""
    gpus = job.job.gpus
    return gpus if any(one.gpus == gpus for one in board.sets.get(len(gpus), ())) else None


def _companies(steps: Sequence[tuple[str, Phase]], most: int) -> list[list[tuple[str, Phase]]]:
    """Who may run in the same steps."""
    companies: defaultdict[str, list[tuple[str, Phase]]] = defaultdict(list)
    for job_id, phase in steps:
        companies[phase.company or f"alone {job_id}"].append((job_id, phase))
    return [members[i : i + most] for members in companies.values() for i in range(0, len(members), most)]


def _slack(job: OpenJob, left_s: float, now_s: float) -> float:
    """Time beyond `left_s` of work, over what it takes alone."""
    if job.job.deadline_s == math.inf:
        return math.inf
    return (job.job.deadline_s - now_s - left_s) / max(job.job.alone_s, EPSILON_S)


def _steps_of(job: OpenJob) -> Phase | None:
    """Its denoising that is left."""
    return next((phase for phase in job.job.phases if phase.kind not in FIRST), None)


def _may_share(jobs: Sequence[OpenJob]) -> bool:
    phases = [phase for phase in map(_steps_of, jobs) if phase is not None]
    companies = {phase.company for phase in phases}
    return len(companies) == 1 and "" not in companies


def _pace(jobs: Sequence[OpenJob]) -> float:
    """How much slower a step of all of them is than the mean of each alone; with nobody to share with 1."""
    phases = [phase for phase in map(_steps_of, jobs) if phase is not None]
    if len(phases) < 2 or not _may_share(jobs):
        return float(max(1, len(jobs)))
    degree = min(phases[0].step_s)
    if any(degree not in phase.shared for phase in phases):
        return float(len(jobs))
    alone_s = sum(phase.step_s[degree] for phase in phases) / len(phases)
    return step_together_s(phases, degree) / max(alone_s, EPSILON_S)
