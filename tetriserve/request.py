"""What goes in and what comes out: requests, shapes, results. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tetriserve.images import InputImage

if TYPE_CHECKING:
    import numpy as np

    from solver.problem import Phase


MET_SLACK_S = 1e-6
"""Sums of step times are off by rounding; so little behind its deadline a request counts as on time."""


class Shape(NamedTuple):
    """Output size in pixels; `frames` is 1 for a picture. Written "HxW" or "HxWxF" in profiles."""

    height: int
    width: int
    frames: int = 1

    def __str__(self) -> str:
        text = f"{self.height}x{self.width}"
        return text if self.frames == 1 else f"{text}x{self.frames}"

    @property
    def pixels(self) -> int:
        return self.height * self.width * self.frames

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read "HxW" or "HxWxF". Raises ValueError with the expected form."""
        try:
            numbers = [int(part) for part in str(text).lower().split("x")]
        except ValueError:
            numbers = []
        if len(numbers) not in (2, 3) or min(numbers, default=0) <= 0:
            raise ValueError(f"shape must look like 512x512 or 480x832x81, got {text!r}")
        return cls(*numbers)


@dataclass(frozen=True)
class GenerateRequest:
    """One picture or clip to make. `None` means the model's own default.

    Attributes:
        slo_s: seconds from arrival within which the caller wants the result; None for the server's default.
        seed: 0 <= seed < 2**63; drawn at random when None and reported back.
        drop_late: end with `DeadlineInfeasible` instead of finishing late; None for the server's default.
        reject_infeasible: the same at once if the first plan cannot have it on time.
        priority: tie-break between requests with equal deadlines, larger first.
        previews: how many rough pictures to make on the way, at most; only `stream` shows them. They cost no step and
            change nothing of the picture.
        num_frames: more than one only for models that make videos.
        guidance_scale_2: of models whose second transformer takes over at low noise (Wan 2.2); the default is
            `guidance_scale` where that is given.
        lora: name of a configured LoRA, with `lora_scale` times its weights; None for the model without any.
        images: to be edited, PIL images or arrays uint8 [height, width, 3]; kept as `InputImage`.
        strength: how much of the picture is made anew, above 0 and up to 1, by models that start from it.
        quality: how much may be saved: "lossless", "high" (some steps are extrapolated) or "fast" (most of them), as
            far as the server is set up for it; None for the server's default.
        reuse_every: after the first ones only every so-manieth step is computed; filled in by the server.
        request_id: made by the server when None; must be unique among open requests.
        repeatable: the caller may send it again under the same `request_id`, and gets the same result while it is
            open and for some minutes after.
        client: whose it is, for limits and fairness; filled in by the HTTP edge (never an API key itself), None is a
            client too.
        arrived_s: Unix time at which it reached the HTTP edge or the handle, from which `slo_s` counts; filled in
            there unless the caller of the handle has an edge of its own.
        way_back_s: what the result will take from the GPUs to whoever asked; filled in with it, and taken off the
            time that the plans have.
        attempt: how many cells were lost under it; filled in by the server.
    """

    prompt: str
    height: int = 1024
    width: int = 1024
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    slo_s: float | None = None
    drop_late: bool | None = None
    reject_infeasible: bool | None = None
    priority: int = 0
    model: str | None = None
    request_id: str | None = None
    user: str | None = None
    repeatable: bool = False
    previews: int = 0
    num_frames: int = 1
    guidance_scale_2: float | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    images: Sequence[Any] = ()
    strength: float | None = None
    quality: str | None = None
    reuse_every: int = 1
    client: str | None = field(default=None, repr=False)
    arrived_s: float | None = None
    way_back_s: float = 0.0
    attempt: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(map(InputImage.of, self.images)))

    @property
    def shape(self) -> Shape:
        return Shape(self.height, self.width, self.num_frames)

    def with_pixels(self, pixels: Iterable[Any]) -> GenerateRequest:
        """With something else for the pixels of its pictures."""
        pairs = zip(self.images, pixels, strict=True)
        return replace(self, images=tuple(replace(image, pixels=one) for image, one in pairs))

    def without_pixels(self) -> GenerateRequest:
        return self.with_pixels([None] * len(self.images))


class StepRange(NamedTuple):
    """`steps` denoising steps that a request went through on `gpus` at degree `len(gpus)`."""

    steps: int
    degree: int
    gpus: tuple[int, ...]


class Execution(NamedTuple):
    """One committed range as it ran; Unix seconds by the replica's clock.

    `others` is how many other requests were open when it was planned, `shared_with` how many of them ran in the same
    steps.
    """

    kind: str
    steps: int
    gpus: tuple[int, ...]
    start_s: float
    end_s: float
    others: int = 0
    shared_with: int = 0


