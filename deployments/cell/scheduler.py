"""The scheduler actor of a cell: admits requests, drives `RoundScheduler` and its GPU replicas.

It never touches a tensor: latents and pictures are object references that go from replica to replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from logging import DEBUG, ERROR, INFO, WARNING
from typing import Any, cast

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.cell.entries import Entry, Kept, executed, unix_ahead_s
from deployments.cell.fleet import Fleet, cause_of, first_cause, is_elsewhere
from deployments.cell.meters import Families, Meters
from deployments.cell.planner import Planner
from deployments.cell.profiling import fitting_profile
from deployments.cell.ranges import SentRange, send, settled
from deployments.cell.recovery import Recovery
from deployments.config import AppArgs
from deployments.logs import LogForm, log_request, logger, write_as
from solver.policies import make_policy
from solver.problem import Phase
from tetriserve.engine.report import Report, seconds_per_step
from tetriserve.errors import (
    Cancelled,
    CellLost,
    DeadlineInfeasible,
    GenerationFailed,
    InvalidRequest,
    NotReady,
    OutOfMemory,
    Overloaded,
    TetriserveError,
)
from tetriserve.profile import Profile
from tetriserve.request import (
    CellStatus,
    Execution,
    GenerateRequest,
    GenerateResult,
    ModelInfo,
    PlannedWith,
    Progress,
)
from tetriserve.scheduler.admission import Admission
from tetriserve.scheduler.history import History, Plan, Run
from tetriserve.scheduler.live_profile import LiveProfile
from tetriserve.scheduler.rounds import Assignment, RoundScheduler

MIN_DEADLY = 3
"""A request in so many of whose ranges a replica died or an exchange broke, and in no fewer than `cell.max_losses`,
is taken for the cause: it ends before it has taken every GPU of the cell with it."""

PLANS_KEPT = 1000
"""Decisions whose time is remembered for the status."""

HAND_OVER_S = 10.0
"""How long a picture's reference is kept behind its result. Ray never deletes an object below 100 KB from its owner's
memory when the last reference to it was somebody else's."""

BOARD_AGE_S = 0.25
"""How old a board may be when the next one asks for the same: many may look at once."""


