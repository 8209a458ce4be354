"""Ranges of steps on their way: sent to the replicas of their GPUs, and what they make of them.

Latents and pictures stay references: they go from replica to replica.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from logging import DEBUG, ERROR, WARNING
from typing import Any, cast

from deployments.cell.entries import Entry, executed
from deployments.cell.fleet import Fleet, cause_of, first_cause, is_elsewhere
from deployments.cell.recovery import Recovery
from deployments.cell.replica import PHASES, boxed
from deployments.cell.requests import Requests
from deployments.cell.state import CellState
from deployments.logs import log_request
from tetriserve.engine.report import Report, seconds_per_step
from tetriserve.errors import GenerationFailed, OutOfMemory
from tetriserve.scheduler.assignment import Assignment

MIN_DEADLY = 3
"""A request in so many of whose ranges a replica died or an exchange broke, and in no fewer than `cell.max_losses`,
is taken for the cause: it ends before it has taken every GPU of the cell with it."""


@dataclass(frozen=True)
class SentRange:
    """A range that its replicas work on.

    Attributes:
        reports: a reference by GPU of the assignment, the leader's first.
        produced: by request, references to the conditioning and the first latents, to the latents, or to the picture.
    """

    assignment: Assignment
    reports: tuple[Any, ...]
    produced: tuple[tuple[Any, ...], ...]


def send(fleet: Fleet, entries: Sequence[Entry], assignment: Assignment) -> SentRange:
    """Have a range run; replicas that hold a request's tensors already are not sent them."""
    phase = PHASES[assignment.kind]
    reports: list[Any] = []
    produced: list[Any] = []
    for gpu in assignment.gpus:
        is_leader = gpu == assignment.gpus[0]
        held = [
            (
                boxed(None if gpu in entry.knows else entry.conditioning),
                boxed(None if gpu in entry.holders else entry.latents),
            )
            for entry in entries
        ]
        results = (
            fleet[gpu]
            .run.options(num_returns=1 + phase.produces * len(entries) if is_leader else 1)
            .remote(assignment, entries[0].request if phase.takes_request else None, held)
        )
        if is_leader:
            report, *produced = results
            reports.append(report)
        else:
            reports.append(results)
    each = phase.produces
    by_request = tuple(tuple(produced[i * each : (i + 1) * each]) for i in range(len(entries)))
    return SentRange(assignment, tuple(reports), by_request)


async def settled(fleet: Fleet, sent: SentRange) -> tuple[list[Any], list[BaseException]]:
    """What the members of a range report, errors included, and the errors in the order in which they came."""
    gpus = sent.assignment.gpus
    return await fleet.settled(list(zip(gpus, sent.reports, strict=True)), gpus, sent.assignment.seq)


