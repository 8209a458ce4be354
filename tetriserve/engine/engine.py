"""What one GPU does with an assignment: encode, a range of denoising steps over a group, decode."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tetriserve.engine.adapter import ModelAdapter, RequestState
from tetriserve.engine.groups import GroupTable
from tetriserve.engine.latents import (
    Conditioning,
    Latents,
    pack_conditioning,
    pack_latents,
    unpack_conditioning,
    unpack_state,
)
from tetriserve.engine.preview import fit_colors, marks_passed, picture
from tetriserve.engine.report import Report
from tetriserve.request import GenerateRequest, Shape

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
"""What the CPU's allocator, CUDA, NCCL, cuBLAS and cuDNN say in a RuntimeError when memory is short."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


@dataclass(frozen=True)
class Share:
    """A request's part in a denoising range.

    Attributes:
        first_step: of its own; with reuse of those that are computed.
        conditioning, latents: needed only where a GPU does not hold them already.
    """

    request_id: str
    first_step: int
    conditioning: Conditioning | None = None
    latents: Latents | None = None


@dataclass
class _Going:
    """A share on its way.

    Attributes:
        ends: where its state is behind each step of the range.
        total: steps of all of it.
        before, velocity: its latents before its last step, and what was predicted there.
    """

    state: RequestState
    ends: tuple[int, ...]
    total: int
    before: torch.Tensor
    velocity: torch.Tensor


