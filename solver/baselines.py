"""Baselines: a fixed degree first come first served, like xDiT; the best fixed degree per request; plain EDF."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from solver.board import Board, OpenJob
from solver.completion import fill_gaps, schedule_on_time
from solver.placement import choose, earliest
from solver.problem import Entry, Job, Packing, Phase, Snapshot
from solver.schedule import Rule, Run, entries_of


@dataclass(frozen=True)
class FixedDegreePolicy:
    """First come, first served; a request keeps its GPUs until it is done.

    Attributes:
        degree_of: the degree for one phase of a job, out of the allowed ones (seconds of a step by degree).
    """

    name: str
    degree_of: Callable[[Job, Phase, dict[int, float]], int]
    round_steps: float = 1.0
    replans_on_arrival: bool = True

    def __call__(self, snapshot: Snapshot) -> Packing:
        board = Board(snapshot)
        free_at_s = list(board.free_at_s)
        entries: list[Entry] = []
        # who has started goes on first, so that nobody else is put on its GPUs
        for job in sorted(board.jobs, key=lambda job: (not job.gpus, job.job.arrival_s, job.job.id)):
            entries += self._run(board, job, free_at_s)
        return Packing(tuple(sorted(entries, key=lambda entry: (entry.start_s, entry.end_s))))

    def _run(self, board: Board, job: OpenJob, free_at_s: list[float]) -> list[Entry]:
        """The rest of one job on one GPU set, which is its own until the end of the last phase."""
        allowed = [_usable(board, phase) for phase in job.job.phases]
        degrees = [
            self.degree_of(job.job, p, step_s) for p, step_s in zip(job.job.phases, allowed, strict=True)
        ]
        sets = board.sets[max(degrees)]
        kept = max((candidate.mask & job.gpus).bit_count() for candidate in sets)
        sets = tuple(candidate for candidate in sets if (candidate.mask & job.gpus).bit_count() == kept)
        found = earliest(sets, free_at_s, job.start_s, job.gpus)
        assert found is not None, "sets with lost GPUs are not on the board"
        now_s, group = found
        entries = []
        held = job.gpus
        for phase, degree, step_s in zip(job.job.phases, degrees, allowed, strict=True):
            part = choose(board.sets[degree], group.mask, held)
            assert part is not None, "the widest phase set the group"
            end_s = now_s + phase.steps * step_s[degree]
            entries.append(Entry((job.job.id,), phase.kind, part.gpus, phase.steps, now_s, end_s))
            now_s, held = end_s, part.mask
        for gpu in group.gpus:
            free_at_s[gpu] = now_s
        return entries


def _usable(board: Board, phase: Phase) -> dict[int, float]:
    return {degree: step_s for degree, step_s in sorted(phase.step_s.items()) if degree in board.sets}


def fixed(degree: int) -> FixedDegreePolicy:
    """`spN`: the widest allowed degree up to `degree`, for each phase."""

    def degree_of(job: Job, phase: Phase, step_s: dict[int, float]) -> int:
        return max((width for width in step_s if width <= degree), default=min(step_s))

    return FixedDegreePolicy(f"sp{degree}", degree_of)


def best_fixed() -> FixedDegreePolicy:
    """`rssp`: the cheapest degree that meets the request's own SLO when it is alone, else the fastest."""

    def degree_of(job: Job, phase: Phase, step_s: dict[int, float]) -> int:
        others_s = job.least_work_s - phase.steps * phase.fastest_step_s
        fits = [d for d, s in step_s.items() if others_s + phase.steps * s <= job.slo_s + 1e-9]
        if not fits:
            return min(step_s, key=lambda d: (step_s[d], d))
        cheapest = min(fits, key=lambda d: (d * step_s[d], d))
        # with fewer steps left a narrower degree would do, but a request stays what it started as
        return max(cheapest, len(job.gpus)) if len(job.gpus) in step_s else cheapest

    return FixedDegreePolicy("rssp", degree_of)


@dataclass(frozen=True)
class EdfPolicy:
    """`edf`: earliest deadline first, each at the narrowest degree that meets its deadline, nobody set aside."""

    name: str = "edf"
    round_steps: float = 1.0
    replans_on_arrival: bool = True

    def __call__(self, snapshot: Snapshot) -> Packing:
        board = Board(snapshot)
        timed = [Run(job) for job in board.jobs if job.job.deadline_s < math.inf]
        patient = [Run(job) for job in board.jobs if job.job.deadline_s == math.inf]
        rule = Rule(single_degree=True, give_up=False)
        schedule = schedule_on_time(board, timed, rule, spare=len(patient))
        fill_gaps(board, schedule, patient)
        return Packing(tuple(entries_of(schedule.segments)))