class Ranges:
    """Sends out what is planned, and counts it, or takes it back, or ends its request.

    Args:
        spawn: has a task run beside everything else.
    """

    def __init__(
        self,
        state: CellState,
        requests: Requests,
        recovery: Recovery,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._state = state
        self._requests = requests
        self._recovery = recovery
        self._spawn = spawn

    def dispatch(self, assignment: Assignment) -> None:
        entries = [self._requests.entries[request_id] for request_id in assignment.request_ids]
        for entry in entries:
            if entry.conditioning is None:
                self._requests.began(entry)
            log_request(DEBUG, entry.name, "sends out %s", assignment)
        sent = send(self._state.fleet, entries, assignment)
        before = {entry.last_range for entry in entries if entry.last_range is not None}
        collecting = self._spawn(self._collect(entries, sent, before))
        for entry, produced in zip(entries, sent.produced, strict=True):
            entry.sent(assignment, produced)
            entry.last_range = collecting

    async def _collect(
        self, entries: Sequence[Entry], sent: SentRange, before: Collection[asyncio.Task[None]]
    ) -> None:
        """Wait for a range and for those before it of the same requests, then count it, or plan it again when a GPU
        was lost, or fail its request."""
        assignment = sent.assignment
        results, errors = await settled(self._state.fleet, sent)
        if before:
            await asyncio.wait(before)
        members = set(assignment.gpus)
        lost = self._state.lost
        aborting = any(entry.aborting for entry in entries)
        silent = await self._state.fleet.silent(members - lost) if errors and not aborting else set()
        # a lost GPU stays lost until its ranges are collected: this one was in flight on the old replica
        gone = silent | (lost & members)
        now_s = time.monotonic()
        for entry in entries:
            entry.outstanding -= 1
        if errors or aborting:
            if not self._state.failure:
                for gpu in silent:
                    self._recovery.lose(gpu)
            self._state.rounds.aborted(assignment.seq, now_s)
            self._take_back(entries, assignment, errors, bool(gone), aborting=aborting)
        else:
            self._recovery.reported(assignment.gpus, now_s)
            complete = self._state.rounds.finished(assignment.seq, now_s)
            ran = cast("list[Report]", results)
            self._measure(entries, assignment, ran)
            for entry, produced, failure in zip(entries, sent.produced, ran[0].failures, strict=True):
                self._count(entry, assignment, ran, produced, failure)
                if complete and entry.id in self._requests.entries:
                    self._requests.end(entry, entry.finish(produced[0], now_s, self._state.info))
        for entry in entries:
            if entry.id not in self._requests.entries and entry.outstanding == 0:
                self._requests.release(entry)
        self._state.wake.set()

    def _count(
        self,
        entry: Entry,
        assignment: Assignment,
        reports: list[Report],
        produced: tuple[Any, ...],
        failure: str,
    ) -> None:
        """A range was run; for one of its requests, which goes on from there or has failed in it."""
        entry.commit(assignment, produced)
        self._state.history.ran(entry.id, executed(assignment, reports))
        if entry.id not in self._requests.entries:
            return
        log_request(DEBUG, entry.name, "has done %s", assignment)
        entry.record(assignment, reports)
        if failure:
            self._fail(entry, assignment, FloatingPointError(failure))

    def _take_back(
        self,
        entries: Sequence[Entry],
        assignment: Assignment,
        errors: list[BaseException],
        gone: bool,
        *,
        aborting: bool,
    ) -> None:
        """A range did not count: plan it again for its open requests, or end the one that is to blame.

        Args:
            gone: a replica of it is dead or silent.
            aborting: one of its requests lost the range before.
        """
        short = [cause for cause in map(cause_of, errors) if isinstance(cause, OutOfMemory)]
        # an exchange may fail though all members live, and none of them failed by itself
        torn = bool(errors) and not gone and all(map(is_elsewhere, errors))
        if assignment.is_shared and not aborting:
            # who of them is to blame shows when each runs alone
            if short:
                self._state.rounds.crowded(len(entries))
            for entry in entries:
                self._state.rounds.part(entry.id)
        for entry in entries:
            if entry.id in self._requests.entries:
                spared = assignment.is_shared and not (torn or gone)
                self._blame(entry, assignment, errors, short, gone=gone, torn=torn, spared=spared or aborting)

    def _blame(
        self,
        entry: Entry,
        assignment: Assignment,
        errors: list[BaseException],
        short: list[OutOfMemory],
        *,
        gone: bool,
        torn: bool,
        spared: bool,
    ) -> None:
        """What a range that did not count means for one of its requests; nothing but that if it is spared."""
        if torn and not spared:
            entry.deadly.add(assignment.seq)
        if short and not spared and not self._widen(entry, assignment):
            self._fail(entry, assignment, short[0])
        elif len(entry.deadly) >= max(MIN_DEADLY, self._state.args.cell.max_losses):
            times = len(entry.deadly)
            why = f"in {times} of its step ranges replicas died or lost each other"
            why += self._state.fleet.memory.shortage()
            self._fail(entry, assignment, RuntimeError(why))
        elif gone or short or torn or spared:
            self._state.meters.lost_range(assignment.kind)
            log_request(WARNING, entry.name, "lost %s", assignment)
            entry.lose(assignment)
            entry.roll_back()
        else:
            self._fail(entry, assignment, first_cause(errors))

    def _measure(self, entries: Sequence[Entry], assignment: Assignment, reports: list[Report]) -> None:
        """A range was run: what it says of step times."""
        info, degree = self._state.info, assignment.degree
        shapes = [info.step_shape(entry.request) for entry in entries]
        steps = assignment.steps if assignment.kind == "denoise" else 0
        switched = sum(entry.degree not in (0, degree) for entry in entries)
        self._state.meters.ran(shapes, degree, steps, switched, reports)
        if not steps:
            return
        step_s, shared = seconds_per_step(reports, steps), assignment.is_shared
        self._state.profile.measured(shapes, degree, step_s, info.step_cost(entries[0].request))
        for shape in set(shapes):
            ratio = self._state.profile.ratio(shape, degree, shared=shared)
            self._state.meters.corrected(shape, degree, ratio, shared=shared)

    def _widen(self, entry: Entry, assignment: Assignment) -> bool:
        """After a range that ran out of memory: go on at a higher degree. False when there is none."""
        widened = assignment.kind == "denoise" and self._state.rounds.widened(
            entry.id, assignment.degree, self._recovery.usable
        )
        if widened:
            log_request(
                WARNING, entry.name, "ran out of memory in %s, going on at a higher degree", assignment
            )
        return widened

    def _fail(self, entry: Entry, assignment: Assignment, cause: BaseException) -> None:
        """The request failed by itself; the ones beside and after it go on."""
        log_request(ERROR, entry.name, "failed in %s: %r", assignment.kind, cause)
        if isinstance(cause, OutOfMemory):
            self._requests.end(entry, OutOfMemory(f"{assignment.kind} ran out of memory: {cause.message}"))
        else:
            self._requests.end(
                entry, GenerationFailed(f"{assignment.kind} failed: {type(cause).__name__}: {cause}")
            )
