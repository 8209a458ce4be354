"""The GPU replica actor: one GPU, one engine, assignments in plan order.

torch and diffusers are imported when a replica starts: the scheduler imports this module without them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from logging import DEBUG, ERROR, WARNING
from pathlib import Path
from typing import Any

import ray

from deployments.cell.entries import name_of
from deployments.cell.plan_order import PlanOrder
from deployments.config import AppArgs
from deployments.logs import LogForm, guard_prompts, log_request, logger, quotes, unquoted, write_as
from deployments.progress import note
from tetriserve.engine.environment import set_environment
from tetriserve.engine.report import GivenUp
from tetriserve.errors import ConfigError, GenerationFailed, OutOfMemory, first_line
from tetriserve.model_info import ModelInfo
from tetriserve.request import GenerateRequest, Shape
from tetriserve.scheduler.assignment import Assignment

CPU_NICENESS = 19
"""On CPU the replicas yield to the scheduler and the ingress, which share their cores and run at 15, as Ray has it.
Only more than one has can be had without CAP_SYS_NICE."""

THREADS = 32
"""Calls a replica can hold: they wait for their turn here, so that arguments are there when it comes."""

CONTROL = {"control": 4}
"""Threads beside them for calls that wait for nothing: however many ranges stand here, the replica answers, and
leaves a group that hangs."""


@dataclass(frozen=True)
class ReplicaInfo:
    """What a replica says after loading; `fingerprint` changes with anything that changes step times."""

    model: ModelInfo
    device: str
    fingerprint: str


Boxed = list[Any] | None
"""A reference in a list: Ray would not run a call at all when what one of its plain arguments refers to failed."""


def boxed(reference: Any) -> Boxed:
    """What to give `GPUReplica.run` for a reference or None."""
    return None if reference is None else [reference]


def _unboxed(box: Boxed) -> Any:
    return None if box is None else ray.get(box[0])


def _log_failed(future: Future[Any]) -> None:
    """For calls that nobody waits for."""
    if error := future.exception():
        logger.error("a release failed", exc_info=error)


Held = list[tuple[Any, Any]]
"""(conditioning, latents) by request of a range, None for what a replica has already."""


def _encode(engine: Any, assignment: Assignment, request: GenerateRequest | None, held: Held) -> Any:
    assert request is not None
    return engine.encode(assignment.request_ids[0], request)


def _encode_image(engine: Any, assignment: Assignment, request: GenerateRequest | None, held: Held) -> Any:
    assert request is not None
    return engine.encode_image(assignment.request_ids[0], request, *held[0])


def _denoise(engine: Any, assignment: Assignment, request: GenerateRequest | None, held: Held) -> Any:
    from tetriserve.engine.engine import Share

    of_requests = zip(assignment.request_ids, assignment.first_steps, held, strict=True)
    shares = [Share(request_id, first, *own) for request_id, first, own in of_requests]
    gpus = assignment.gpus
    report = engine.denoise_together(shares, gpus, assignment.steps, assignment.seq)
    is_leader = gpus[0] == engine.groups.gpu
    return report, *(engine.pack(share.request_id) if is_leader else None for share in shares)


def _decode(engine: Any, assignment: Assignment, request: GenerateRequest | None, held: Held) -> Any:
    return engine.decode(assignment.request_ids[0], *held[0])


@dataclass(frozen=True)
class PhaseRun:
    """How a kind of phase is run by an `Engine`.

    Attributes:
        run: (engine, assignment, request, held) to the report and what it produced.
        produces: how many things the group's first GPU gives beside its report, for each request: conditioning and
            latents, latents, or the picture.
        takes_request: it gets the request, the others know it by the conditioning.
    """

    run: Callable[..., Any]
    produces: int
    takes_request: bool = False


PHASES = {
    "encode": PhaseRun(_encode, 2, takes_request=True),
    "encode_image": PhaseRun(_encode_image, 2, takes_request=True),
    "denoise": PhaseRun(_denoise, 1),
    "decode": PhaseRun(_decode, 1),
}
"""By `Phase.kind`."""


class GPUReplica:
    """Ray actor (threaded) that holds a whole model and runs step ranges for groups of replicas.

    A range that did not run as planned raises in the caller; the replica stays usable. Only where the device is
    broken, as CUDA is after an illegal access, the process ends, to be replaced like any that dies.

    Args:
        gpu: its number in the cell.
        args: the application's arguments.
        folder: of the cell, for its replicas to meet in.
    """

    def __init__(self, gpu: int, args: AppArgs, folder: Path) -> None:
        set_environment()
        guard_prompts()
        import torch

        self._gpu = gpu
        self._args = args
        self._folder = folder
        on_cuda = args.cell.device == "cuda"
        if on_cuda and not torch.cuda.is_available():
            raise ConfigError("cell.device: no CUDA device is visible to this replica; use cpu")
        if not on_cuda:
            torch.set_num_threads(1)
        self._device = torch.device("cuda", 0) if on_cuda else torch.device("cpu")
        self._order = PlanOrder(
            niceness=0 if on_cuda else CPU_NICENESS,
            dies=lambda reason: note(folder, f"GPU replica {gpu} ends: {reason}"),
        )
        self._order.run(self._load)

    def _load(self) -> None:
        import torch

        from tetriserve.engine.adapter import ModelLimits
        from tetriserve.engine.compiled import check_compiler, compile_blocks
        from tetriserve.engine.engine import Engine
        from tetriserve.engine.groups import GroupTable
        from tetriserve.engine.kernels import attention_kernel
        from tetriserve.models.embedded import DESCRIPTION, EMBEDDED
        from tetriserve.models.load import load_model

        model, device = self._args.model, self._device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        name = model.name or os.path.basename(model.path.rstrip("/"))
        limits = ModelLimits(
            name=name,
            max_sequence_length=model.max_sequence_length,
            default_steps=model.default_steps,
            max_steps=model.max_steps,
            max_pixels=model.max_pixels,
            max_frames=model.max_frames,
            max_prompt_chars=model.max_prompt_chars,
            description=DESCRIPTION if model.path in EMBEDDED else "",
        )
        if model.compile:
            check_compiler(device)
        adapter = load_model(
            model.path,
            limits,
            attention_kernel(self._args.cell.attention_backend, device),
            dtype=getattr(torch, model.dtype),
            device=device,
            revision=model.revision,
            quantization=model.quantization,
            loras={lora.name: lora.path for lora in model.loras},
        )
        self._engine = Engine(adapter, GroupTable(self._gpu, device, self._folder))
        if model.compile:
            for transformer in adapter.transformers():
                compile_blocks(transformer)
            # compiled code would be made anew for every mix
            adapter.info = replace(adapter.info, batches="")
            self._compile()
        self._info = self._describe()

    def _compile(self) -> None:
        """Blocks are compiled when they first run: have that behind us before there is a request."""
        shapes = [
            shape
            for shape in self._args.profile.all_shapes
            if not self._engine.adapter.info.why_not_shape(shape)
        ]
        for i, shape in enumerate(shapes, 1):
            text = f"compiling the model for {shape} ({i} of {len(shapes)})"
            logger.info(text)
            note(self._folder, text)
            self._engine.rehearse(shape)

    def _describe(self) -> ReplicaInfo:
        import diffusers
        import torch

        on_cuda = self._device.type == "cuda"
        device = torch.cuda.get_device_name(self._device) if on_cuda else "CPU, one thread"
        adapter = self._engine.adapter
        facts = [
            dict(adapter.pipeline.transformer.config),
            self._args.model.dtype,
            self._args.model.compile,
            self._args.model.quantization,
            [(lora.name, lora.path) for lora in self._args.model.loras],
            self._args.cell.attention_backend,
            adapter.info.text_tokens,
            device,
            torch.__version__,
            diffusers.__version__,
        ]
        fingerprint = hashlib.sha256(json.dumps(facts, default=str, sort_keys=True).encode()).hexdigest()
        return ReplicaInfo(adapter.info, device, fingerprint)

    @ray.method(concurrency_group="control")
    def write_logs_as(self, form: LogForm) -> None:
        """Write what is logged here so."""
        write_as(form, f"GPUReplica_{self._gpu}")

    def info(self) -> ReplicaInfo:
        """What was loaded."""
        return self._info

    @ray.method(concurrency_group="control")
    def held(self) -> int:
        """How many requests have tensors here.

        Answers at once, also while the engine computes: the scheduler asks whether this replica lives.
        """
        return self._engine.held

    def drop(self, lost: int) -> None:
        """Forget the groups with a GPU that was lost."""
        groups = self._engine.groups
        if self._device.type == "cuda":
            groups.drop(lost)  # at once: a kernel that waits for a dead GPU only ends when it is aborted
        else:
            self._order.run(lambda: groups.drop(lost))

    def warm(self, sets: tuple[tuple[int, ...], ...], seq: int) -> None:
        """Build the groups of `sets` beforehand, as range `seq`; every replica of the cell must be called."""
        self._order.run(lambda: self._engine.groups.warm(sets, seq))

    def run(
        self,
        assignment: Assignment,
        request: GenerateRequest | None,
        held: list[tuple[Boxed, Boxed]],
    ) -> Any:
        """Run a step range in its turn.

        Args:
            held: (conditioning, latents) of each of its requests.

        When it fails nothing of its requests stays here. Raises `OutOfMemory` when memory was short, `GivenUp` when
        the cause is somewhere else.

        Returns:
            encode: (Report, Conditioning, Latents); decode: (Report, picture);
            denoise: (Report, Latents of each request) on the first GPU of the group, Report on the others.
        """
        place = assignment.gpus.index(self._gpu)
        name = ", ".join(map(name_of, assignment.request_ids))
        own: Held = []
        try:
            own = [(_unboxed(conditioning), _unboxed(latents)) for conditioning, latents in held]
            if request is not None:
                request = request.with_pixels(ray.get([image.pixels for image in request.images]))
        except ray.exceptions.RayError as error:
            # the range takes its turn all the same: those planned behind it wait for it
            missing = f"the range before failed: {type(error).__name__}"
        else:
            missing = ""

        def advance() -> Any:
            engine = self._engine
            log_request(DEBUG, name, "begins %s", assignment)
            # first of all, for nobody can leave a group that the others still build
            group = engine.groups.group(assignment.gpus, assignment.seq)
            if missing:
                raise GivenUp(missing)
            with unquoted():
                made = PHASES[assignment.kind].run(engine, assignment, request, own)
            if group is not None:
                group.agree(self._device)
            return made if place == 0 else made[0]

        said = () if request is None else (request.prompt, request.negative_prompt)

        def call() -> Any:
            return self._or_abandon(
                advance, assignment.request_ids, assignment.gpus, assignment.seq, name, f"{assignment}", said
            )

        return self._order.run_after(assignment.after[place], assignment.seq, call)

    def _or_abandon(
        self,
        call: Callable[[], Any],
        request_ids: tuple[str, ...],
        gpus: tuple[int, ...],
        seq: int,
        name: str,
        what: str,
        said: tuple[str | None, ...] = (),
    ) -> Any:
        """`call`, and when it fails nothing of its requests or group stays here. Logs of `name` that `what`
        failed, but no text that has words of the client, `said`, in it."""
        from tetriserve.engine.engine import is_out_of_memory

        try:
            return call()
        except Exception as error:
            failure, own = error, None if isinstance(error, GivenUp) else error
            if is_out_of_memory(error):
                failure = OutOfMemory(first_line(error))
            elif own is not None and quotes(str(error), *said):
                failure, own = GenerationFailed(f"{type(error).__name__}, its text quotes the request"), None
            log_request(WARNING, name, "failed in %s: %s", what, type(error).__name__, error=own)
        # only here the traceback is gone that holds the tensors of the failed step
        try:
            self._engine.abandon(request_ids, gpus, seq)
        except Exception as broken:
            log_request(
                ERROR, name, "met a broken device, GPU replica %d ends: %s: %s", self._gpu, failure, broken
            )
            os._exit(1)
        raise failure

    @ray.method(concurrency_group="control")
    def leave(self, gpus: tuple[int, ...], seq: int) -> None:
        """Another member of range `seq` failed: do not wait for it any longer."""
        self._engine.groups.call_off(seq)
        if self._device.type == "cuda":  # in a collective gloo notices by itself
            self._engine.groups.leave(gpus, seq)

    @ray.method(concurrency_group="control")
    def release(self, request_id: str) -> None:
        """Free a request's memory, as soon as the engine is between two ranges; does not wait for it."""
        self._order.post(lambda: self._engine.release(request_id)).add_done_callback(_log_failed)

    def measure(
        self,
        shape: Shape,
        gpus: tuple[int, ...],
        seq: int,
        warmup: int,
        repeats: int,
        batches: tuple[int, ...] = (),
    ) -> Any:
        """`Engine.measure`, or of `batches` `Engine.measure_together`; all of `gpus` must be called, as range
        `seq`. Raises as `run` does."""
        name = f"measure-{seq}"
        names = tuple(f"{name}-{i}" for i in range(max(batches, default=1)))

        def call() -> Any:
            engine = self._engine
            if batches:
                return engine.measure_together(names, shape, gpus, seq, warmup, repeats, batches)
            return engine.measure(names[0], shape, gpus, seq, warmup, repeats)

        return self._order.run(
            lambda: self._or_abandon(call, names, gpus, seq, name, f"a measurement of {shape}")
        )
