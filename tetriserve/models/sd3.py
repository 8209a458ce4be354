"""Stable Diffusion 3 and 3.5, after `StableDiffusion3Pipeline` and `StableDiffusion3Img2ImgPipeline`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

from tetriserve.engine.adapter import ModelAdapter, ModelLimits, RequestState
from tetriserve.engine.company import Call, Flat, Members, Predicting
from tetriserve.engine.sequence import ShardPlan
from tetriserve.images import Editing
from tetriserve.model_info import ModelInfo
from tetriserve.models.flow import image_to_image, shift
from tetriserve.request import GenerateRequest

CUT_OUTPUT = ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)


PATCH = 2


def _column(latents: torch.Tensor) -> torch.Tensor:
    """[1, channels, height, width] as a column of its patches, [1, channels, patches * PATCH, PATCH]."""
    return latents.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(2, 3).flatten(2, 3)


def _picture(column: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """The way back, to the sides of `latents`."""
    height, width = latents.shape[-2:]
    patches = column.reshape(*column.shape[:2], height // PATCH, width // PATCH, PATCH, PATCH)
    return patches.transpose(3, 4).reshape(*column.shape[:2], height, width)


def _positions(cropped: Any, members: Members, *column: int) -> torch.Tensor:
    """Of every picture's patches where they are in it."""
    return torch.cat([cropped(*sides) for sides in members.sides], 1)


class SD3Adapter(ModelAdapter):
    pipeline_class = StableDiffusion3Pipeline
    family = "sd3"
    batched = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")
    flat = Flat(
        tokens={"hidden_states": 2, "encoder_hidden_states": 1},
        rows=("timestep", "pooled_projections"),
        modulated=(
            ("transformer_blocks.*.norm1.linear", ("hidden_states",)),
            ("transformer_blocks.*.norm1_context.linear", ("encoder_hidden_states",)),
            ("norm_out.linear", ("hidden_states",)),
        ),
        joint=("hidden_states", "encoder_hidden_states"),
        instead={"pos_embed.cropped_pos_embed": _positions},
        enter=_column,
        leave=_picture,
        token_rows=PATCH,
    )

    def _info(self, limits: ModelLimits) -> ModelInfo:
        pipeline, config = self.pipeline, self.pipeline.transformer.config
        self._t5_tokens = limits.text_tokens(256, 512, "SD3")
        side = pipeline.vae_scale_factor * config.patch_size
        return limits.info(
            family=self.family,
            side=side,
            text_tokens=pipeline.tokenizer_max_length + self._t5_tokens,
            heads=config.num_attention_heads,
            cfg_field="guidance_scale",
            max_side=config.pos_embed_max_size * side,
            steps=28,
            default_guidance_scale=7.0,
            editing=Editing(max_images=1, default_strength=0.6),
        )

    def shard_plan(self, transformer: Any) -> ShardPlan:
        """diffusers ships none: tokens exist between the patch embedding and the last projection."""
        return {
            "pos_embed": {0: CUT_OUTPUT},
            "context_embedder": {0: CUT_OUTPUT},
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        }

    def encode(self, request: GenerateRequest) -> dict[str, torch.Tensor]:
        guided = self.info.guided(request)
        embeds, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt=request.prompt,
            prompt_2=None,
            prompt_3=None,
            negative_prompt=request.negative_prompt,
            do_classifier_free_guidance=guided,
            device=self.device,
            max_sequence_length=self._t5_tokens,
        )
        if guided:
            embeds = torch.cat([negative, embeds])
            pooled = torch.cat([negative_pooled, pooled])
        return {"embeds": embeds, "pooled": pooled}

    def begin(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor]) -> RequestState:
        pipeline = self.pipeline
        latents = pipeline.prepare_latents(
            1,
            pipeline.transformer.config.in_channels,
            request.height,
            request.width,
            conditioning["embeds"].dtype,
            self.device,
            self.generator(request),
        )
        return RequestState(request, conditioning, latents, self._sampler(request))

    def begin_from(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor]) -> RequestState:
        """Noise over the picture, and the last steps only."""
        sampler = self._sampler(request)
        pipeline, pixels = image_to_image(self, StableDiffusion3Img2ImgPipeline, request, sampler)
        latents = pipeline.prepare_latents(
            pixels,
            sampler.timesteps[:1],
            1,
            1,
            conditioning["embeds"].dtype,
            self.device,
            self.generator(request),
        )
        return RequestState(request, conditioning, latents, sampler)

    def _sampler(self, request: GenerateRequest) -> Any:
        sampler = self.new_sampler()
        config = sampler.config
        shift_by: dict[str, Any] = {}
        if config.get("use_dynamic_shifting"):
            shift_by["mu"] = shift(config, self.info.tokens(request.shape), max_shift=1.16)
        retrieve_timesteps(sampler, request.num_inference_steps, self.device, **shift_by)
        return sampler

    def predicting(self, state: RequestState, timestep: torch.Tensor) -> Predicting:
        guided = self.info.guided(state.request)
        latents = torch.cat([state.latents] * 2) if guided else state.latents
        arguments = {
            "hidden_states": latents,
            "timestep": timestep.expand(latents.shape[0]),
            "encoder_hidden_states": state.conditioning["embeds"],
            "pooled_projections": state.conditioning["pooled"],
        }
        noise = yield Call(self.pipeline.transformer, arguments)
        if guided:
            assert state.request.guidance_scale is not None
            negative, positive = noise.chunk(2)
            noise = negative + state.request.guidance_scale * (positive - negative)
        return noise
