"""Wan 2.1 and 2.2 text-to-video, after `WanPipeline`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

from tetriserve.engine.adapter import ModelAdapter, ModelLimits, RequestState, picture
from tetriserve.engine.company import Call, Predicting
from tetriserve.errors import ConfigError
from tetriserve.model_info import ModelInfo
from tetriserve.models.wan_vae import frames
from tetriserve.request import GenerateRequest


class WanAdapter(ModelAdapter):
    """Text to a clip, or to a picture, which is one frame.

    Wan 2.2 A14B has two transformers: the second takes over below a noise level, with a guidance scale of its own.
    Wan 2.2 TI2V-5B takes a time for each token.
    """

    pipeline_class = WanPipeline
    family = "wan"
    batched = ("hidden_states", "timestep", "encoder_hidden_states")
    dtypes = ("float32", "bfloat16")
    in_float32 = ("vae",)  # as its authors say: in bfloat16 it flickers

    def _info(self, limits: ModelLimits) -> ModelInfo:
        pipeline, config = self.pipeline, self.pipeline.transformer.config
        if pipeline.config.boundary_ratio is not None and pipeline.transformer_2 is None:
            raise ConfigError("model.path: it has a boundary_ratio, but no transformer_2 to go on with")
        self._text_tokens = limits.text_tokens(512, 512, "Wan")
        side = pipeline.vae_scale_factor_spatial * config.patch_size[1]
        two, per_token = len(self.transformers()) > 1, pipeline.config.expand_timesteps
        longest = (config.rope_max_seq_len - 1) * pipeline.vae_scale_factor_temporal + 1
        return limits.info(
            family=self.family,
            side=side,
            text_tokens=self._text_tokens,
            heads=config.num_attention_heads,
            cfg_field="guidance_scale",
            max_side=config.rope_max_seq_len * side,
            frame_step=pipeline.vae_scale_factor_temporal,
            max_frames=min(limits.max_frames or (121 if per_token else 81), longest),
            steps=40 if two else 50,
            default_guidance_scale=4.0 if two else 5.0,
            default_guidance_scale_2=3.0 if two else None,
        )

    def transformers(self) -> list[torch.nn.Module]:
        both = self.pipeline.transformer, self.pipeline.transformer_2
        return [transformer for transformer in both if transformer is not None]

    @property
    def latent_channels(self) -> int:
        return int(self.pipeline.vae.config.z_dim)

    def encode(self, request: GenerateRequest) -> dict[str, torch.Tensor]:
        embeds, negative = self.pipeline.encode_prompt(
            request.prompt,
            request.negative_prompt,
            do_classifier_free_guidance=self.info.guided(request),
            max_sequence_length=self._text_tokens,
            device=self.device,
        )
        dtype = self.pipeline.transformer.dtype
        conditioning = {"embeds": embeds.to(dtype)}
        if negative is not None:
            conditioning["negative_embeds"] = negative.to(dtype)
        return conditioning

    def begin(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor]) -> RequestState:
        latents = self.pipeline.prepare_latents(
            1,
            self.pipeline.transformer.config.in_channels,
            request.height,
            request.width,
            request.num_frames,
            torch.float32,
            self.device,
            self.generator(request),
        )
        sampler = self.new_sampler()
        sampler.set_timesteps(request.num_inference_steps, device=self.device)
        sampler.set_begin_index(0)
        return RequestState(request, conditioning, latents, sampler)

    def predicting(self, state: RequestState, timestep: torch.Tensor) -> Predicting:
        transformer, scale = self._at(state, timestep)
        time = timestep.expand(1)
        if self.pipeline.config.expand_timesteps:
            time = time.float().expand(1, self.info.tokens(state.request.shape))
        made = []
        for text in state.conditioning.values():
            arguments = {
                "hidden_states": state.latents.to(transformer.dtype),
                "timestep": time,
                "encoder_hidden_states": text,
            }
            made.append((yield Call(transformer, arguments)))
        if len(made) == 1:
            return made[0]
        noise, without = made
        return without + scale * (noise - without)

    def _at(self, state: RequestState, timestep: torch.Tensor) -> tuple[Any, float]:
        """The transformer that predicts at a timestep, and its guidance scale."""
        pipeline, request = self.pipeline, state.request
        boundary = pipeline.config.boundary_ratio
        assert request.guidance_scale is not None
        if boundary is None or timestep >= boundary * state.sampler.config.num_train_timesteps:
            return pipeline.transformer, request.guidance_scale
        assert request.guidance_scale_2 is not None
        return pipeline.transformer_2, request.guidance_scale_2

    def spatial(self, request: GenerateRequest, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :, 0]

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        return frames(self.pipeline.vae, latents.unsqueeze(2))[:, :, 0]

    def decode(self, request: GenerateRequest, latents: torch.Tensor) -> np.ndarray:
        clip = picture(frames(self.pipeline.vae, latents))
        return clip if request.num_frames > 1 else clip[0]