class Scheduler:
    """Ray actor (asyncio). One per cell; owns the cell's GPU replica actors.

    Args:
        args: the application's arguments.
        group: placement group with one bundle for this actor and one for each GPU.
    """

    def __init__(self, args: AppArgs, group: PlacementGroup) -> None:
        self._args = args
        self._fleet = Fleet(args, group)
        self._entries: dict[str, Entry] = {}
        self._named: dict[str, Entry] = {}
        self._serial = itertools.count()
        self._kept = Kept()
        self._handed_over: deque[tuple[float, Any]] = deque()
        self._meters = Meters(args.profile.all_shapes)
        self._history = History(args.cell.gpus, time.time())
        self._boards: dict[tuple[float, str | None], tuple[float, dict[str, Any]]] = {}
        self._admission = Admission(
            args.scheduler.max_open_requests, args.scheduler.max_open_per_client, shared=args.http.has_keys
        )
        self._wake = asyncio.Event()
        self._failure = "starting"
        self._tasks: set[asyncio.Task[Any]] = set()
        scheduler = args.scheduler
        policy = make_policy(scheduler.policy, time_limit_s=scheduler.solver_time_limit_s)
        self._planner = Planner(policy, limit_s=2 * scheduler.solver_time_limit_s)
        self._rounds = RoundScheduler(
            policy,
            args.cell.gpus,
            round_s=scheduler.round_s,
            min_round_s=scheduler.min_round_s,
            lead_s=scheduler.lead_s,
        )
        self._recovery = Recovery(self._fleet, args.cell, self._rounds, self)
        self._plan_s: deque[float] = deque(maxlen=PLANS_KEPT)

    # ---- start --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model everywhere, join the groups, get the profile, then plan. Raises `ConfigError`."""
        await self._fleet.start()
        self._info = self._fleet.info
        profile = await fitting_profile(self._args, self._fleet)
        self._profile = LiveProfile(profile, follows=self._args.profile.correct)
        self._recovery.reported(range(len(self._fleet)), time.monotonic())
        self._failure = ""
        self.spawn(self._plan_forever())
        logger.info("cell is ready: %s on %d x %s", self._info.name, len(self._fleet), self._fleet.device)

    async def write_logs_as(self, form: LogForm) -> None:
        """Write what is logged here and in the GPU replicas so."""
        write_as(form, "Scheduler")
        self._fleet.write_logs_as(form)

    # ---- requests -----------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest, call_id: str) -> GenerateResult:
        """Run a request to its end. `image` of the result is a reference to the picture.

        Args:
            call_id: of this call, for `cancel`: a repeated request has several.

        Raises the errors of `tetriserve.errors`.
        """
        entry = self._join(request, call_id)
        try:
            return await asyncio.shield(entry.result)
        except asyncio.CancelledError:
            self._leave(entry, call_id)
            raise

    async def stream(
        self, request: GenerateRequest, call_id: str
    ) -> AsyncIterator[Progress | GenerateResult]:
        """Progress after the first plan and after every committed range, then the result.

        Who is slow to take it gets the newest, not all of it.
        """
        entry = self._join(request, call_id)
        last: Progress | None = None
        while not entry.result.done():
            changed = entry.changed
            progress = self._progress(entry)
            # a plan may turn a request away: nothing is said before one has seen it
            if progress != last and entry.predicted_s is not None:
                shown = last is not None and progress.preview is last.preview
                last = progress
                yield replace(progress, preview=None) if shown else progress
            await changed.wait()
        yield entry.result.result()

    def _progress(self, entry: Entry) -> Progress:
        now_s = time.monotonic()
        return entry.progress(self._rounds.predicted_finish_s(entry.id, now_s), now_s)

    async def cancel(self, request_id: str, call_id: str) -> bool:
        """A call is given up, and with the last call its request; its GPUs are free when the range in flight ends.

        False when it is not open.
        """
        entry = self._named.get(request_id)
        if entry is None or call_id not in entry.callers:
            return False
        self._leave(entry, call_id)
        return True

    async def delete(self, request_ids: Collection[str]) -> bool:
        """End those that are open, whoever waits for them, and forget those that are kept. False when none is."""
        opened = [self._named[request_id] for request_id in request_ids if request_id in self._named]
        for entry in opened:
            self._end(entry, Cancelled(f"request {entry.name} was cancelled"))
        forgotten = [self._kept.forget(request_id) for request_id in request_ids]
        return bool(opened) or any(forgotten)

    def _leave(self, entry: Entry, call_id: str) -> None:
        entry.callers.discard(call_id)
        if not entry.callers:
            self._end(entry, Cancelled(f"request {entry.name} was cancelled"))

    def _join(self, request: GenerateRequest, call_id: str) -> Entry:
        """The entry of a request: a new one, or for a repeated request the one that there is."""
        entry = self._kept.known(request.request_id) or self._named.get(request.request_id or "")
        if entry is None:
            entry = self._admit(request)
        elif not request.repeatable:
            raise InvalidRequest("request_id", f"{request.request_id!r} is already open")
        elif entry.asked != replace(request, waited_s=0.0):
            raise InvalidRequest("Idempotency-Key", "it was used for another request")
        else:
            log_request(DEBUG, entry.name, "is asked for again")
        entry.callers.add(call_id)
        return entry

    def _admit(self, request: GenerateRequest) -> Entry:
        if self._failure:
            raise NotReady(f"the cell is not ready: {self._failure}", retry_after_s=5)
        now_s = time.monotonic()
        open_requests = Counter(entry.request.client for entry in self._entries.values())
        full = self._admission.refusal(request.client, open_requests)
        if full and not request.waited_s:  # else it was accepted once
            raise Overloaded(full, retry_after_s=int(self._rounds.predicted_drain_s(now_s) / 2) + 1)
        if request.model not in (None, "default", self._info.name):
            raise InvalidRequest("model", f"{request.model!r} is not served, allowed is {self._info.name!r}")
        self._info.check(request)
        assert request.request_id is not None and request.seed is not None, "the ingress fills these in"
        asked = replace(request, waited_s=0.0)
        request = replace(
            request, num_inference_steps=request.num_inference_steps or self._info.default_steps
        )
        phases = self._phases(request)
        slo_s = request.slo_s
        if slo_s is None and self._args.scheduler.default_slo_scale is not None:
            alone_s = sum(phase.steps * phase.fastest_step_s for phase in phases)
            slo_s = self._args.scheduler.default_slo_scale * alone_s
        arrival_s = now_s - request.waited_s
        result = asyncio.get_running_loop().create_future()
        identity = f"{request.request_id}#{next(self._serial)}"
        entry = Entry(identity, asked, request, arrival_s, slo_s, PlannedWith.of(phases), result)
        self._rounds.arrived(
            entry.id,
            phases,
            now_s,
            float("inf") if slo_s is None else arrival_s + slo_s,
            priority=request.priority,
            drop_late=_asked(request.drop_late, self._args.scheduler.drop_late),
            reject_infeasible=not request.waited_s  # else it was accepted once
            and _asked(request.reject_infeasible, self._args.scheduler.reject_infeasible),
            client=request.client,
        )
        self._entries[entry.id] = self._named[entry.name] = entry
        arrival_unix_s = arrival_s + unix_ahead_s()
        self._history.arrived(
            entry.id,
            entry.name,
            request.client,
            request.shape,
            phases[1].steps,
            arrival_unix_s,
            None if slo_s is None else arrival_unix_s + slo_s,
        )
        if request.waited_s:
            self._meters.resubmitted()
        self._log_accepted(entry)
        self._wake.set()
        return entry

    def _log_accepted(self, entry: Entry) -> None:
        request = entry.request
        shape = f"{request.shape}"
        if self._profile.profile.interpolates(request.shape):
            shape += " (step times interpolated)"
        deadline = "no deadline" if entry.slo_s is None else f"deadline {entry.slo_s:.3f} s"
        again = f", {request.waited_s:.1f} s after another cell" if request.waited_s else ""
        what = f"{shape}, {request.num_inference_steps} steps, {deadline}{again}"
        log_request(INFO, entry.name, "accepted: %s", what)

    def _phases(self, request: GenerateRequest) -> tuple[Phase, ...]:
        """The chain of a request, timed by the profile; guidance changes what a step costs."""
        shape, steps = request.shape, request.num_inference_steps
        assert steps is not None
        profile = self._profile.profile
        step_s = {
            degree: self._cost(request) * seconds
            for degree, seconds in self._profile.step_s(shape).items()
            if degree in self._args.cell.all_degrees and self._info.why_not_degree(shape, degree) is None
        }
        return (
            Phase("encode", 1, {1: profile.encode_s(shape)}),
            Phase("denoise", steps, step_s),
            Phase("decode", 1, {1: profile.decode_s(shape)}),
        )

    def _cost(self, request: GenerateRequest) -> float:
        """Of a step, in steps of the profile: two evaluations of the model where guidance needs them."""
        profiled = GenerateRequest("profile")
        return (1 + self._info.guided(request)) / (1 + self._info.guided(profiled))

    def _end(self, entry: Entry, outcome: GenerateResult | TetriserveError) -> None:
        """Settle a request and forget it; what is in flight for it runs out and is released then."""
        if self._entries.pop(entry.id, None) is None:  # settled before
            return
        del self._named[entry.name]
        self._rounds.cancelled(entry.id)
        if isinstance(outcome, TetriserveError):
            word, metrics = outcome.code, None
        else:
            metrics = outcome.metrics
            word = "no_deadline" if metrics.slo_met is None else "met" if metrics.slo_met else "late"
        total_s = time.monotonic() - entry.arrival_s if metrics is None else metrics.total_s
        log_request(INFO, entry.name, "ended: %s after %.3f s", word, total_s, outcome=word, total_s=total_s)
        self._meters.ended(word, entry.request.shape, metrics)
        self._history.ended(entry.id, word, time.time())
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
            self._release(entry)
        self._wake.set()

    def _hand_over(self, picture: Any) -> None:
        now_s = time.monotonic()
        self._handed_over.append((now_s, picture))
        while self._handed_over[0][0] < now_s - HAND_OVER_S:
            self._handed_over.popleft()

    def _release(self, entry: Entry) -> None:
        for gpu in entry.touched - self._recovery.lost:
            self._fleet.tell(gpu, "release", entry.id)
        entry.touched = set()
        entry.conditioning = entry.latents = entry.committed_latents = None

    # ---- planning -----------------------------------------------------------------------------------------

    async def _plan_forever(self) -> None:
        while not self._failure:
            now_s = time.monotonic()
            delay_s = self._rounds.next_wakeup_s(now_s) - now_s
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), None if delay_s == float("inf") else delay_s)
            self._wake.clear()
            self._turn_away(
                self._rounds.expired(time.monotonic()), "can no longer meet its deadline (drop_late)"
            )
            if not self._rounds.is_due(time.monotonic()):
                continue
            snapshot = self._rounds.snapshot(time.monotonic())
            if snapshot.jobs:
                packing, fell_back = await self._planner.pack(snapshot)
                self._turn_away(
                    self._rounds.infeasible(snapshot, packing), "cannot meet its deadline (reject_infeasible)"
                )
                plan = self._rounds.commit(snapshot, packing, time.monotonic())
                self._plan_s.append(time.monotonic() - snapshot.now_s)
                self._meters.planned(self._plan_s[-1])
                if fell_back:
                    self._meters.fell_back()
                ahead_s = unix_ahead_s()
                start_s, boundary_s = snapshot.now_s + ahead_s, plan.boundary_s + ahead_s
                self._history.planned(Plan(start_s, self._plan_s[-1], fell_back, boundary_s))
                for assignment in plan.assignments:
                    self._dispatch(assignment)
                for job in snapshot.jobs:
                    if job.id in self._entries:
                        self._entries[job.id].predict(self._rounds.predicted_finish_s(job.id, snapshot.now_s))

    def _turn_away(self, request_ids: list[str], why: str) -> None:
        for entry in [self._entries[request_id] for request_id in request_ids]:
            self._end(entry, DeadlineInfeasible(f"request {entry.name} {why}"))

    def _dispatch(self, assignment: Assignment) -> None:
        (request_id,) = assignment.request_ids
        entry = self._entries[request_id]
        log_request(DEBUG, entry.name, "sends out %s", assignment)
        sent = send(self._fleet, entry, assignment)
        entry.sent(assignment, sent.produced)
        entry.last_range = self.spawn(self._collect(entry, sent, entry.last_range))

    async def _collect(self, entry: Entry, sent: SentRange, before: asyncio.Task[None] | None) -> None:
        """Wait for a range and for the one before it of the same request, then count it, or plan it again
        when a GPU was lost, or fail its request."""
        assignment = sent.assignment
        results, errors = await settled(self._fleet, sent)
        if before is not None:
            await asyncio.wait([before])
        members = set(assignment.gpus)
        lost = self._recovery.lost
        silent = await self._fleet.silent(members - lost) if errors and not entry.aborting else set()
        # a lost GPU stays lost until its ranges are collected: this one was in flight on the old replica
        gone = silent | (lost & members)
        now_s = time.monotonic()
        entry.outstanding -= 1
        if errors or entry.aborting:
            if not self._failure:
                for gpu in silent:
                    self._recovery.lose(gpu)
            self._rounds.aborted(assignment.seq, now_s)
            short = [cause for cause in map(cause_of, errors) if isinstance(cause, OutOfMemory)]
            # an exchange may fail though all members live, and none of them failed by itself
            torn = bool(errors) and not gone and all(is_elsewhere(cause_of(error)) for error in errors)
            if torn and not entry.aborting:
                entry.deadly.add(assignment.seq)
            if short and not entry.aborting and not self._widen(entry, assignment):
                self._fail(entry, assignment, short[0])
            elif len(entry.deadly) >= max(MIN_DEADLY, self._args.cell.max_losses):
                times = len(entry.deadly)
                why = f"in {times} of its step ranges replicas died or lost each other"
                self._fail(entry, assignment, RuntimeError(why))
            elif gone or short or torn or entry.aborting:
                self._meters.lost_range(assignment.kind)
                log_request(WARNING, entry.name, "lost %s", assignment)
                entry.lose(assignment)
                entry.roll_back()
            else:
                self._fail(entry, assignment, first_cause(errors))
        else:
            self._recovery.reported(assignment.gpus, now_s)
            if assignment.kind != "decode":
                entry.committed_latents = sent.produced[-1]
            complete = self._rounds.finished(assignment.seq, now_s)
            ran = cast("list[Report]", results)
            self._measure(entry, assignment, ran)
            self._history.ran(entry.id, executed(assignment, ran))
            if entry.id in self._entries:
                log_request(DEBUG, entry.name, "has done %s", assignment)
                entry.record(assignment, ran)
                if complete:
                    self._end(entry, entry.finish(sent.produced[0], now_s, self._info.name))
        if entry.id not in self._entries and entry.outstanding == 0:
            self._release(entry)
        self._wake.set()

    def _measure(self, entry: Entry, assignment: Assignment, reports: list[Report]) -> None:
        """A range was run: what it says of step times."""
        shape, degree = entry.request.shape, assignment.degree
        steps = assignment.steps if assignment.kind == "denoise" else 0
        self._meters.ran(shape, degree, steps, entry.degree not in (0, degree), reports)
        if steps:
            step_s = seconds_per_step(reports, steps)
            self._profile.measured(shape, degree, step_s, self._cost(entry.request))
            self._meters.corrected(shape, degree, self._profile.ratio(shape, degree))

    def _widen(self, entry: Entry, assignment: Assignment) -> bool:
        """After a range that ran out of memory: go on at a higher degree. False when there is none."""
        widened = assignment.kind == "denoise" and self._rounds.widened(
            entry.id, assignment.degree, self._recovery.usable
        )
        if widened:
            log_request(
                WARNING, entry.name, "ran out of memory in %s, going on at a higher degree", assignment
            )
        return widened

    def _fail(self, entry: Entry, assignment: Assignment, cause: BaseException) -> None:
        """The request failed by itself; the ones beside and after it go on."""
        if entry.id not in self._entries:
            return
        log_request(ERROR, entry.name, "failed in %s: %r", assignment.kind, cause)
        if isinstance(cause, OutOfMemory):
            self._end(entry, OutOfMemory(f"{assignment.kind} ran out of memory: {cause.message}"))
        else:
            self._end(entry, GenerationFailed(f"{assignment.kind} failed: {type(cause).__name__}: {cause}"))

    # ---- lost GPUs ----------------------------------------------------------------------------------------

    def on_lost(self, gpu: int) -> None:
        self._meters.lost_gpu(gpu)
        # what stands behind it in the queue has nothing to do with it
        if first := next((a for a in self._rounds.running if gpu in a.gpus), None):
            for request_id in first.request_ids:
                if request_id in self._entries:
                    self._entries[request_id].deadly.add(first.seq)
        for entry in self._entries.values():
            entry.knows.discard(gpu)
            entry.holders.discard(gpu)

    def on_back(self, gpu: int) -> None:
        self._wake.set()

    def on_cordoned(self, gpu: int) -> None:
        """End the requests that need more GPUs than there will be; all of them when none is left."""
        n_gpus = self._recovery.usable
        if len(self._recovery.lost) == len(self._fleet):
            self._fail_cell(f"no GPU is left, the last one to fail was {gpu}")
        for request_id in self._rounds.stranded(n_gpus):
            message = f"its memory needs a higher degree, but {n_gpus} GPUs are left"
            self._end(self._entries[request_id], OutOfMemory(message))

    def _fail_cell(self, reason: str) -> None:
        """The cell cannot go on: every open request goes back to the ingress; Serve replaces the cell."""
        if not self._failure:
            logger.error("the cell failed: %s", reason)
            self._failure = reason
            self._wake.set()
        for entry in list(self._entries.values()):
            self._end(entry, CellLost(f"the cell failed: {reason}"))

    # ---- health -------------------------------------------------------------------------------------------

    async def check_health(self) -> None:
        """Raise when the cell is broken: no GPU is left, planning ended, or steps stopped advancing.

        Replicas that died or stand still are found here and replaced.
        """
        if not self._failure:
            await self._recovery.look(time.monotonic())
            self._check_planning(time.monotonic())
        if self._failure and self._failure != "starting":
            raise RuntimeError(self._failure)

    def _check_planning(self, now_s: float) -> None:
        """With all GPUs there and requests waiting something has to be on the board."""
        if self._rounds.running or self._recovery.lost or not self._entries:
            return
        waiting = [now_s - entry.arrival_s - entry.request.waited_s for entry in self._entries.values()]
        idle_s = min([now_s - self._recovery.last_report_s, *waiting])
        if idle_s > self._args.cell.step_timeout_floor_s:
            self._fail_cell(f"nothing was planned for {idle_s:.0f} s while requests wait")

    async def status(self) -> CellStatus:
        gpus = self._args.cell.gpus
        failed = bool(self._failure)
        return CellStatus(
            ready=not failed,
            reason=self._failure,
            gpus=gpus,
            gpus_ready=0 if failed else gpus - len(self._recovery.lost),
            open_requests=len(self._entries),
            running=0 if failed else len(self._rounds.running),
            policy=self._planner.policy.name,
            plan_ms_p50=1000 * _quantile(self._plan_s, 0.5),
            plan_ms_p99=1000 * _quantile(self._plan_s, 0.99),
            fallbacks=self._planner.fallbacks,
            cordoned=self._recovery.cordoned,
            held=sum(self._fleet.held),
        )

    async def metrics(self) -> Families:
        """What `/metrics` shows of this cell."""
        working = {request_id for assignment in self._rounds.running for request_id in assignment.request_ids}
        return self._meters.families(await self.status(), len(self._entries.keys() - working))

    async def profile(self) -> Profile:
        """The step times as measured since the start."""
        return self._profile.corrected()

    async def board(self, seconds: float, owner: str | None) -> dict[str, Any]:
        """`History.board`: the last `seconds` and what is committed, as `owner` may see it."""
        now_s, ahead_s = time.monotonic(), unix_ahead_s()
        self._boards = {who: kept for who, kept in self._boards.items() if now_s - kept[0] < BOARD_AGE_S}
        if (seconds, owner) in self._boards:
            return self._boards[seconds, owner][1]
        running = [] if self._failure else self._rounds.expected(now_s)
        runs = [
            Run(request_id, Execution(a.kind, a.steps, a.gpus, start_s + ahead_s, end_s + ahead_s))
            for a, start_s, end_s in running
            for request_id in a.request_ids
        ]
        cordoned = self._recovery.cordoned
        lost = self._recovery.lost if not self._failure else range(len(self._fleet))
        states = [
            "cordoned" if gpu in cordoned else "lost" if gpu in lost else "ready"
            for gpu in range(len(self._fleet))
        ]
        board = self._history.board(now_s + ahead_s, seconds, owner, runs, states)
        self._boards[seconds, owner] = now_s, board
        return board

    async def record(self, seconds: float, owner: str | None) -> dict[str, Any]:
        """`History.record`: the last `seconds` as `owner` may see them."""
        return self._history.record(time.time(), seconds, owner)

    async def model_info(self) -> ModelInfo:
        return self._info

    def spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a scheduler task failed", exc_info=task.exception())
            self._fail_cell(f"internal error: {task.exception()!r}")


def _asked(option: bool | None, default: bool) -> bool:
    return default if option is None else option


def _quantile(values: Collection[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))] if values else 0.0


def create_scheduler(args: AppArgs, group: PlacementGroup) -> Any:
    """The scheduler actor of a cell, in bundle 0 of its placement group; `start` it next."""
    return (
        ray.remote(Scheduler)
        .options(
            num_cpus=args.cell.scheduler_cpus,
            max_concurrency=4 * args.scheduler.max_open_requests + 64,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        )
        .remote(args, group)
    )
