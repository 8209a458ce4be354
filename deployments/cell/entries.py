"""An accepted request as the scheduler actor keeps it: where its data is and what happened to it so far."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tetriserve.engine.report import Report, together
from tetriserve.model_info import ModelInfo
from tetriserve.request import (
    Execution,
    GenerateRequest,
    GenerateResult,
    LostRange,
    Metrics,
    PlannedWith,
    Progress,
    StepRange,
)
from tetriserve.scheduler.assignment import Assignment

if TYPE_CHECKING:
    import numpy as np

KEPT = 64
"""Finished pictures kept for repeated requests; 3 MB each at 1024x1024."""
KEPT_S = 300.0


@dataclass
class Entry:
    """One open request.

    Attributes:
        id: the name, "#" and a number: of this run of the request, never used again, for parts of an earlier one
            under the same name, cancelled, may still be in flight.
        asked: the request as it first came.
        request: with steps filled in; behind its pictures' encoding without their pixels.
        steps: denoising steps that are computed.
        callers: the calls that wait for it; when the last one leaves it is given up.
        arrival_s: at the edge, on the scheduler's monotonic clock; `admitted_s` here.
        conditioning: reference to what encode made.
        latents: reference to the latents behind the last range sent out ...
        committed: (conditioning, latents) behind the last one reported: what is left when a GPU is lost.
        aborting: a range was lost; those sent out behind it do not count either.
        touched, knows, holders: GPUs that ever had it, that have its conditioning, its newest latents.
        cheaper_every: the `reuse_every` that it may take where it would be late; 1: none.
        degree: of its last denoising range; 0 before the first.
        outstanding: ranges sent out and not yet collected.
        deadly: its ranges (`seq`) in which a replica died or the members lost each other.
        preview: the newest one.
        truncated: fields that were too long for the text encoders.
        predicted_s: time from arrival to the end, as the first plan that saw it had it.
    """

    id: str
    asked: GenerateRequest
    request: GenerateRequest
    steps: int
    arrival_s: float
    admitted_s: float
    slo_s: float | None
    planned_with: PlannedWith
    result: asyncio.Future[GenerateResult]
    callers: set[str] = field(default_factory=set)
    conditioning: Any = None
    latents: Any = None
    committed: tuple[Any, Any] = (None, None)
    aborting: bool = False
    last_range: asyncio.Task[None] | None = None
    touched: set[int] = field(default_factory=set)
    knows: set[int] = field(default_factory=set)
    holders: set[int] = field(default_factory=set)
    phase: str = "queue"
    steps_done: int = 0
    cheaper_every: int = 1
    degree: int = 0
    executions: list[Execution] = field(default_factory=list)
    lost: list[LostRange] = field(default_factory=list)
    peak_memory_bytes: int = 0
    outstanding: int = 0
    deadly: set[int] = field(default_factory=set)
    preview: np.ndarray | None = None
    truncated: tuple[str, ...] = ()
    predicted_s: float | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        """The id that clients know."""
        assert self.request.request_id is not None
        return self.request.request_id

    def progress(self, finish_s: float, now_s: float, ahead: int) -> Progress:
        """How far it is; `finish_s` is when it is expected to end, infinite when nobody can say."""
        return Progress(
            self.name,
            self.phase,
            self.steps_done,
            self.steps,
            predicted_finish_s=finish_s - now_s if finish_s < math.inf else None,
            preview=self.preview,
            ahead=ahead,
        )

    def predict(self, finish_s: float) -> None:
        """A plan has it; `finish_s` as for `progress`. The first that can say when it ends is kept."""
        if self.predicted_s is None and finish_s < math.inf:
            self.predicted_s = finish_s - self.arrival_s
            self.notify()

    def sent(self, assignment: Assignment, produced: Sequence[Any]) -> None:
        """A range of it is on its way; `produced` are references to what it will leave."""
        self.outstanding += 1
        before = self.conditioning, self.latents
        self.conditioning, self.latents = left_by(assignment.kind, produced, before)
        if self.conditioning is not before[0]:
            self.knows = set()
        self.touched.update(assignment.gpus)
        self.knows.update(assignment.gpus)
        self.holders = set(assignment.gpus)

    def commit(self, assignment: Assignment, produced: Sequence[Any]) -> None:
        """A range of it was reported: what it left is there to go on from."""
        self.committed = left_by(assignment.kind, produced, self.committed)
        if assignment.kind == "encode_image":
            self.request = self.request.without_pixels()

    def record(self, assignment: Assignment, reports: list[Report]) -> None:
        """A range of it was run by all its members."""
        self.executions.append(executed(assignment, reports))
        self.phase = assignment.kind
        self.peak_memory_bytes = max(self.peak_memory_bytes, *(r.peak_memory_bytes for r in reports))
        if assignment.kind == "denoise":
            self.steps_done += assignment.steps
            self.degree = assignment.degree
        self.truncated = reports[0].truncated or self.truncated
        preview = reports[0].previews[assignment.request_ids.index(self.id)]  # the leader's
        if preview is not None:
            self.preview = preview
        self.notify()

    def notify(self) -> None:
        """Wake all that watch; each waits for the next change on a new event."""
        self.changed.set()
        self.changed = asyncio.Event()

    def lose(self, assignment: Assignment) -> None:
        """A range of it does not count: a GPU of it or of the range before was lost, or short of memory."""
        self.lost.append(LostRange(assignment.kind, assignment.steps, assignment.gpus, time.time()))

    def roll_back(self) -> None:
        """After a lost range: back to the last committed latents, once nothing is in flight behind it."""
        self.aborting = self.outstanding > 0
        if self.aborting:
            return
        self.conditioning, self.latents = self.committed
        # what went out with a lost range may not have come anywhere
        self.holders, self.knows = set(), set()

    def past_s(self, total_s: float) -> float | None:
        """Seconds from the deadline to the answer, negative before it, of what ends `total_s` after its arrival: with
        the way back that is expected. None without a deadline."""
        return None if self.slo_s is None else total_s + self.request.way_back_s - self.slo_s

    def finish(self, image: Any, now_s: float, model: ModelInfo) -> GenerateResult:
        """The result, with `image` and all that happened on the way."""
        total_s = now_s - self.arrival_s
        past_s = self.past_s(total_s)
        schedule = self.executions
        seconds = {
            kind: sum(e.end_s - e.start_s for e in schedule if e.kind == kind)
            for kind in ("encode", "encode_image", "denoise", "decode")
        }
        denoise = (e for e in schedule if e.kind == "denoise")
        steps = [
            StepRange(sum(e.steps for e in ranges), len(gpus), gpus)
            for gpus, ranges in itertools.groupby(denoise, key=lambda e: e.gpus)
        ]
        assert self.request.seed is not None
        is_guided = model.guided(self.request)
        metrics = Metrics(
            queue_s=max(0.0, total_s - sum(seconds.values())),
            encode_s=seconds["encode"] + seconds["encode_image"],
            denoise_s=seconds["denoise"],
            decode_s=seconds["decode"],
            total_s=total_s,
            inference_s=schedule[-1].end_s - schedule[0].start_s,
            slo_s=self.slo_s,
            slo_met=None if past_s is None else past_s <= 0,
            steps=tuple(steps),
            schedule=tuple(schedule),
            lost=tuple(self.lost),
            seed=self.request.seed,
            arrival_s=self.arrival_s + unix_ahead_s(),
            planned_with=self.planned_with,
            peak_memory_bytes=self.peak_memory_bytes,
            predicted_s=self.predicted_s,
            degraded=(*model.degraded, "reuse") if self.request.reuse_every > 1 else model.degraded,
            reused_steps=model.steps_of(self.request) - self.steps,
            truncated=self.truncated,
            ignored=("negative_prompt",) if self.request.negative_prompt and not is_guided else (),
        )
        return GenerateResult(self.name, image, time.time(), model.name, metrics)


def left_by(kind: str, produced: Sequence[Any], before: tuple[Any, Any]) -> tuple[Any, Any]:
    """(conditioning, latents) behind a range of that kind, from what was there before it."""
    if kind == "denoise":
        return before[0], produced[0]
    return before if kind == "decode" else (produced[0], produced[1])


def name_of(entry_id: str) -> str:
    """What clients know the request by that has this `Entry.id`."""
    return entry_id.rpartition("#")[0]


def executed(assignment: Assignment, reports: list[Report]) -> Execution:
    """A range as it ran."""
    start_s, end_s = together(reports)
    shared_with = len(assignment.request_ids) - 1
    return Execution(
        assignment.kind, assignment.steps, assignment.gpus, start_s, end_s, assignment.others, shared_with
    )


def unix_ahead_s() -> float:
    """Seconds from this process' monotonic clock to Unix time."""
    return time.time() - time.monotonic()


class Kept:
    """Finished requests that may be asked for again: the last `KEPT`, for `KEPT_S` each."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[float, Entry]] = {}

    def keep(self, entry: Entry) -> None:
        self._forget_old()
        if len(self._entries) >= KEPT:
            self._entries.pop(next(iter(self._entries)))
        self._entries[entry.name] = (time.monotonic() + KEPT_S, entry)

    def forget(self, request_id: str) -> bool:
        """False when it is not kept."""
        return self._entries.pop(request_id, None) is not None

    def known(self, request_id: str | None) -> Entry | None:
        self._forget_old()
        return self._entries[request_id][1] if request_id in self._entries else None

    def _forget_old(self) -> None:
        now_s = time.monotonic()
        for request_id in [i for i, (until_s, _) in self._entries.items() if until_s < now_s]:
            del self._entries[request_id]
