"""The scheduler actor of a cell: its parts put together, and the loop that plans.

It never touches a tensor: latents and pictures are object references that go from replica to replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.cell.entries import Entry, unix_ahead_s
from deployments.cell.fleet import Fleet
from deployments.cell.meters import Families
from deployments.cell.planner import Planner
from deployments.cell.profiling import fitting_profile
from deployments.cell.ranges import Ranges
from deployments.cell.recovery import Recovery
from deployments.cell.requests import Requests
from deployments.cell.state import CellState
from deployments.cell.view import View
from deployments.config import AppArgs, SchedulerArgs
from deployments.logs import LogForm, logger, write_as
from solver.policies import make_policy
from solver.problem import Job, Policy, Snapshot
from tetriserve.errors import CellLost, OutOfMemory
from tetriserve.model_info import ModelInfo
from tetriserve.profile import Profile
from tetriserve.request import CellStatus, GenerateRequest, GenerateResult, Progress
from tetriserve.scheduler.history import Plan
from tetriserve.scheduler.live_profile import LiveProfile
from tetriserve.scheduler.rounds import RoundScheduler

PLACE_S = 1.0
"""How often who waits is told of a new place in the queue."""


class Scheduler:
    """Ray actor (asyncio). One per cell; owns the cell's GPU replica actors.

    Args:
        args: the application's arguments.
        group: placement group with one bundle for this actor and one for each GPU.
    """

    def __init__(self, args: AppArgs, group: PlacementGroup) -> None:
        knobs = args.scheduler
        policy = _policy(knobs)
        rounds = RoundScheduler(policy, args.cell.gpus, **_round_knobs(knobs))
        self._tasks: set[asyncio.Task[Any]] = set()
        self._state = CellState.of(args, Fleet(args, group), rounds)
        self._planner = Planner(policy, limit_s=_limit_s(knobs))
        self._requests = Requests(self._state)
        self._recovery = Recovery(self._state, self)
        self._ranges = Ranges(self._state, self._requests, self._recovery, self.spawn)
        self._view = View(self._state, self._requests, self._recovery, self._planner)

    async def start(self) -> None:
        """Load the model everywhere, join the groups, get the profile, then plan. Raises `ConfigError`."""
        state, began_s = self._state, time.monotonic()
        await state.fleet.start()
        state.info = state.fleet.info
        profile = await fitting_profile(state.args, state.fleet)
        state.profile = LiveProfile(profile, follows=state.args.profile.correct)
        self._recovery.reported(range(len(state.fleet)), time.monotonic())
        state.failure = ""
        state.started_in_s = time.monotonic() - began_s
        self.spawn(self._plan_forever())
        logger.info("cell is ready: %s on %d x %s", state.info.name, len(state.fleet), state.fleet.device)

    async def turn(self, args: AppArgs, refused: str) -> None:
        """Go on with the knobs of `args.scheduler`; `refused` says what was asked for and is not taken."""
        knobs, policy = args.scheduler, _policy(args.scheduler)
        self._state.args, self._state.refused = args, refused
        self._state.rounds.turn(policy, **_round_knobs(knobs))
        self._planner.turn(policy, limit_s=_limit_s(knobs))
        self._state.wake.set()

    async def write_logs_as(self, form: LogForm) -> None:
        """Write what is logged here and in the GPU replicas so."""
        write_as(form, "Scheduler")
        self._state.fleet.write_logs_as(form)

    # ---- requests -----------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest, call_id: str) -> GenerateResult:
        """Run a request to its end. `image` of the result is a reference to the picture.

        Args:
            call_id: of this call, for `cancel`: a repeated request has several.

        Raises the errors of `tetriserve.errors`.
        """
        entry = self._requests.join(request, call_id)
        try:
            return await asyncio.shield(entry.result)
        except asyncio.CancelledError:
            self._requests.leave(entry, call_id)
            raise

    async def stream(
        self, request: GenerateRequest, call_id: str
    ) -> AsyncIterator[Progress | GenerateResult]:
        """Progress after the first plan, when its place in the queue changed, and after every committed range; then
        the result.

        Who is slow to take it gets the newest, not all of it.
        """
        entry = self._requests.join(request, call_id)
        last: Progress | None = None
        while not entry.result.done():
            changed = entry.changed
            progress = self._progress(entry)
            # a plan may turn a request away: nothing is said before one has seen it
            if progress != last and entry.predicted_s is not None:
                shown = last is not None and progress.preview is last.preview
                last = progress
                yield replace(progress, preview=None) if shown else progress
            # no plan of others tells it that its place is another
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), PLACE_S if entry.phase == "queue" else None)
        yield entry.result.result()

    def _progress(self, entry: Entry) -> Progress:
        now_s, predictions = time.monotonic(), self._state.rounds.predictions
        ahead = predictions.ahead(entry.id, now_s) if entry.phase == "queue" else 0
        return entry.progress(predictions.finish_s(entry.id, now_s), now_s, ahead)

    async def cancel(self, request_id: str, call_id: str) -> bool:
        """`Requests.cancel`."""
        return self._requests.cancel(request_id, call_id)

    async def delete(self, request_ids: Collection[str]) -> bool:
        """`Requests.delete`."""
        return self._requests.delete(request_ids)

    async def drain(self, at_once: bool) -> int:
        """`Requests.drain`."""
        return self._requests.drain(at_once=at_once)

    # ---- planning -----------------------------------------------------------------------------------------

    async def _plan_forever(self) -> None:
        while not self._state.failure:
            now_s = time.monotonic()
            delay_s = self._state.rounds.next_wakeup_s(now_s) - now_s
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._state.wake.wait(), None if delay_s == float("inf") else delay_s)
            self._state.wake.clear()
            for request_id in self._state.rounds.expired(time.monotonic()):
                late = self._requests.entries[request_id]
                self._requests.turn_away(late, "can no longer meet its deadline (drop_late)")
            if not self._state.rounds.is_due(time.monotonic()):
                continue
            snapshot = self._state.rounds.snapshot(time.monotonic())
            if snapshot.jobs:
                packing, fell_back = await self._planner.pack(snapshot)
                refused = self._state.rounds.infeasible(snapshot, packing)
                for request_id in refused:  # answered by `_offer`
                    self._state.rounds.cancelled(request_id)
                plan = self._state.rounds.commit(snapshot, packing, time.monotonic())
                self._view.plan_s.append(time.monotonic() - snapshot.now_s)
                self._state.meters.planned(self._view.plan_s[-1])
                if fell_back:
                    self._state.meters.fell_back()
                ahead_s = unix_ahead_s()
                start_s, boundary_s = snapshot.now_s + ahead_s, plan.boundary_s + ahead_s
                self._state.history.planned(Plan(start_s, self._view.plan_s[-1], fell_back, boundary_s))
                for assignment in plan.assignments:
                    self._ranges.dispatch(assignment)
                if refused:
                    left = self._state.rounds.snapshot(time.monotonic())
                    for job in (job for job in snapshot.jobs if job.id in refused):
                        self.spawn(self._offer(job, left))
                for job in snapshot.jobs:
                    if entry := self._requests.entries.get(job.id):
                        entry.predict(self._state.rounds.predictions.finish_s(job.id, snapshot.now_s))

    async def _offer(self, job: Job, snapshot: Snapshot) -> None:
        """Answer a refused request, with the deadline that it could have had on the board of `snapshot`."""
        deadline_s = await self._planner.earliest_deadline_s(snapshot, job)
        entry = self._requests.entries.get(job.id)
        if entry is None:  # given up meanwhile
            return
        why, slo_s = "cannot meet its deadline (reject_infeasible)", None
        if deadline_s is not None and deadline_s < math.inf:
            # named to three digits, upwards: it has to be enough
            slo_s = _round_up(deadline_s - entry.arrival_s + entry.request.way_back_s)
            why += f"; one of {slo_s:g} s could be met"
        self._requests.turn_away(entry, why, slo_s)

    # ---- lost GPUs ----------------------------------------------------------------------------------------

    def on_lost(self, gpu: int) -> None:
        self._state.meters.lost_gpu(gpu)
        # what stands behind it in the queue has nothing to do with it
        if first := next((a for a in self._state.rounds.running if gpu in a.gpus), None):
            for request_id in first.request_ids:
                if request_id in self._requests.entries:
                    self._requests.entries[request_id].deadly.add(first.seq)
        for entry in self._requests.entries.values():
            entry.knows.discard(gpu)
            entry.holders.discard(gpu)

    def on_back(self, gpu: int) -> None:
        self._state.wake.set()

    def on_cordoned(self, gpu: int) -> None:
        """End the requests that need more GPUs than there will be; all of them when none is left."""
        n_gpus = self._recovery.usable
        if len(self._state.lost) == len(self._state.fleet):
            self._fail_cell(f"no GPU is left, the last one to fail was {gpu}")
        for request_id in self._state.rounds.stranded(n_gpus):
            message = f"its memory needs a higher degree, but {n_gpus} GPUs are left"
            self._requests.end(self._requests.entries[request_id], OutOfMemory(message))

    def _fail_cell(self, reason: str) -> None:
        """The cell cannot go on: every open request goes back to the ingress; Serve replaces the cell."""
        if not self._state.failure:
            reason += self._state.fleet.memory.shortage()
            logger.error("the cell failed: %s", reason)
            self._state.failure = reason
            self._state.wake.set()
        for entry in list(self._requests.entries.values()):
            self._requests.end(entry, CellLost(f"the cell failed: {reason}"))

    # ---- health -------------------------------------------------------------------------------------------

    async def check_health(self) -> None:
        """Raise when the cell is broken: no GPU is left, planning ended, or steps stopped advancing.

        Replicas that died or stand still are found here and replaced.
        """
        if not self._state.failure:
            await self._recovery.look(time.monotonic())
            self._check_planning(time.monotonic())
        if self._state.failure and self._state.failure != "starting":
            raise RuntimeError(self._state.failure)

    def _check_planning(self, now_s: float) -> None:
        """With all GPUs there and requests waiting something has to be on the board."""
        if self._state.rounds.running or self._state.lost or not self._requests.entries:
            return
        waiting = [now_s - entry.admitted_s for entry in self._requests.entries.values()]
        idle_s = min([now_s - self._recovery.last_report_s, *waiting])
        if idle_s > self._state.args.cell.step_timeout_floor_s:
            self._fail_cell(f"nothing was planned for {idle_s:.0f} s while requests wait")

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

    # ---- what it says of itself ---------------------------------------------------------------------------

    async def status(self) -> CellStatus:
        return self._view.status()

    async def metrics(self) -> Families:
        return self._view.metrics()

    async def profile(self) -> Profile:
        return self._view.profile()

    async def board(self, seconds: float, owner: str | None) -> dict[str, Any]:
        return self._view.board(seconds, owner)

    async def record(self, seconds: float, owner: str | None) -> dict[str, Any]:
        return self._view.record(seconds, owner)

    async def model_info(self) -> ModelInfo:
        return self._state.info


def _policy(knobs: SchedulerArgs) -> Policy:
    return make_policy(knobs.policy, time_limit_s=knobs.solver_time_limit_s)


def _round_knobs(knobs: SchedulerArgs) -> dict[str, Any]:
    return {
        "round_s": knobs.round_s,
        "min_round_s": knobs.min_round_s,
        "lead_s": knobs.lead_s,
        "max_batch": knobs.max_batch,
    }


def _limit_s(knobs: SchedulerArgs) -> float:
    """What a decision may take before the fallback's is used."""
    return 2 * knobs.solver_time_limit_s


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


def _round_up(seconds: float) -> float:
    """To three digits."""
    digit = 10.0 ** (math.floor(math.log10(seconds)) - 2)
    return float(f"{math.ceil(seconds / digit) * digit:.3g}")
