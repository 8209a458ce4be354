"""What the outside may know of a loaded model, and what it can serve. No torch, no Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tetriserve.errors import InvalidRequest
from tetriserve.images import MAX_REFERENCE_ASPECT, MIN_REFERENCE_SIDE, NO_EDITING, Editing, InputImage
from tetriserve.request import GenerateRequest, Shape
from tetriserve.reuse import check_quality, computed_steps


@dataclass(frozen=True)
class ModelInfo:
    """What the outside may know of a loaded model: its name, limits and which degrees it can run.

    Attributes:
        size_multiple: height and width must be divisible by this many pixels.
        token_pixels: pixels along one side that make one sequence token.
        text_tokens: length of the text sequence, sharded beside the image tokens.
        heads: attention heads; a degree that does not divide them runs ring attention.
        cfg_field: the request field that switches classifier-free guidance on when above `cfg_above` (None: never)
            ("true_cfg_scale" beside a negative prompt, or "guidance_scale").
        frame_step: frames that make one more frame of latents; the first frame is one by itself.
        max_frames: 1 for models that make pictures only.
        default_guidance_scale_2: None for models with one guidance scale.
        loras: names that a request may choose from.
        degraded: what its pictures lack against the model as published, such as "int8" weights.
        editing: how it takes pictures.
        batches: which requests may share a step: "mixed", of any shapes, "same shape", or "" for none.
    """

    name: str
    family: str
    size_multiple: int
    token_pixels: int
    text_tokens: int
    heads: int
    cfg_field: str
    min_pixels: int
    max_pixels: int
    max_side: int
    default_steps: int
    max_steps: int
    default_guidance_scale: float
    max_prompt_chars: int
    description: str = ""
    """One line for people: where the weights come from."""
    cfg_above: float | None = 1.0
    default_true_cfg_scale: float = 1.0
    default_guidance_scale_2: float | None = None
    frame_step: int = 1
    max_frames: int = 1
    loras: tuple[str, ...] = ()
    degraded: tuple[str, ...] = ()
    editing: Editing = NO_EDITING
    batches: str = ""

    def company(self, request: GenerateRequest) -> str:
        """Requests with the same may share a step; "": it shares with none. One forward wears one LoRA."""
        if not self.batches or (request.images and self.batches != "mixed"):
            return ""
        worn = "" if request.lora is None else f" {request.lora} {request.lora_scale:g}"
        shape = "" if self.batches == "mixed" else f" {request.shape}"
        return f"{self.name}{worn}{shape}"

    def tokens(self, shape: Shape) -> int:
        """Tokens of a picture or clip, the length that sequence parallelism shards."""
        frames = (shape.frames - 1) // self.frame_step + 1
        return (shape.height // self.token_pixels) * (shape.width // self.token_pixels) * frames

    def why_not_shape(self, shape: Shape) -> str | None:
        """The reason why a shape cannot be served, or None."""
        for name, side in (("height", shape.height), ("width", shape.width)):
            if side <= 0 or side % self.size_multiple:
                multiple = self.size_multiple
                near = max(multiple, (side + multiple // 2) // multiple * multiple)
                return f"{name} {side} is not a positive multiple of {self.size_multiple} (nearest: {near})"
            if side > self.max_side:
                return f"{name} {side} is above {self.max_side}, the longest side of {self.name}"
        pixels = shape.height * shape.width
        if not self.min_pixels <= pixels <= self.max_pixels:
            return (
                f"{shape.width}x{shape.height} has {pixels} pixels, allowed are "
                f"{self.min_pixels} to {self.max_pixels}"
            )
        return self.why_not_frames(shape.frames)

    def why_not_frames(self, frames: int) -> str | None:
        """The reason why a number of frames cannot be served, or None."""
        if self.max_frames == 1:
            return None if frames == 1 else f"{frames} frames, {self.name} makes pictures: 1 is allowed"
        step = self.frame_step
        if 1 <= frames <= self.max_frames and (frames - 1) % step == 0:
            return None
        last = (self.max_frames - 1) // step * step + 1
        near = min(max(1, (frames - 1 + step // 2) // step * step + 1), last)
        return f"{frames} frames, allowed are 1 + a multiple of {step}, up to {last} (nearest: {near})"

    def why_not_degree(self, shape: Shape, degree: int) -> str | None:
        """The reason why a shape cannot run at a sequence-parallel degree, or None."""
        if degree < 1:
            return f"degree {degree} is not positive"
        shortest = min(self.tokens(shape), self.text_tokens)
        if degree > shortest:
            return f"degree {degree} is above the {shortest} tokens of the shortest sequence"
        return None

    def guided(self, request: GenerateRequest) -> bool:
        """Whether classifier-free guidance runs: two forward passes per step instead of one."""
        if self.cfg_above is None:
            return False
        if self.cfg_field == "true_cfg_scale":
            scale = request.true_cfg_scale
            scale = self.default_true_cfg_scale if scale is None else scale
            return request.negative_prompt is not None and scale > self.cfg_above
        scale = request.guidance_scale
        return (self.default_guidance_scale if scale is None else scale) > self.cfg_above

    def step_cost(self, request: GenerateRequest) -> float:
        """Of a step, in steps of the profile, which is measured without a wish: evaluations of the model."""
        return (1 + self.guided(request)) / (1 + self.guided(GenerateRequest("profile")))

    def steps_of(self, request: GenerateRequest) -> int:
        """Denoising steps that run: with a picture to start from, the last ones of those asked for."""
        steps = request.num_inference_steps or self.default_steps
        if not request.images or self.editing.default_strength is None:
            return steps
        strength = self.editing.default_strength if request.strength is None else request.strength
        # as diffusers rounds it
        return steps - int(max(steps - min(steps * strength, steps), 0))

    def computed_steps(self, request: GenerateRequest) -> tuple[int, ...]:
        """Those of them that are computed, the others are extrapolated."""
        return computed_steps(self.steps_of(request), request.reuse_every)

    def shapes_in(self, request: GenerateRequest) -> list[Shape]:
        """The request's pictures as the VAE gets them."""
        editing = self.editing
        if editing.default_strength is not None:
            return [request.shape] * len(request.images)
        return [
            Shape(
                *image.seen(editing.reference_pixels, enlarge=editing.enlarges, multiple=self.size_multiple)
            )
            for image in request.images
        ]

    def step_shape(self, request: GenerateRequest) -> Shape:
        """A shape whose steps take as long: one that has the tokens of references as further rows."""
        if not request.images or self.editing.default_strength is not None:
            return request.shape
        tokens = sum(map(self.tokens, self.shapes_in(request)))
        rows = -(-tokens // (request.width // self.token_pixels))
        return Shape(request.height + rows * self.token_pixels, request.width)

    def shape_like(self, image: InputImage) -> Shape:
        """The allowed shape nearest to a picture's size and aspect; no larger than it would be as a reference."""
        multiple, most = self.size_multiple, self.max_pixels
        if self.editing.default_strength is None:
            most = min(most, self.editing.reference_pixels)
        longest = self.max_side // multiple * multiple
        area = min(max(image.height * image.width, self.min_pixels), most)
        scale = math.sqrt(area / (image.height * image.width))
        sides = [
            min(max(round(side * scale / multiple), 1) * multiple, longest)
            for side in (image.height, image.width)
        ]
        while sides[0] * sides[1] > most:
            sides[sides.index(max(sides))] -= multiple
        while sides[0] * sides[1] < self.min_pixels:
            sides[sides.index(min(sides))] += multiple
        return Shape(*sides)

    def check(self, request: GenerateRequest) -> None:
        """Raise `InvalidRequest` naming the first field this model cannot serve."""
        if not request.prompt.strip():
            raise InvalidRequest("prompt", "must not be empty")
        for name in ("prompt", "negative_prompt"):
            length = len(getattr(request, name) or "")
            if length > self.max_prompt_chars:
                raise InvalidRequest(name, f"{length} characters, at most {self.max_prompt_chars}")
        reason = self.why_not_frames(request.num_frames)
        if reason:
            raise InvalidRequest("num_frames", reason)
        reason = self.why_not_shape(request.shape)
        if reason:
            raise InvalidRequest("size", reason)
        steps = request.num_inference_steps
        if steps is not None and not 1 <= steps <= self.max_steps:
            raise InvalidRequest("num_inference_steps", f"{steps}, allowed are 1 to {self.max_steps}")
        for name in ("guidance_scale", "guidance_scale_2", "true_cfg_scale"):
            value = getattr(request, name)
            if value is not None and not 0 <= value <= 20:
                raise InvalidRequest(name, f"{value}, allowed are 0 to 20")
        if request.guidance_scale_2 is not None and self.default_guidance_scale_2 is None:
            raise InvalidRequest(
                "guidance_scale_2", f"{self.name} has one transformer, and takes guidance_scale"
            )
        if request.lora is not None and request.lora not in self.loras:
            allowed = f"allowed are {', '.join(self.loras)}" if self.loras else "none is configured"
            raise InvalidRequest("lora", f"{request.lora!r} is not served, {allowed}")
        if not -10 <= request.lora_scale <= 10:
            raise InvalidRequest("lora_scale", f"{request.lora_scale}, allowed are -10 to 10")
        if request.seed is not None and not 0 <= request.seed < 2**63:
            raise InvalidRequest("seed", f"{request.seed}, allowed are 0 to 2**63 - 1")
        if request.slo_s is not None and not 0 < request.slo_s < float("inf"):
            raise InvalidRequest("slo_s", f"{request.slo_s}, must be a positive number of seconds")
        if request.previews < 0:
            raise InvalidRequest("previews", f"{request.previews}, must not be negative")
        check_quality(request.quality)
        self._check_images(request)

    def _check_images(self, request: GenerateRequest) -> None:
        editing, count, strength = self.editing, len(request.images), request.strength
        if count > editing.max_images:
            allowed = (
                f"at most {editing.max_images}" if editing.max_images else "none: it draws from text alone"
            )
            raise InvalidRequest("image", f"{count} pictures, {self.name} takes {allowed}")
        if editing.needs_image and not count:
            raise InvalidRequest("image", f"required: {self.name} edits pictures")
        if strength is not None:
            if editing.default_strength is None:
                raise InvalidRequest("strength", f"{self.name} has none, it does not start from a picture")
            if not count:
                raise InvalidRequest("strength", "needs an image to start from")
            if not 0 < strength <= 1:
                raise InvalidRequest("strength", f"{strength}, allowed are numbers above 0 and up to 1")
        for image in request.images if editing.default_strength is None else ():
            short, long = sorted((image.height, image.width))
            if short < MIN_REFERENCE_SIDE or long > MAX_REFERENCE_ASPECT * short:
                raise InvalidRequest(
                    "image",
                    f"{image.width}x{image.height}, allowed are sides of {MIN_REFERENCE_SIDE} and more, one at most "
                    f"{MAX_REFERENCE_ASPECT} times the other",
                )
