"""Ranges of steps on their way: sent to the replicas of their GPUs, and what they make of them.

Latents and pictures stay references: they go from replica to replica.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
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
        produced: references to the conditioning and the first latents, to the latents, or to the picture.
    """

    assignment: Assignment
    reports: tuple[Any, ...]
    produced: tuple[Any, ...]


def send(fleet: Fleet, entry: Entry, assignment: Assignment) -> SentRange:
    """Have a range run; replicas that hold the request's tensors already are not sent them."""
    phase = PHASES[assignment.kind]
    reports: list[Any] = []
    produced: list[Any] = []
    for gpu in assignment.gpus:
        is_leader = gpu == assignment.gpus[0]
        results = (
            fleet[gpu]
            .run.options(num_returns=1 + phase.produces if is_leader else 1)
            .remote(
                assignment,
                entry.request if phase.takes_request else None,
                boxed(None if gpu in entry.knows else entry.conditioning),
                boxed(None if gpu in entry.holders else entry.latents),
            )
        )
        if is_leader:
            report, *produced = results
            reports.append(report)
        else:
            reports.append(results)
    return SentRange(assignment, tuple(reports), tuple(produced))


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
        (request_id,) = assignment.request_ids
        entry = self._requests.entries[request_id]
        if entry.conditioning is None:
            self._requests.began(entry)
        log_request(DEBUG, entry.name, "sends out %s", assignment)
        sent = send(self._state.fleet, entry, assignment)
        entry.sent(assignment, sent.produced)
        entry.last_range = self._spawn(self._collect(entry, sent, entry.last_range))

    async def _collect(self, entry: Entry, sent: SentRange, before: asyncio.Task[None] | None) -> None:
        """Wait for a range and for the one before it of the same request, then count it, or plan it again
        when a GPU was lost, or fail its request."""
        assignment = sent.assignment
        results, errors = await settled(self._state.fleet, sent)
        if before is not None:
            await asyncio.wait([before])
        members = set(assignment.gpus)
        lost = self._state.lost
        silent = await self._state.fleet.silent(members - lost) if errors and not entry.aborting else set()
        # a lost GPU stays lost until its ranges are collected: this one was in flight on the old replica
        gone = silent | (lost & members)
        now_s = time.monotonic()
        entry.outstanding -= 1
        if errors or entry.aborting:
            if not self._state.failure:
                for gpu in silent:
                    self._recovery.lose(gpu)
            self._state.rounds.aborted(assignment.seq, now_s)
            if entry.id in self._requests.entries:
                self._take_back(entry, assignment, errors, bool(gone))
        else:
            self._recovery.reported(assignment.gpus, now_s)
            entry.commit(assignment, sent.produced)
            complete = self._state.rounds.finished(assignment.seq, now_s)
            ran = cast("list[Report]", results)
            self._measure(entry, assignment, ran)
            self._state.history.ran(entry.id, executed(assignment, ran))
            if entry.id in self._requests.entries:
                log_request(DEBUG, entry.name, "has done %s", assignment)
                entry.record(assignment, ran)
                if complete:
                    self._requests.end(entry, entry.finish(sent.produced[0], now_s, self._state.info))
        if entry.id not in self._requests.entries and entry.outstanding == 0:
            self._requests.release(entry)
        self._state.wake.set()

    def _take_back(
        self, entry: Entry, assignment: Assignment, errors: list[BaseException], gone: bool
    ) -> None:
        """A range of an open request did not count: plan it again, or end the request if it is to blame.

        Args:
            gone: a replica of it is dead or silent.
        """
        short = [cause for cause in map(cause_of, errors) if isinstance(cause, OutOfMemory)]
        # an exchange may fail though all members live, and none of them failed by itself
        torn = bool(errors) and not gone and all(map(is_elsewhere, errors))
        if torn and not entry.aborting:
            entry.deadly.add(assignment.seq)
        if short and not entry.aborting and not self._widen(entry, assignment):
            self._fail(entry, assignment, short[0])
        elif len(entry.deadly) >= max(MIN_DEADLY, self._state.args.cell.max_losses):
            times = len(entry.deadly)
            why = f"in {times} of its step ranges replicas died or lost each other"
            why += self._state.fleet.memory.shortage()
            self._fail(entry, assignment, RuntimeError(why))
        elif gone or short or torn or entry.aborting:
            self._state.meters.lost_range(assignment.kind)
            log_request(WARNING, entry.name, "lost %s", assignment)
            entry.lose(assignment)
            entry.roll_back()
        else:
            self._fail(entry, assignment, first_cause(errors))

    def _measure(self, entry: Entry, assignment: Assignment, reports: list[Report]) -> None:
        """A range was run: what it says of step times."""
        shape, degree = self._state.info.step_shape(entry.request), assignment.degree
        steps = assignment.steps if assignment.kind == "denoise" else 0
        self._state.meters.ran(shape, degree, steps, entry.degree not in (0, degree), reports)
        if steps:
            step_s = seconds_per_step(reports, steps)
            self._state.profile.measured(shape, degree, step_s, self._state.info.step_cost(entry.request))
            self._state.meters.corrected(shape, degree, self._state.profile.ratio(shape, degree))

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
