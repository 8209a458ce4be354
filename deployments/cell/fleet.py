"""The GPU replicas of a cell: started, joined and measured together."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.cell.replica import CONTROL, THREADS, GPUReplica, ReplicaInfo
from deployments.config import AppArgs
from deployments.logs import LogForm, logger
from deployments.memory import HostMemory
from deployments.progress import note, session_folder
from solver.placement import gpu_sets, group_sets
from tetriserve.engine.report import GivenUp
from tetriserve.errors import ConfigError, GenerationFailed, first_line
from tetriserve.model_info import ModelInfo
from tetriserve.request import Shape

FIRST_REHEARSAL = -(1 << 30)
"""Ranges that no plan has sent are numbered from here: warming and measuring, all before the first planned one."""

ANSWER_TIMEOUT_S = 5.0
"""A replica answers from threads of its own, also while it computes."""


class Fleet:
    """Owns the replica actors, in bundles 1 to n of the cell's placement group.

    Attributes:
        info: the model that all of them loaded.
        device: its device, in words.
        fingerprint: changes with anything that changes step times.
        held: how many requests have tensors on each GPU, as its replica said last.
        memory: of the host, which replicas may have died for lack of.
    """

    def __init__(self, args: AppArgs, group: PlacementGroup) -> None:
        self._args = args
        self._group = group
        self._replicas: list[Any] = []
        self._rehearsals = itertools.count(FIRST_REHEARSAL)
        self._told: set[asyncio.Future[Any]] = set()
        self._log_form: LogForm | None = None
        self.info: ModelInfo
        self.device = ""
        self.fingerprint = ""
        self.held = [0] * len(self)
        self.memory = HostMemory()

    def __len__(self) -> int:
        return self._args.cell.gpus

    def __getitem__(self, gpu: int) -> Any:
        return self._replicas[gpu]

    def write_logs_as(self, form: LogForm) -> None:
        """Have the replicas, those to come too, write their logs so; until then they do as Ray does by default."""
        self._log_form = form
        for gpu, replica in enumerate(self._replicas):
            if replica is not None:
                self.tell(gpu, "write_logs_as", form)

    def tell(self, gpu: int, method: str, *args: Any) -> None:
        """Call a replica's method without waiting. What fails is logged; of a lost replica others know already."""

        def heard(answer: asyncio.Future[Any]) -> None:
            self._told.discard(answer)
            error = None if answer.cancelled() else answer.exception()
            if error is not None and not isinstance(error, ray.exceptions.RayActorError):
                logger.error("%s failed on GPU replica %d: %s", method, gpu, error)

        answer = asyncio.ensure_future(getattr(self._replicas[gpu], method).remote(*args))
        self._told.add(answer)
        answer.add_done_callback(heard)

    async def start(self) -> None:
        """Load the model everywhere and warm the groups of all sets.

        A replica that dies or hangs meanwhile is started again, at most `cell.max_losses` times. Raises
        `ConfigError`, else what the last try raised.
        """
        self._replicas = [None] * len(self)
        self._folder = session_folder() / uuid.uuid4().hex
        self._folder.mkdir(parents=True)
        infos = await asyncio.gather(*(self._load(gpu, self._tries) for gpu in range(len(self))))
        self.info, self.device, self.fingerprint = infos[0].model, infos[0].device, infos[0].fingerprint
        if len(self) > 1:
            await self._warm()

    @property
    def _tries(self) -> int:
        return 1 + self._args.cell.max_losses

    async def _warm(self) -> None:
        cell, everyone = self._args.cell, tuple(range(len(self)))
        sets = tuple(gpus for gpus in group_sets(len(self)) if len(gpus) in cell.all_degrees)
        for tries_left in reversed(range(self._tries)):
            seq = next(self._rehearsals)
            calls = [(gpu, self._replicas[gpu].warm.remote(sets, seq)) for gpu in everyone]
            errors: list[BaseException]
            try:
                _, errors = await asyncio.wait_for(self.settled(calls, everyone, seq), cell.load_timeout_s)
            except asyncio.TimeoutError as error:
                errors = [error]
            if not errors:
                return
            for gpu in everyone:  # those that hang in a meeting or an exchange
                self.tell(gpu, "leave", everyone, seq)
            gone = await self.silent(everyone)
            if not gone or not tries_left:
                raise first_cause(errors)
            logger.error("GPU replicas %s did not build their groups: %r", sorted(gone), errors[0])
            await asyncio.gather(*map(self.replace, gone))
            for gpu in gone:
                await asyncio.wait_for(self.rejoin(gpu, set(everyone) - gone), cell.load_timeout_s)

    async def replace(self, gpu: int) -> None:
        """Put a new replica in place of a lost one and wait until it has loaded the model; `rejoin` it next.

        Raises `TimeoutError` when that takes longer than `cell.load_timeout_s`, else what Ray or the replica raises.
        """
        self.kill(gpu)
        self.held[gpu] = 0
        await self._load(gpu, 1)

    async def _load(self, gpu: int, tries: int) -> ReplicaInfo:
        while True:
            self._replicas[gpu] = self._new(gpu)
            try:
                info: ReplicaInfo = await asyncio.wait_for(
                    self._replicas[gpu].info.remote(), self._args.cell.load_timeout_s
                )
                return info
            except (asyncio.TimeoutError, ray.exceptions.RayActorError) as error:
                tries -= 1
                # what the constructor itself raises it will raise again
                if getattr(error, "actor_init_failed", False):
                    raise
                why = f"GPU replica {gpu} did not start: {first_line(error).rstrip('.')}{self.memory.shortage()}"
                if not tries:
                    raise GenerationFailed(why) from error
                logger.error("%s", why)
                note(self._folder, f"{why}; once more")
                self.kill(gpu)

    async def rejoin(self, gpu: int, others: set[int]) -> None:
        """Bring a new replica together with the survivors among `others`, who keep weights and states.

        They forget their groups with the old one. Groups with the new one are built when a plan first needs them, in
        plan order, so that nobody has to stop for it. Raises what Ray or the replica raises if it cannot be done.
        """
        dropped = [self._replicas[other].drop.remote(gpu) for other in others - {gpu}]
        # one that dies meanwhile is replaced next
        results = await asyncio.gather(*dropped, return_exceptions=True)
        for error in results:
            if isinstance(error, BaseException) and not isinstance(error, ray.exceptions.RayActorError):
                raise error

    async def silent(self, gpus: Iterable[int]) -> set[int]:
        """Those of `gpus` whose replica is dead or does not answer within `ANSWER_TIMEOUT_S`."""
        return {gpu for gpu, state in (await self.states(gpus)).items() if state != "alive"}

    async def dead(self, gpus: Iterable[int]) -> set[int]:
        """Those of `gpus` whose replica's process has ended."""
        return {gpu for gpu, state in (await self.states(gpus)).items() if state == "dead"}

    async def states(self, gpus: Iterable[int]) -> dict[int, str]:
        """By GPU: "alive", "dead" (its process has ended) or "silent" for `ANSWER_TIMEOUT_S`."""

        async def state(gpu: int) -> str:
            try:
                asked = self._replicas[gpu].held.remote()
                self.held[gpu] = await asyncio.wait_for(asked, ANSWER_TIMEOUT_S)
            except asyncio.TimeoutError:
                return "silent"
            except ray.exceptions.RayError:
                return "dead"
            return "alive"

        members = list(gpus)
        return dict(zip(members, await asyncio.gather(*map(state, members)), strict=True))

    def kill(self, gpu: int) -> None:
        """End a replica that does not answer; its calls fail at once."""
        ray.kill(self._replicas[gpu])

    def _new(self, gpu: int) -> Any:
        cell = self._args.cell
        as_actor: Any = ray.remote(concurrency_groups=CONTROL)  # type: ignore[call-overload]
        replica: Any = (
            as_actor(GPUReplica)
            .options(
                num_cpus=cell.cpus_per_replica,
                num_gpus=1 if cell.device == "cuda" else 0,
                max_concurrency=THREADS,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=1 + gpu
                ),
            )
            .remote(gpu, self._args, self._folder)
        )
        if self._log_form is not None:
            replica.write_logs_as.remote(self._log_form)
        return replica

    async def settled(
        self, calls: Sequence[tuple[int, Any]], gpus: tuple[int, ...], seq: int
    ) -> tuple[list[Any], list[BaseException]]:
        """Wait for the members of range `seq` over `gpus`, given as (GPU, reference to what its call returns).

        When one fails the others are told to leave: they may stand in a kernel that waits for it.

        Returns:
            What each came to, errors included, and the errors in the order in which they came.
        """
        errors: list[BaseException] = []

        def hear(call: asyncio.Future[Any]) -> None:
            error = asyncio.CancelledError() if call.cancelled() else call.exception()
            if error is not None:
                errors.append(error)

        waiting = {asyncio.ensure_future(call): gpu for gpu, call in calls}
        for call in waiting:
            call.add_done_callback(hear)
        _, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
        for call in pending:
            self.tell(waiting[call], "leave", gpus, seq)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        return results, errors

    def measurable(self) -> list[tuple[Shape, int]]:
        """Every shape and degree of the configuration that the model can run; logs why others cannot.

        Raises `ConfigError` for a shape that the model cannot run at all.
        """
        pairs = []
        for shape in self._args.profile.all_shapes:
            reason = self.info.why_not_shape(shape)
            if reason:
                raise ConfigError(f"args.profile.shapes: {shape}: {reason}")
            for degree in self._args.cell.all_degrees:
                reason = self.info.why_not_degree(shape, degree)
                if reason is None:
                    pairs.append((shape, degree))
                else:
                    logger.info("degree %d is not used for %s: %s", degree, shape, reason)
        return pairs

    async def measure(self, shape: Shape, degree: int, batches: tuple[int, ...] = ()) -> dict[Any, float]:
        """Median seconds by kind of phase, with all GPUs busy at this degree, as in service: of a step, and at degree
        1 of the other phases. With `batches` instead by these, of a step of so many requests.

        Raises what a replica raises, `OutOfMemory` when it does not fit.
        """
        settings = self._args.profile
        disjoint: list[tuple[int, ...]] = []
        for gpus in gpu_sets(len(self), degree):
            if not any(set(gpus) & set(other) for other in disjoint):
                disjoint.append(gpus)

        def measuring(gpus: tuple[int, ...]) -> Any:
            seq = next(self._rehearsals)
            arguments = (shape, gpus, seq, settings.warmup, settings.repeats, batches)
            calls = [(gpu, self._replicas[gpu].measure.remote(*arguments)) for gpu in gpus]
            return self.settled(calls, gpus, seq)

        results: list[dict[Any, float]] = []
        for measured, errors in await asyncio.gather(*map(measuring, disjoint)):
            if errors:
                raise first_cause(errors)
            results += measured
        return {kind: statistics.median(result[kind] for result in results) for kind in results[0]}


def cause_of(error: BaseException) -> BaseException:
    """What a replica raised, out of Ray's wrapping."""
    return getattr(error, "cause", None) or error


def is_elsewhere(error: BaseException) -> bool:
    """Whether a member's call failed for nothing that the member or its request did."""
    raised = isinstance(error, ray.exceptions.RayTaskError)  # else the call itself came to nothing
    return isinstance(cause_of(error), GivenUp) or (isinstance(error, ray.exceptions.RayError) and not raised)


def first_cause(errors: Sequence[BaseException]) -> BaseException:
    """Of the errors of a range's members, in the order in which they came, the one that the others follow from."""
    return cause_of(next((error for error in errors if not is_elsewhere(error)), errors[0]))