class Engine:
    """Keeps the states of the requests that ran on this GPU last, and runs their next phases.

    A range over several GPUs is entered by all members with equal arguments, in plan order.
    """

    def __init__(self, adapter: ModelAdapter, groups: GroupTable) -> None:
        self.adapter = adapter
        self.groups = groups
        self._states: dict[str, RequestState] = {}
        self._conditioning: dict[str, tuple[GenerateRequest, dict[str, Any]]] = {}
        self._colors: torch.Tensor | None = None

    @property
    def held(self) -> int:
        """Requests that have tensors here."""
        return len(self._conditioning)

    @torch.inference_mode()
    def encode(self, request_id: str, request: GenerateRequest) -> tuple[Report, Conditioning, Latents]:
        """Text encoders and initial noise. `request.seed` must be set, its pictures be pixels."""
        started_s = self._start()
        request = self.adapter.resolve(request)
        self.adapter.wear(request)
        conditioning = self.adapter.encode(request)
        began = self._began(started_s, request_id, self.adapter.begin(request, conditioning))
        return replace(began[0], truncated=self.adapter.words.cut(request)), *began[1:]

    @torch.inference_mode()
    def encode_image(
        self,
        request_id: str,
        request: GenerateRequest,
        conditioning: Conditioning | None = None,
        latents: Latents | None = None,
    ) -> tuple[Report, Conditioning, Latents]:
        """After `encode`, the request's pictures through the VAE: conditioning and first latents are new ones."""
        started_s = self._start()
        state = self._state(request_id, conditioning, latents)
        resolved = state.request.with_pixels(image.pixels for image in request.images)
        return self._began(started_s, request_id, self.adapter.begin_from(resolved, state.conditioning))

    def _began(
        self, started_s: float, request_id: str, state: RequestState
    ) -> tuple[Report, Conditioning, Latents]:
        state.request = state.request.without_pixels()
        self._conditioning[request_id] = (state.request, state.conditioning)
        self._states[request_id] = state
        return self._report(started_s, started_s), pack_conditioning(state), pack_latents(state)

    @torch.inference_mode()
    def denoise(
        self,
        request_id: str,
        gpus: tuple[int, ...],
        first_step: int,
        steps: int,
        conditioning: Conditioning | None = None,
        latents: Latents | None = None,
        seq: int = 0,
    ) -> Report:
        """`denoise_together` of one request. Raises FloatingPointError when its latents are no numbers any more."""
        report = self.denoise_together(
            [Share(request_id, first_step, conditioning, latents)], gpus, steps, seq
        )
        if report.failures[0]:
            raise FloatingPointError(report.failures[0])
        return report

    @torch.inference_mode()
    def denoise_together(
        self, shares: Sequence[Share], gpus: tuple[int, ...], steps: int, seq: int = 0
    ) -> Report:
        """Run `steps` steps of each request over `gpus`, as range `seq`; the states stay here, on every member.

        With reuse steps are those that are computed; the extrapolated ones behind each are part of it.
        The first of `gpus` reports a preview of each that asks for some and passed a mark. Whose latents are no
        numbers any more has failed; the others are as they would be without it.
        Raises RuntimeError when a state at hand is not at its first step, and whatever a step raises.
        """
        started_s = self._start()
        group = self.groups.group(gpus, seq)
        adapter = self.adapter
        going = [self._going(share, steps) for share in shares]
        states = [one.state for one in going]
        adapter.wear(states[0].request)
        switched_s = time.time()
        with adapter.over(group):
            for step in range(steps):
                for one in going:
                    one.before = one.state.latents
                for one, velocity in zip(going, adapter.step_together(states), strict=True):
                    one.velocity = velocity
                    while one.state.step < one.ends[step]:
                        one.before = one.state.latents
                        one.velocity = adapter.coast(one.state)
        # every GPU holds the same latents, so all of them find the same
        failures = tuple(
            ""
            if torch.isfinite(state.latents).all()
            else f"latents are not finite after step {state.step} of request {share.request_id}"
            for share, state in zip(shares, states, strict=True)
        )
        report = replace(self._report(started_s, switched_s), failures=failures)
        previews: list[np.ndarray | None] = [None] * len(shares)
        for i, (share, one) in enumerate(zip(shares, going, strict=True)):
            request, first = one.state.request, share.first_step
            passed = marks_passed(request.previews, one.total, first, first + steps)
            if passed and gpus[0] == self.groups.gpu and not failures[i]:
                previews[i] = self._preview(one.state, one.before, one.velocity)
        return replace(report, previews=tuple(previews))

    def _going(self, share: Share, steps: int) -> _Going:
        state, info = self._state(share.request_id, share.conditioning, share.latents), self.adapter.info
        bounds = (*info.computed_steps(state.request), info.steps_of(state.request))
        first = share.first_step
        if state.step != bounds[first]:
            raise RuntimeError(
                f"request {share.request_id} is at step {state.step} on GPU {self.groups.gpu}, "
                f"expected {bounds[first]}"
            )
        return _Going(
            state, bounds[first + 1 : first + steps + 1], len(bounds) - 1, state.latents, state.latents
        )

    @torch.inference_mode()
    def decode(
        self,
        request_id: str,
        conditioning: Conditioning | None = None,
        latents: Latents | None = None,
    ) -> tuple[Report, np.ndarray]:
        """The finished picture, uint8 [height, width, 3], or clip, uint8 [frames, height, width, 3]."""
        started_s = self._start()
        state = self._state(request_id, conditioning, latents)
        switched_s = time.time()
        image = self.adapter.decode(state.request, state.latents)
        return self._report(started_s, switched_s), image

    def pack(self, request_id: str) -> Latents:
        """The latents held here, ready to travel."""
        return pack_latents(self._states[request_id])

    def release(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        self._states.pop(request_id, None)
        self._conditioning.pop(request_id, None)

    def abandon(self, request_ids: Iterable[str], gpus: tuple[int, ...], seq: int) -> None:
        """Range `seq` over `gpus` failed here: leave their group, forget its requests, give their memory back.

        The other members, who may wait for this one, then fail too and do the same. Raises what the device raises
        when it can do nothing more in this process, as CUDA cannot after an illegal access: whether an error was of
        that kind its text does not say.
        """
        self.groups.leave(gpus, seq)
        for request_id in request_ids:
            self.release(request_id)
        device = self.adapter.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
        torch.ones(1, device=device).sum().item()

    def rehearse(self, shape: Shape) -> None:
        """One step of a made-up request on this GPU alone: what happens at the first step only is done then."""
        self.encode("rehearsal", _made_up(shape, 1))
        self.denoise("rehearsal", (self.groups.gpu,), 0, 1)
        self.release("rehearsal")

    @torch.inference_mode()
    def measure(
        self, request_id: str, shape: Shape, gpus: tuple[int, ...], seq: int, warmup: int, repeats: int
    ) -> dict[str, float]:
        """Median seconds by kind of phase: of one step over `gpus`, and for one GPU of the other phases.

        All members call it together, as range `seq`; the request is made up and released again. `abandon` it when
        this raises.
        """
        alone, request = len(gpus) == 1, _made_up(shape, warmup + repeats)
        edit = request
        if self.adapter.info.editing.max_images and shape.frames == 1:
            grey = np.full((shape.height, shape.width, 3), 127, np.uint8)
            edit = replace(request, images=[grey])
        seconds: dict[str, list[float]] = {}

        def timed(kind: str, report: Report) -> None:
            seconds.setdefault(kind, []).append(report.ended_s - report.started_s)

        for _ in range(1 + repeats if alone else 0):
            timed("encode", self.encode(request_id, edit)[0])
        for _ in range(1 + repeats if alone and edit.images else 0):
            timed("encode_image", self.encode_image(request_id, edit)[0])
        if not alone or edit.images:  # a step as the profile has it: from noise, with no picture beside
            self.encode(request_id, request)
        for step in range(warmup + repeats):
            timed("denoise", self.denoise(request_id, gpus, step, 1, seq=seq))
        for _ in range(1 + repeats if alone else 0):
            timed("decode", self.decode(request_id)[0])
        self.release(request_id)
        return {
            kind: statistics.median(times[warmup if kind == "denoise" else 1 :])
            for kind, times in seconds.items()
        }

    @torch.inference_mode()
    def measure_together(
        self,
        names: Sequence[str],
        shape: Shape,
        gpus: tuple[int, ...],
        seq: int,
        warmup: int,
        repeats: int,
        batches: Sequence[int],
    ) -> dict[int, float]:
        """Median seconds of a step over `gpus` of so many requests, in turn: a machine is faster now and slower then.

        Called as `measure`; `names` are for as many made-up requests as the largest batch has.
        """
        request = _made_up(shape, (warmup + repeats) * len(batches))
        for name in names:
            self.encode(name, request)
        seconds: dict[int, list[float]] = {batch: [] for batch in batches}
        done = dict.fromkeys(names, 0)
        for _ in range(warmup + repeats):
            for batch in batches:
                members = names[:batch]
                report = self.denoise_together([Share(one, done[one]) for one in members], gpus, 1, seq)
                seconds[batch].append(report.ended_s - report.started_s)
                for one in members:
                    done[one] += 1
        for name in names:
            self.release(name)
        return {batch: statistics.median(times[warmup:]) for batch, times in seconds.items()}

    def _preview(self, state: RequestState, before: torch.Tensor, velocity: torch.Tensor) -> np.ndarray:
        """What the picture comes to if the flow goes on straight from the last step."""
        if self._colors is None:
            # not before a request asks: then it takes about as long as two steps of a small picture, once, while at
            # load it would hold up every replacement of a lost replica
            self._colors = fit_colors(self.adapter)
        sigma = state.sampler.sigmas[state.step - 1].float()
        finished = before.float() - sigma * velocity.float()
        return picture(self.adapter.spatial(state.request, finished), self._colors)

    def _state(
        self, request_id: str, conditioning: Conditioning | None, latents: Latents | None
    ) -> RequestState:
        if conditioning is not None:
            tensors = unpack_conditioning(conditioning, self.adapter.device)
            self._conditioning[request_id] = (conditioning.request, tensors)
        if latents is not None:
            request, held = self._conditioning[request_id]
            self._states[request_id] = unpack_state(self.adapter, request, held, latents)
        state = self._states.get(request_id)
        if state is None:
            raise RuntimeError(f"request {request_id} has no state on GPU {self.groups.gpu}")
        return state

    def _start(self) -> float:
        if self.adapter.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.adapter.device)
        return time.time()

    def _report(self, started_s: float, switched_s: float) -> Report:
        peak = 0
        if self.adapter.device.type == "cuda":
            torch.cuda.synchronize(self.adapter.device)
            free, total = torch.cuda.mem_get_info(self.adapter.device)
            # what torch does not allocate is there as well: NCCL's buffers, CUDA's context and libraries
            others = total - free - torch.cuda.memory_reserved(self.adapter.device)
            peak = torch.cuda.max_memory_allocated(self.adapter.device) + others
        return Report(started_s, time.time(), switched_s - started_s, peak)


def _made_up(shape: Shape, steps: int) -> GenerateRequest:
    return GenerateRequest(
        "a small red circle",
        shape.height,
        shape.width,
        num_inference_steps=steps,
        num_frames=shape.frames,
        seed=0,
    )