class LostRange(NamedTuple):
    """A range that was sent out and did not count: a GPU of it or of the one before it was lost or short of memory.

    `noticed_s` is when the scheduler gave it up, in Unix seconds.
    """

    kind: str
    steps: int
    gpus: tuple[int, ...]
    noticed_s: float


@dataclass(frozen=True)
class PlannedWith:
    """What the plans of a request reckon with: seconds of encode, of its text and of its pictures, of decode, and of
    a denoising step at each degree that it may run at."""

    encode_s: float
    step_s: Mapping[int, float]
    decode_s: float
    encode_image_s: float = 0.0

    @classmethod
    def of(cls, phases: Iterable[Phase]) -> PlannedWith:
        """Of a chain in which encode and decode may be missing."""
        step_s = {phase.kind: phase.step_s for phase in phases}
        none = {1: 0.0}
        encode, decode, image = (step_s.get(kind, none)[1] for kind in ("encode", "decode", "encode_image"))
        return cls(encode, dict(step_s["denoise"]), decode, image)


@dataclass(frozen=True)
class Metrics:
    """What happened to one request. Durations in seconds; `denoise_s` is time on GPUs, pauses excluded.

    Attributes:
        queue_s: time from arrival to the first execution, plus pauses between phases and step ranges.
        encode_s: of the text and of pictures.
        inference_s: from the start of its first execution to the end of its last one.
        steps: neighbouring ranges on the same GPUs in one; those that were computed, `reused_steps` come on top.
        schedule: every range by itself, encode and decode too.
        lost: ranges that had to be run again; those of a lost cell are not known to the next one.
        arrival_s: Unix seconds by the scheduler's clock.
        predicted_s: time from arrival to the end as the first plan had it; None when it could not say.
        total_s: time from arrival to the picture, in the cell ...
        response_s: ... and to the answer, as far as the edge can see: hops and the making of a file are in it.
        slo_met: by `response_s`; in the cell by `total_s` and what the way back was expected to take.
        degraded: what was not computed as by the model as published, such as "int8" weights.
        ignored: what the request asked for that changed nothing.
        truncated: fields, of `prompt` and `negative_prompt`, whose ends no text encoder saw.
    """

    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    total_s: float
    inference_s: float
    slo_s: float | None
    slo_met: bool | None
    steps: tuple[StepRange, ...]
    schedule: tuple[Execution, ...]
    seed: int
    arrival_s: float
    planned_with: PlannedWith
    peak_memory_bytes: int = 0
    lost: tuple[LostRange, ...] = ()
    predicted_s: float | None = None
    degraded: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()
    reused_steps: int = 0
    response_s: float | None = None

    def answered(self, response_s: float) -> Metrics:
        """As the edge sends them, so long after the arrival."""
        slo_met = None if self.slo_s is None else response_s <= self.slo_s
        return replace(self, response_s=response_s, slo_met=slo_met)


@dataclass(frozen=True)
class Progress:
    """How far an open request is: `steps_done` of `steps` denoising steps that are computed, `phase` is the last one
    that ran.

    Two are equal when the request is equally far.

    Attributes:
        ahead: while nothing of it has run, how many open requests are to be finished before it, as planned now.
        predicted_finish_s: seconds from now until the result, as planned now; None when nobody can say.
        preview: uint8 [height / 8, width / 8, 3], the newest one, where the request asks for previews and this stream
            has not yielded it before.
    """

    request_id: str
    phase: str
    steps_done: int
    steps: int
    predicted_finish_s: float | None = field(default=None, compare=False)
    preview: np.ndarray | None = field(default=None, compare=False, repr=False)
    ahead: int = 0


@dataclass(frozen=True)
class CellStatus:
    """The state of one cell.

    Attributes:
        reason: why it is not ready; empty when it is.
        cordoned: GPUs left out for good, whose replicas were lost too often.
        started_in_s: what its start took, from its scheduler's first moment on.
        refused: what of the deployment's last `user_config` was not taken, and why.
        running: step ranges committed and not yet reported.
        held: requests with tensors on the GPUs, summed over the GPUs, as the idle ones said at the last health check.
        plan_ms_p50, plan_ms_p99: of the last decisions, dispatch excluded.
        fallbacks: decisions that the fallback took over, since the start.
    """

    ready: bool
    reason: str
    gpus: int
    gpus_ready: int
    open_requests: int
    running: int
    policy: str
    plan_ms_p50: float = 0.0
    plan_ms_p99: float = 0.0
    fallbacks: int = 0
    cordoned: tuple[int, ...] = ()
    held: int = 0
    refused: str = ""
    started_in_s: float = 0.0


@dataclass(frozen=True)
class GenerateResult:
    """A finished picture, `image` uint8 [height, width, 3], or clip, uint8 [frames, height, width, 3]."""

    request_id: str
    image: np.ndarray
    created_s: float
    model: str
    metrics: Metrics
