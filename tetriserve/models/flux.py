"""FLUX.1 (dev: distilled guidance; schnell: none), after `FluxPipeline`."""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers import FluxPipeline

from tetriserve.engine.adapter import ModelAdapter, ModelLimits, RequestState
from tetriserve.models.flow import set_timesteps, shift
from tetriserve.request import GenerateRequest, ModelInfo


class FluxAdapter(ModelAdapter):
    pipeline_class = FluxPipeline
    family = "flux"
    dtypes = ("float32", "bfloat16")  # activations of its late blocks leave float16's range: black pictures

    def _info(self, limits: ModelLimits) -> ModelInfo:
        config = self.pipeline.transformer.config
        self._distilled = bool(config.guidance_embeds)
        longest = 512 if self._distilled else 256  # schnell was trained on 256 text tokens
        self._text_tokens = limits.text_tokens(longest, 512, "FLUX")
        self._image_ids = lru_cache(maxsize=32)(self._make_image_ids)
        side = self.pipeline.vae_scale_factor * 2
        return limits.info(
            family=self.family,
            side=side,
            text_tokens=self._text_tokens,
            heads=config.num_attention_heads,
            cfg_field="true_cfg_scale",
            steps=28 if self._distilled else 4,
            default_guidance_scale=3.5 if self._distilled else 0.0,
        )

    def encode(self, request: GenerateRequest) -> dict[str, torch.Tensor]:
        prompts = {"": request.prompt}
        if self.info.guided(request):
            prompts["negative_"] = request.negative_prompt or ""
        conditioning = {}
        for prefix, prompt in prompts.items():
            embeds, pooled, _ = self.pipeline.encode_prompt(
                prompt=prompt, prompt_2=None, device=self.device, max_sequence_length=self._text_tokens
            )
            conditioning[f"{prefix}embeds"] = embeds
            conditioning[f"{prefix}pooled"] = pooled
        return conditioning

    def begin(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor]) -> RequestState:
        pipeline, steps = self.pipeline, request.num_inference_steps
        assert steps is not None
        latents, _ = pipeline.prepare_latents(
            1,
            pipeline.transformer.config.in_channels // 4,
            request.height,
            request.width,
            conditioning["embeds"].dtype,
            self.device,
            self.generator(request),
        )
        sampler = self.new_sampler()
        set_timesteps(sampler, steps, shift(sampler.config, latents.shape[1]), self.device)
        return RequestState(request, conditioning, latents, sampler)

    def predict_noise(self, state: RequestState, timestep: torch.Tensor) -> torch.Tensor:
        noise = self._forward(state, timestep, "")
        if self.info.guided(state.request):
            assert state.request.true_cfg_scale is not None
            negative = self._forward(state, timestep, "negative_")
            noise = negative + state.request.true_cfg_scale * (noise - negative)
        return noise

    def spatial(self, request: GenerateRequest, latents: torch.Tensor) -> torch.Tensor:
        pipeline = self.pipeline
        return pipeline._unpack_latents(latents, request.height, request.width, pipeline.vae_scale_factor)

    def _forward(self, state: RequestState, timestep: torch.Tensor, prefix: str) -> torch.Tensor:
        request, latents, embeds = state.request, state.latents, state.conditioning[f"{prefix}embeds"]
        guidance = None
        assert request.guidance_scale is not None
        if self._distilled:
            guidance = torch.full([1], request.guidance_scale, device=self.device, dtype=torch.float32)
        return self.pipeline.transformer(
            hidden_states=latents,
            timestep=timestep.expand(1).to(latents.dtype) / 1000,
            guidance=guidance,
            pooled_projections=state.conditioning[f"{prefix}pooled"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=self.device, dtype=latents.dtype),
            img_ids=self._image_ids(request.height, request.width, latents.dtype),
            return_dict=False,
        )[0]

    def _make_image_ids(self, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        token = self.info.token_pixels
        return self.pipeline._prepare_latent_image_ids(1, height // token, width // token, self.device, dtype)
