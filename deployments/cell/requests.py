"""The open requests of a cell: let in, joined, left, ended."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import replace
from logging import DEBUG, INFO
from typing import Any

from deployments.cell.entries import Entry, Kept, unix_ahead_s
from deployments.cell.state import CellState
from deployments.logs import log_request
from solver.problem import Phase, least_work_s
from tetriserve.chain import chain_of
from tetriserve.errors import (
    Cancelled,
    DeadlineInfeasible,
    InvalidRequest,
    NotReady,
    Overloaded,
    TetriserveError,
)
from tetriserve.request import GenerateRequest, GenerateResult, PlannedWith
from tetriserve.scheduler.admission import Admission

HAND_OVER_S = 10.0
"""How long a picture's reference is kept behind its result. Ray never deletes an object below 100 KB from its owner's
memory when the last reference to it was somebody else's."""

SHUTTING_DOWN = "the server is shutting down"
RESTART_S = 30
"""When to ask again where another one starts."""


class Requests:
    """Requests coming and going.

    Attributes:
        entries: the open ones by `Entry.id`.
        named: the same by the id that clients know.
    """

    def __init__(self, state: CellState) -> None:
        self.entries: dict[str, Entry] = {}
        self.named: dict[str, Entry] = {}
        self._state = state
        self._serial = itertools.count()
        self._kept = Kept()
        self._handed_over: deque[tuple[float, Any]] = deque()

    def cancel(self, request_id: str, call_id: str) -> bool:
        """A call is given up, and with the last call its request; its GPUs are free when the range in flight ends.

        False when it is not open.
        """
        entry = self.named.get(request_id)
        if entry is None or call_id not in entry.callers:
            return False
        self.leave(entry, call_id)
        return True

    def delete(self, request_ids: Collection[str]) -> bool:
        """End those that are open, whoever waits for them, and forget those that are kept. False when none is."""
        opened = [self.named[request_id] for request_id in request_ids if request_id in self.named]
        for entry in opened:
            self.end(entry, Cancelled("the request was cancelled"))
        forgotten = [self._kept.forget(request_id) for request_id in request_ids]
        return bool(opened) or any(forgotten)

    def drain(self, *, at_once: bool) -> int:
        """Let nobody in any more, and with `at_once` end whoever is open. Returns how many still are."""
        self._state.is_draining = True
        for entry in list(self.entries.values()) if at_once else ():
            self.end(
                entry, NotReady(f"{SHUTTING_DOWN}, it was not finished in time", retry_after_s=RESTART_S)
            )
        return len(self.entries)

    def leave(self, entry: Entry, call_id: str) -> None:
        entry.callers.discard(call_id)
        if not entry.callers:
            self.end(entry, Cancelled("the request was cancelled"))

    def join(self, request: GenerateRequest, call_id: str) -> Entry:
        """The entry of a request: a new one, or for a repeated request the one that there is."""
        entry = self._kept.known(request.request_id) or self.named.get(request.request_id or "")
        if entry is None:
            entry = self._admit(request)
        elif not request.repeatable:
            raise InvalidRequest("request_id", f"{request.request_id!r} is already open")
        elif entry.asked != _as_asked(request):
            raise InvalidRequest("Idempotency-Key", "it was used for another request")
        else:
            log_request(DEBUG, entry.name, "is asked for again")
        entry.callers.add(call_id)
        return entry

    def _admit(self, request: GenerateRequest) -> Entry:
        if self._state.is_draining:
            raise NotReady(SHUTTING_DOWN, retry_after_s=RESTART_S)
        if self._state.failure:
            raise NotReady(f"the cell is not ready: {self._state.failure}", retry_after_s=5)
        now_s = time.monotonic()
        open_requests = Counter(entry.request.client for entry in self.entries.values())
        knobs, shared = self._state.args.scheduler, self._state.args.http.has_keys
        admission = Admission(knobs.max_open_requests, knobs.max_open_per_client, shared=shared)
        full = admission.refusal(request.client, open_requests)
        if full and not request.attempt:  # else it was accepted once
            raise Overloaded(full, retry_after_s=int(self._state.rounds.predictions.drain_s(now_s) / 2) + 1)
        if request.model not in (None, "default", self._state.info.name):
            raise InvalidRequest(
                "model", f"{request.model!r} is not served, allowed is {self._state.info.name!r}"
            )
        self._state.info.check(request)
        assert request.request_id is not None and request.seed is not None, "the ingress fills these in"
        asked = _as_asked(request)
        request = replace(
            request, num_inference_steps=request.num_inference_steps or self._state.info.default_steps
        )
        cheaper_every = 1
        if (reuse := self._state.args.reuse) is not None:
            request = replace(request, reuse_every=reuse.every(request.quality))
            cheaper_every = reuse.every_if_late(request.quality)
        phases = self._phases(request)
        cheaper = self._phases(replace(request, reuse_every=cheaper_every)) if cheaper_every > 1 else ()
        slo_s = request.slo_s
        if slo_s is None and self._state.args.scheduler.default_slo_scale is not None:
            slo_s = self._state.args.scheduler.default_slo_scale * least_work_s(phases)
        waited_s = 0.0 if request.arrived_s is None else max(0.0, time.time() - request.arrived_s)
        arrival_s = now_s - waited_s
        result = asyncio.get_running_loop().create_future()
        identity = f"{request.request_id}#{next(self._serial)}"
        steps, planned_with = len(self._state.info.computed_steps(request)), PlannedWith.of(phases)
        entry = Entry(identity, asked, request, steps, arrival_s, now_s, slo_s, planned_with, result)
        entry.cheaper_every = cheaper_every
        self._state.rounds.arrived(
            entry.id,
            phases,
            now_s,
            float("inf") if slo_s is None else arrival_s + slo_s - request.way_back_s,
            priority=request.priority,
            drop_late=_asked(request.drop_late, self._state.args.scheduler.drop_late),
            reject_infeasible=not request.attempt  # else it was accepted once
            and _asked(request.reject_infeasible, self._state.args.scheduler.reject_infeasible),
            client=request.client,
            cheaper=cheaper,
        )
        self.entries[entry.id] = self.named[entry.name] = entry
        arrival_unix_s = arrival_s + unix_ahead_s()
        self._state.history.arrived(
            entry.id,
            entry.name,
            request.client,
            request.shape,
            steps,
            arrival_unix_s,
            None if slo_s is None else arrival_unix_s + slo_s,
        )
        if request.attempt:
            self._state.meters.resubmitted()
        self._log_accepted(entry)
        self._state.wake.set()
        return entry

    def _log_accepted(self, entry: Entry) -> None:
        request = entry.request
        shape = f"{request.shape}"
        if self._state.profile.profile.interpolates(request.shape):
            shape += " (step times interpolated)"
        deadline = "no deadline" if entry.slo_s is None else f"deadline {entry.slo_s:.3f} s"
        waited_s = entry.admitted_s - entry.arrival_s
        again = f", {waited_s:.1f} s after it came to another cell" if request.attempt else ""
        pictures = f", {len(request.images)} pictures in" if request.images else ""
        what = f"{shape}, {entry.steps} steps{pictures}, {deadline}{again}"
        log_request(INFO, entry.name, "accepted: %s", what)

    def _phases(self, request: GenerateRequest) -> tuple[Phase, ...]:
        state, info = self._state, self._state.info
        degrees = [
            degree
            for degree in state.args.cell.all_degrees
            if info.why_not_degree(request.shape, degree) is None
        ]
        return chain_of(
            state.profile,
            request.shape,
            len(info.computed_steps(request)),
            degrees,
            cost=info.step_cost(request),
            step_shape=info.step_shape(request),
            images=info.shapes_in(request),
            company=info.company(request) if state.args.scheduler.max_batch > 1 else "",
        )

    def began(self, entry: Entry) -> None:
        """Its first range is about to go out: from here on it is what the plan took it for."""
        steps = sum(p.steps for p in self._state.rounds.phases_of(entry.id) if p.kind == "denoise")
        if steps < entry.steps:
            entry.request = replace(entry.request, reuse_every=entry.cheaper_every)
            entry.steps = steps
            log_request(INFO, entry.name, "would be late: %d steps are computed", entry.steps)

    def end(self, entry: Entry, outcome: GenerateResult | TetriserveError) -> None:
        """Settle a request and forget it; what is in flight for it runs out and is released then."""
        if self.entries.pop(entry.id, None) is None:  # settled before
            return
        del self.named[entry.name]
        self._state.rounds.cancelled(entry.id)
        if isinstance(outcome, TetriserveError):
            word, metrics = outcome.code, None
        else:
            metrics = outcome.metrics
            word = "no_deadline" if metrics.slo_met is None else "met" if metrics.slo_met else "late"
        total_s = time.monotonic() - entry.arrival_s if metrics is None else metrics.total_s
        log_request(INFO, entry.name, "ended: %s after %.3f s", word, total_s, outcome=word, total_s=total_s)
        self._state.meters.ended(word, entry.request.shape, metrics, entry.past_s(total_s))
        self._state.history.ended(entry.id, word, time.time())
        if not entry.result.done():
            if isinstance(outcome, TetriserveError):
                entry.result.set_exception(outcome)
                entry.result.exception()  # a cancelled caller will not look at it
            else:
                entry.result.set_result(outcome)
                self._hand_over(outcome.image)
                if entry.request.repeatable:
                    self._kept.keep(entry)
        entry.notify()
        if entry.outstanding == 0:
            self.release(entry)
        self._state.wake.set()

    def _hand_over(self, picture: Any) -> None:
        now_s = time.monotonic()
        self._handed_over.append((now_s, picture))
        while self._handed_over[0][0] < now_s - HAND_OVER_S:
            self._handed_over.popleft()

    def release(self, entry: Entry) -> None:
        for gpu in entry.touched - self._state.lost:
            self._state.fleet.tell(gpu, "release", entry.id)
        entry.touched = set()
        entry.conditioning = entry.latents = None
        entry.committed = (None, None)

    def turn_away(self, entry: Entry, why: str, earliest_slo_s: float | None = None) -> None:
        self.end(entry, DeadlineInfeasible(f"the request {why}", earliest_slo_s))


def _as_asked(request: GenerateRequest) -> GenerateRequest:
    """Without what the server filled in, which differs each time; its pictures are told by their digests."""
    return replace(request.without_pixels(), arrived_s=None, way_back_s=0.0, attempt=0)


def _asked(option: bool | None, default: bool) -> bool:
    return default if option is None else option
