"""The TetriServe paper's round scheduler (`dp`): a group knapsack over the GPUs of one round (paper 2.2 to 2.6).

Where the paper is silent we follow section 5 of our notes: ties in survivors go to urgency-weighted progress, then
to fewer GPU-seconds; GPUs left over go to whoever waits, least slack first, and only then to scale-up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from solver.allocation import StepTable
from solver.board import EPSILON_S, Board, OpenJob, first_starving, waiting_order
from solver.listing import Lister, Pick
from solver.placement import mask_of
from solver.problem import Entry, Packing, Snapshot
from solver.schedule import Rule, Run

Value = tuple[int, float, float]
NOTHING: Value = (0, 0.0, 0.0)


@dataclass(frozen=True)
class Option:
    """One way to spend the round on a request.

    Attributes:
        steps: whole steps that the round has room for (q_m), at least one.
        survives: the rest can still be on time, as if the request had all GPUs then.
        progress: share of the steps left that this does, weighted by urgency.
    """

    degree: int
    steps: int
    survives: bool
    progress: float
    gpu_seconds: float

    @property
    def value(self) -> Value:
        return (int(self.survives), self.progress, -self.gpu_seconds)


def steps_in_round(steps: int, step_s: float, room_s: float) -> int:
    """q_m of paper 2.3: whole steps of a round, and not more than are left."""
    return steps if step_s <= 0 else min(steps, math.floor(room_s / step_s + 1e-6))


def in_rounds(table: StepTable, round_s: float) -> StepTable:
    """Step times with the wait for the boundary in them: the Q of paper 2.2, which it leaves undefined.

    Without it a mix that just meets the deadline back to back falls behind in every round.
    """
    kept: list[tuple[int, float, float]] = []
    for degree, step_s in zip(table.degrees, table.seconds, strict=True):
        if step_s > round_s:
            seconds = math.ceil(step_s / round_s - 1e-6) * round_s
        else:
            seconds = round_s / math.floor(round_s / step_s + 1e-6) if step_s > 0 else step_s
        if not kept or seconds < kept[-1][1] - EPSILON_S:
            kept.append((degree, seconds, seconds - step_s))
    degrees, times, waits = zip(*kept, strict=True)
    return StepTable(degrees, times, waits)


def options(job: OpenJob, now_s: float, boundary_s: float) -> tuple[Option, ...]:
    """The degrees of the cheapest mix with what each does in this round; empty for a late request.

    A step longer than the round would never start in the paper; here it runs, alone, beyond the boundary.
    """
    work = job.work[0]
    budget_s = job.job.deadline_s - now_s - work.tail_s
    mix = in_rounds(work.table, boundary_s - now_s).cheapest(work.steps, budget_s)
    mix = mix or work.table.cheapest(work.steps, budget_s)
    if mix is None:
        return ()
    left_s = job.job.deadline_s - now_s
    urgency = job.least_s / left_s if left_s > 0 else 1.0
    fitting = {d: steps_in_round(count, work.table.step_s(d), boundary_s - now_s) for d, count in mix.steps}
    nothing_fits = not any(fitting.values())
    found = []
    for degree, fit in fitting.items():
        steps = 1 if nothing_fits else fit
        if not steps:
            continue
        seconds = steps * work.table.step_s(degree)
        rest_s = (work.steps - steps) * work.table.fastest_s + work.tail_s
        survives = max(boundary_s, now_s + seconds) + rest_s <= job.job.deadline_s + EPSILON_S
        found.append(Option(degree, steps, survives, urgency * steps / work.steps, degree * seconds))
    return tuple(found)


def survives_unserved(job: OpenJob, boundary_s: float) -> bool:
    """The survival test for the option to give the request nothing in this round (paper 2.4)."""
    return boundary_s + job.least_s <= job.job.deadline_s + EPSILON_S


def group_knapsack(
    groups: Sequence[Sequence[Option]], unserved: Sequence[bool], n_gpus: int
) -> tuple[Value, list[Option | None]]:
    """At most one option per group within `n_gpus`, the most survivors first (paper 2.5).

    Args:
        unserved: per group, whether it survives without an option.

    Returns:
        the value of the best packing and the option chosen per group, None for none.
    """
    best: list[Value | None] = [NOTHING] + [None] * n_gpus
    back: list[list[Option | None]] = []
    for group, survives in zip(groups, unserved, strict=True):
        row: list[Value | None] = [None] * (n_gpus + 1)
        chosen: list[Option | None] = [None] * (n_gpus + 1)
        for used, before in enumerate(best):
            if before is None:
                continue
            for option in (None, *group):
                gpus = used + (option.degree if option else 0)
                if gpus > n_gpus:
                    continue
                gain = option.value if option else (int(survives), 0.0, 0.0)
                value = (before[0] + gain[0], before[1] + gain[1], before[2] + gain[2])
                at = row[gpus]
                if at is None or value > at:
                    row[gpus], chosen[gpus] = value, option
        best = row
        back.append(chosen)
    value, gpus = max((v, -c) for c, v in enumerate(best) if v is not None)
    picks: list[Option | None] = []
    gpus = -gpus
    for chosen in reversed(back):
        option = chosen[gpus]
        picks.append(option)
        gpus -= option.degree if option else 0
    return value, picks[::-1]


@dataclass(frozen=True)
class KnapsackPolicy:
    """The paper's policy.

    Attributes:
        keeps_gpus: prefer the GPUs of the round before; off for an ablation (paper 2.6 a).
        scales_up: widen over GPUs left idle; off for an ablation (paper 2.6 b).
    """

    name: str = "dp"
    round_steps: float = 2.0
    replans_on_arrival: bool = False
    keeps_gpus: bool = True
    scales_up: bool = True

    def __call__(self, snapshot: Snapshot) -> Packing:
        if not self.keeps_gpus:
            snapshot = replace(snapshot, jobs=tuple(replace(job, gpus=()) for job in snapshot.jobs))
        board = Board(snapshot)
        now_s, boundary_s = snapshot.now_s, snapshot.boundary_s
        ready = [job for job in board.jobs if job.start_s <= now_s + EPSILON_S]
        late = sorted((job for job in ready if job.is_late), key=waiting_order)
        timely = sorted((job for job in ready if not job.is_late), key=lambda job: job.slack_s)
        best_effort = [job for job in ready if job.is_late or job.job.deadline_s == math.inf]
        starving = first_starving(board, best_effort)

        placer = _Placer(board)
        if starving is not None:
            placer.place_up_to(starving, 1)
            late = [job for job in late if job is not starving]
            timely = [job for job in timely if job is not starving]
        groups = [options(job, now_s, boundary_s) for job in timely]
        unserved = [survives_unserved(job, boundary_s) for job in timely]
        (survivors, _, _), chosen = group_knapsack(groups, unserved, placer.idle.bit_count())
        served = [(job, option) for job, option in zip(timely, chosen, strict=True) if option is not None]
        # wide ones first, then those that can keep their GPUs: aligned sets then fit whenever the count does
        served.sort(key=lambda pair: (-pair[1].degree, -pair[0].gpus.bit_count()))
        for job, option in served:
            placer.place_up_to(job, option.degree)
        for job, group in zip(timely, groups, strict=True):
            if group:
                placer.place_up_to(job, group[0].degree)
        if self.scales_up:
            placer.scale_up()
        if board.has_company:
            placer.gather(timely)
        on_time_picks = len(placer.picks)
        for job in late:
            placer.place_up_to(job, 1)
        if self.scales_up:
            placer.scale_up(on_time_picks)
        return Packing(tuple(placer.entries()), info={"survivors": float(survivors)})


class _Placer:
    """Puts the chosen degrees on the GPUs that are idle at the start of the round."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.lister = Lister(board, Rule())
        self.idle = self.lister.idle
        self.picks: list[Pick] = []
        self.placed: set[str] = set()

    def place_up_to(self, job: OpenJob, degree: int) -> None:
        """Give a job without GPUs the widest idle set up to `degree`, or its narrowest if all are wider."""
        if job.job.id in self.placed:
            return
        run = Run(job)
        degrees = run.work.table.degrees
        indices = [index for index, width in enumerate(degrees) if width <= degree] or [0]
        for index in reversed(indices):
            gpus = self.lister.find(run, index, self.idle)
            if gpus is not None:
                self.picks.append(Pick(run, index, gpus))
                self.placed.add(job.job.id)
                self.idle &= ~gpus.mask
                return

    def gather(self, jobs: Sequence[OpenJob]) -> None:
        """Those that found no GPU share the steps of others of their shape, where no deadline is at risk (the paper's
        selective batching)."""
        self.lister.join([Run(job) for job in jobs if job.job.id not in self.placed], self.picks, alike=True)
        self.placed.update(run.open.job.id for pick in self.picks for run in pick.guests)

    def scale_up(self, first: int = 0) -> None:
        """Widen the picks from `first` on over what is still idle (paper 2.6)."""
        self.lister.widen(self.picks[first:], self.idle, 0)
        used = mask_of(sorted({gpu for pick in self.picks for gpu in pick.gpus.gpus}))
        self.idle = self.lister.idle & ~used

    def entries(self) -> list[Entry]:
        """Whole steps that fit the round, at least one; what follows in the chain goes on there in the same round."""
        snapshot = self.board.snapshot
        entries: list[Entry] = []
        for pick in self.picks:
            run, at_s, index, gpus = pick.run, snapshot.now_s, pick.index, pick.gpus
            if pick.guests:
                step_s, ids = pick.step_s(index), tuple(one.open.job.id for one in pick.runs)
                left = min(one.steps for one in pick.runs)
                steps = max(1, steps_in_round(left, step_s, snapshot.boundary_s - at_s))
                entries.append(Entry(ids, run.work.kind, gpus.gpus, steps, at_s, at_s + steps * step_s))
                continue
            while True:
                work, step_s = run.work, run.work.table.seconds[index]
                steps = steps_in_round(work.steps, step_s, snapshot.boundary_s - at_s)
                if at_s > snapshot.now_s and not steps:
                    break
                end_s = at_s + max(1, steps) * step_s
                entries.append(Entry((run.open.job.id,), work.kind, gpus.gpus, max(1, steps), at_s, end_s))
                run.advance(max(1, steps), end_s, gpus.mask)
                if run.is_done or run.work is work or end_s >= snapshot.boundary_s - EPSILON_S:
                    break
                degrees = run.work.table.degrees
                index = max((i for i, d in enumerate(degrees) if d <= len(pick.gpus.gpus)), default=-1)
                inside = self.lister.find(run, index, pick.gpus.mask) if index >= 0 else None
                if inside is None:
                    break
                at_s, gpus = end_s, inside
        return sorted(entries, key=lambda entry: entry.start_s)
