"""The GPU replicas of a cell: started, joined and measured together."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.config import AppArgs
from deployments.logs import LogForm, logger
from deployments.replica import THREADS, GPUReplica, ReplicaInfo
from solver.placement import gpu_sets, group_sets
from tetriserve.errors import ConfigError
from tetriserve.profile import Profile
from tetriserve.request import ModelInfo, Shape

Measured = Callable[[Shape, int, float], None]
"""Told of every measurement: shape, degree, seconds of a step."""


LOAD_TRIES = 3
"""A replica that dies or hangs while the cell starts is started again, so often at most."""

ANSWER_TIMEOUT_S = 5.0
"""A replica answers from threads of its own, also while it computes."""


class Fleet:
    """Owns the replica actors, in bundles 1 to n of the cell's placement group.

    Attributes:
        info: the model that all of them loaded.
        device: its device, in words.
        fingerprint: changes with anything that changes step times.
        epoch: counts the rendezvous stores; a new one with every replaced replica.
        held: how many requests have tensors on each GPU, as its replica said last.
    """

    def __init__(self, args: AppArgs, group: PlacementGroup) -> None:
        self._args = args
        self._group = group
        self._replicas: list[Any] = []
        self._log_form: LogForm | None = None
        self.info: ModelInfo
        self.device = ""
        self.fingerprint = ""
        self.epoch = 0
        self.held = [0] * len(self)

    def __len__(self) -> int:
        return self._args.cell.gpus

    def __getitem__(self, gpu: int) -> Any:
        return self._replicas[gpu]

    def write_logs_as(self, form: LogForm) -> None:
        """Have the replicas, those to come too, write their logs so; until then they do as Ray does by default."""
        self._log_form = form
        for replica in filter(None, self._replicas):
            replica.write_logs_as.remote(form)

    async def start(self) -> None:
        """Load the model everywhere and warm the groups of all sets. Raises `ConfigError`."""
        self._replicas = [None] * len(self)
        infos = await asyncio.gather(*(self._load(gpu, LOAD_TRIES) for gpu in range(len(self))))
        self.info, self.device, self.fingerprint = infos[0].model, infos[0].device, infos[0].fingerprint
        if len(self) > 1:
            port = await self._replicas[0].open_store.remote()
            cell = self._args.cell
            sets = tuple(gpus for gpus in group_sets(len(self)) if len(gpus) in cell.all_degrees)
            await asyncio.gather(*(replica.join.remote(self.epoch, port) for replica in self._replicas))
            await asyncio.gather(*(replica.warm.remote(self.epoch, sets) for replica in self._replicas))

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
                if not tries or getattr(error, "actor_init_failed", False):
                    raise
                logger.error("GPU replica %d did not start: %r", gpu, error)
                self.kill(gpu)

    async def rejoin(self, gpu: int, others: set[int]) -> None:
        """Bring a new replica together with the survivors among `others`, who keep weights and states.

        One at a time. Groups with the new replica are built over a fresh store when a plan first needs them, in
        plan order, so that nobody has to stop for it. Raises what Ray or the replica raises if it cannot be done.
        """
        epoch = self.epoch + 1
        port = await self._replicas[gpu].open_store.remote()
        await self._replicas[gpu].join.remote(epoch, port)
        joined = [self._replicas[other].join.remote(epoch, port, gpu) for other in others - {gpu}]
        # one that dies meanwhile is replaced next, in an epoch of its own
        results = await asyncio.gather(*joined, return_exceptions=True)
        for error in results:
            if isinstance(error, BaseException) and not isinstance(error, ray.exceptions.RayActorError):
                raise error
        self.epoch = epoch

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
        replica: Any = (
            ray.remote(GPUReplica)
            .options(
                num_cpus=cell.cpus_per_replica,
                num_gpus=1 if cell.device == "cuda" else 0,
                max_concurrency=THREADS,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=1 + gpu
                ),
            )
            .remote(gpu, self._args)
        )
        if self._log_form is not None:
            replica.write_logs_as.remote(self._log_form)
        return replica

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

    async def measure(self, shape: Shape, degree: int) -> tuple[float, float | None, float | None]:
        """Median seconds of (step, encode, decode) with all GPUs busy at this degree, as in service."""
        settings = self._args.profile
        disjoint: list[tuple[int, ...]] = []
        for gpus in gpu_sets(len(self), degree):
            if not any(set(gpus) & set(other) for other in disjoint):
                disjoint.append(gpus)
        results = await asyncio.gather(
            *(
                self._replicas[gpu].measure.remote(shape, gpus, settings.warmup, settings.repeats)
                for gpus in disjoint
                for gpu in gpus
            )
        )
        steps, encodes, decodes = zip(*results, strict=True)
        if degree > 1:
            return statistics.median(steps), None, None
        return statistics.median(steps), statistics.median(encodes), statistics.median(decodes)

    async def profile(self, measured: Measured) -> Profile:
        """Measure every shape and degree of the configuration."""
        args = self._args
        steps: dict[Shape, dict[int, float]] = {}
        encode: dict[Shape, float] = {}
        decode: dict[Shape, float] = {}
        for shape, degree in self.measurable():
            step_s, encode_s, decode_s = await self.measure(shape, degree)
            steps.setdefault(shape, {})[degree] = step_s
            if encode_s is not None and decode_s is not None:
                encode[shape], decode[shape] = encode_s, decode_s
            measured(shape, degree, step_s)
        return Profile(
            model=self.info.name,
            device=self.device,
            source=f"measured by tetriserve profile: median of {args.profile.repeats} steps after "
            f"{args.profile.warmup}, {args.model.dtype}, {args.cell.attention_backend} attention",
            degrees=args.cell.all_degrees,
            step_seconds=steps,
            encode_seconds=encode,
            decode_seconds=decode,
        )
