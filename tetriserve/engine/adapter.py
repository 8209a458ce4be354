"""What a model family has to say: encode, begin, step, decode, and which shapes and degrees it allows."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from tetriserve.engine.attention import Kinds
from tetriserve.engine.company import Call, Flat, Predicting, Streams
from tetriserve.engine.groups import SPGroup
from tetriserve.engine.kernels import Kernel
from tetriserve.engine.sequence import SequenceParallel, ShardPlan
from tetriserve.engine.words import Watch
from tetriserve.errors import ConfigError
from tetriserve.model_info import ModelInfo
from tetriserve.request import GenerateRequest


@dataclass(frozen=True)
class ModelLimits:
    """What the server's owner allows; None is the family's own default."""

    name: str
    max_sequence_length: int | None = None
    default_steps: int | None = None
    max_steps: int = 200
    max_pixels: int = 2048 * 2048
    max_frames: int | None = None
    max_prompt_chars: int = 4096
    description: str = ""
    loras: tuple[str, ...] = ()
    degraded: tuple[str, ...] = ()

    def text_tokens(self, default: int, longest: int, model: str) -> int:
        """Tokens of a prompt: what the owner wants, else `default`. Raises `ConfigError` above `longest`."""
        wanted = self.max_sequence_length or default
        if wanted > longest:
            raise ConfigError(f"model.max_sequence_length: {wanted}, {model} allows at most {longest}")
        return wanted

    def info(self, *, family: str, side: int, steps: int, **of_family: Any) -> ModelInfo:
        """What the outside may know of a model of that family.

        Args:
            side: pixels along one side of a token; sizes are multiples of it.
            steps: by default.
            of_family: the other fields of `ModelInfo`.
        """
        limits = {
            "max_side": self.max_pixels // (8 * side),
            "default_steps": self.default_steps or steps,
            "max_frames": 1,
        }
        return ModelInfo(
            name=self.name,
            family=family,
            size_multiple=side,
            token_pixels=side,
            min_pixels=(8 * side) ** 2,
            max_pixels=self.max_pixels,
            max_steps=self.max_steps,
            max_prompt_chars=self.max_prompt_chars,
            description=self.description,
            loras=self.loras,
            degraded=self.degraded,
            **{**limits, **of_family},
        )


@dataclass
class RequestState:
    """A request on a GPU between two steps.

    Attributes:
        conditioning: what the encoders made of the prompt, tensors or plain values; constant.
        latents: as the pipeline's step loop holds them, batch 1.
        sampler: this request's own diffusers scheduler (they are not thread-safe and hold step state).
        step: denoising steps done.
        velocities: with reuse, (step, what was predicted) of the last two steps that were computed.
    """

    request: GenerateRequest
    conditioning: dict[str, Any]
    latents: torch.Tensor
    sampler: Any
    step: int = 0
    velocities: tuple[tuple[int, torch.Tensor], ...] = ()


def beside(tokens: torch.Tensor, conditioning: dict[str, Any], name: str, dim: int = 1) -> torch.Tensor:
    """Tokens of a picture, and behind them those of its references under `name`, where there are any."""
    references = conditioning.get(name)
    return tokens if references is None else torch.cat([tokens, references], dim)


def pictures_of(request: GenerateRequest) -> list[Image.Image]:
    """What pipelines take."""
    return [Image.fromarray(image.pixels) for image in request.images]


def picture(pixels: torch.Tensor) -> np.ndarray:
    """[1, 3, height, width], about -1 to 1, to uint8 [height, width, 3]; frames, if any, come before height.

    What diffusers' image processor makes of it, to the bit, but made where the pixels are: a quarter of the bytes
    come to the host, and nothing is left to be computed there while the device waits.
    """
    return eight_bit((pixels[0] * 0.5 + 0.5).clamp(0, 1))


def eight_bit(colors: torch.Tensor) -> np.ndarray:
    """[3, ...], 0 to 1, to uint8 [..., 3] on the host."""
    levels = colors.float() * 255
    return levels.round().to(torch.uint8).movedim(0, -1).contiguous().cpu().numpy()


class ModelAdapter(ABC):
    """A diffusers pipeline taken apart into phases; subclasses know one family.

    Encoding, timesteps, latent packing and decoding are the pipeline's own code, so pictures are those of
    the plain pipeline.
    """

    pipeline_class: ClassVar[Any]
    family: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    attention_kinds: ClassVar[Kinds] = ()
    in_float32: ClassVar[tuple[str, ...]] = ()
    """Parts of the pipeline that are so in every dtype."""
    batched: Streams = ()
    """Arguments of the transformer with a row a picture, if pictures of one shape may share the batch axis."""
    flat: Flat | None = None
    """How pictures of several shapes become one sequence, where they can."""

    def __init__(self, pipeline: Any, limits: ModelLimits, kernel: Kernel) -> None:
        self.pipeline = pipeline
        self._worn: tuple[str, float] | None = None
        self.words = Watch(pipeline.components.values())
        self.device = pipeline.transformer.device
        if getattr(pipeline.scheduler.config, "stochastic_sampling", False):
            raise ConfigError("model: stochastic_sampling is not supported, seeds could not be honoured")
        info = self._info(limits)
        self.info = replace(info, batches="mixed" if self.flat else "same shape" if self.batched else "")
        self._parallel = [
            SequenceParallel(
                transformer.eval(),
                self.shard_plan(transformer),
                kernel,
                self.attention_kinds,
                self.batched,
                self.flat,
            )
            for transformer in self.transformers()
        ]

    @abstractmethod
    def _info(self, limits: ModelLimits) -> ModelInfo:
        """Limits and defaults of the loaded model."""

    def transformers(self) -> list[torch.nn.Module]:
        """What predicts: one, or several of a kind that take turns."""
        return [self.pipeline.transformer]

    def shard_plan(self, transformer: Any) -> ShardPlan:
        """Where its token axes are cut and put together: diffusers' own plan."""
        plan: ShardPlan = transformer._cp_plan
        return plan

    @property
    def latent_channels(self) -> int:
        """Of what the VAE sees."""
        return int(self.pipeline.vae.config.latent_channels)

    @contextmanager
    def over(self, group: SPGroup | None) -> Iterator[None]:
        """Predict over `group` inside; None is one GPU alone. All members must enter together."""
        with ExitStack() as stack:
            for parallel in self._parallel:
                stack.enter_context(parallel.over(group))
            yield

    def wear(self, request: GenerateRequest) -> None:
        """Compute with the LoRA that a request chooses, and no other, from here on.

        Adapters stay beside the weights, never merged: without one these are the plain model's, to the bit.
        """
        wanted = None if request.lora is None else (request.lora, request.lora_scale)
        if wanted == self._worn:
            return
        if wanted is None:
            self.pipeline.disable_lora()
        else:
            if self._worn is None:
                self.pipeline.enable_lora()
            name, scale = wanted
            self.pipeline.set_adapters([name], [scale])
        self._worn = wanted

    @abstractmethod
    def encode(self, request: GenerateRequest) -> dict[str, torch.Tensor]:
        """Conditioning tensors of a prompt (and negative prompt where guidance uses it)."""

    @abstractmethod
    def begin(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor]) -> RequestState:
        """Initial noise from the request's seed and a sampler with its timesteps, as the pipeline does it."""

    def begin_from(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor]) -> RequestState:
        """The same with the request's pictures, which are pixels here, in the latents or the conditioning.

        Only families whose `ModelInfo.editing` takes pictures are asked.
        """
        raise NotImplementedError(f"{self.family} models take no pictures")

    def predicting(self, state: RequestState, timestep: torch.Tensor) -> Predicting:
        """The transformer's prediction for the whole latents, guidance applied: yields the calls that it takes."""
        yield from ()
        return self.predict_alone(state, timestep)

    def predict_alone(self, state: RequestState, timestep: torch.Tensor) -> torch.Tensor:
        """The same, of a family whose calls are not made together with others; one of the two is the family's."""
        raise NotImplementedError

    def predict(self, states: Sequence[RequestState]) -> list[torch.Tensor]:
        """What is predicted for the next step of each state, on the current group: in as few forwards as their shapes
        allow."""
        runs = [self.predicting(state, state.sampler.timesteps[state.step]) for state in states]
        predicted: dict[int, torch.Tensor] = {}
        made: dict[int, Any] = dict.fromkeys(range(len(runs)))
        while made:
            wanted: dict[int, Call] = {}
            for i, output in made.items():
                try:
                    wanted[i] = runs[i].send(output)
                except StopIteration as end:
                    predicted[i] = end.value
            made = {}
            for parallel, transformer in zip(self._parallel, self.transformers(), strict=True):
                here = [i for i, call in wanted.items() if call.transformer is transformer]
                if here:
                    made.update(zip(here, parallel.make([wanted[i] for i in here]), strict=True))
        return [predicted[i] for i in range(len(states))]

    def spatial(self, request: GenerateRequest, latents: torch.Tensor) -> torch.Tensor:
        """The latents of a picture, or the first ones of a clip, as the VAE sees them: [1, channels, height / 8,
        width / 8]."""
        return latents

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Spatial latents through the VAE: [1, 3, height, width], about -1 to 1."""
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]

    def decode(self, request: GenerateRequest, latents: torch.Tensor) -> np.ndarray:
        """Finished latents to a picture, uint8 [height, width, 3], or clip, [frames, height, width, 3]."""
        return picture(self.pixels(self.spatial(request, latents)))

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        """The request with the model's defaults filled in."""
        info, scale = self.info, request.guidance_scale
        scales: dict[str, Any] = {
            "guidance_scale": info.default_guidance_scale if scale is None else scale,
            "guidance_scale_2": info.default_guidance_scale_2 if scale is None else scale,
            "true_cfg_scale": info.default_true_cfg_scale,
            "strength": info.editing.default_strength,
        }
        return replace(
            request,
            num_inference_steps=request.num_inference_steps or info.default_steps,
            **{name: default for name, default in scales.items() if getattr(request, name) is None},
        )

    def step(self, state: RequestState) -> torch.Tensor:
        """One denoising step in place. Every member of the current group must call it on equal states.

        Returns what was predicted for it: the velocity of the flow at the latents before the step.
        """
        (noise,) = self.step_together([state])
        return noise

    def step_together(self, states: Sequence[RequestState]) -> list[torch.Tensor]:
        """The same for several requests, each at its own step; they wear the same LoRA."""
        predicted = self.predict(states)
        for state, noise in zip(states, predicted, strict=True):
            if state.request.reuse_every > 1:
                state.velocities = (*state.velocities[-1:], (state.step, noise))
            self._advance(state, noise)
        return predicted

    def coast(self, state: RequestState) -> torch.Tensor:
        """A step that is not computed: the velocity goes on as it did between the last two that were."""
        (before, first), (last, second) = state.velocities
        ahead = (state.step - last) / (last - before)
        return self._advance(
            state, (second.float() + ahead * (second.float() - first.float())).to(second.dtype)
        )

    def _advance(self, state: RequestState, noise: torch.Tensor) -> torch.Tensor:
        timestep = state.sampler.timesteps[state.step]
        state.latents = state.sampler.step(noise, timestep, state.latents, return_dict=False)[0]
        state.step += 1
        return noise

    def new_sampler(self) -> Any:
        return copy.deepcopy(self.pipeline.scheduler)

    def generator(self, request: GenerateRequest) -> torch.Generator:
        """Noise is drawn on the CPU, so that a seed means the same picture on every device."""
        assert request.seed is not None
        return torch.Generator("cpu").manual_seed(request.seed)
