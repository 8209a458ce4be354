"""FLUX.2: klein, distilled and base, after `Flux2KleinPipeline`; dev, after `Flux2Pipeline`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from tetriserve.engine.adapter import ModelAdapter, ModelLimits, RequestState, beside, pictures_of
from tetriserve.engine.company import Call, Predicting
from tetriserve.images import Editing
from tetriserve.model_info import ModelInfo
from tetriserve.models.flow import set_timesteps
from tetriserve.request import GenerateRequest

MAX_REFERENCES = 10
"""As many as Black Forest Labs say it can keep apart."""


class Flux2Adapter(ModelAdapter):
    """What all of them share."""

    dtypes = ("float32", "bfloat16")
    batched = ("hidden_states", "timestep", "guidance", "encoder_hidden_states")

    def _info_of(self, limits: ModelLimits, **of_model: Any) -> ModelInfo:
        pipeline, config = self.pipeline, self.pipeline.transformer.config
        self._text_tokens = limits.text_tokens(512, pipeline.tokenizer_max_length, "FLUX.2")
        self._image_ids = lru_cache(maxsize=32)(self._make_image_ids)
        self._text_ids = lru_cache(maxsize=32)(self._make_text_ids)
        return limits.info(
            family=self.family,
            side=2 * pipeline.vae_scale_factor,
            text_tokens=self._text_tokens,
            heads=config.num_attention_heads,
            cfg_field="guidance_scale",
            editing=Editing(max_images=MAX_REFERENCES),
            **of_model,
        )

    def encode(self, request: GenerateRequest) -> dict[str, torch.Tensor]:
        prompts = {"embeds": request.prompt}
        if self.info.guided(request):
            prompts["negative_embeds"] = request.negative_prompt or ""
        return {
            name: self.pipeline.encode_prompt(
                prompt=prompt, device=self.device, max_sequence_length=self._text_tokens
            )[0]
            for name, prompt in prompts.items()
        }

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
        mu = compute_empirical_mu(image_seq_len=latents.shape[1], num_steps=steps)
        set_timesteps(sampler, steps, mu, self.device)
        return RequestState(request, conditioning, latents, sampler)

    def begin_from(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor]) -> RequestState:
        """With references, which are made smaller where they are large, as the pipeline does it."""
        state, pipeline, side = self.begin(request, conditioning), self.pipeline, self.info.token_pixels
        processor, most, prepared = pipeline.image_processor, self.info.editing.reference_pixels, []
        for picture in pictures_of(request):
            if picture.width * picture.height > most:
                picture = processor._resize_to_target_area(picture, most)
            height, width = picture.height // side * side, picture.width // side * side
            prepared.append(processor.preprocess(picture, height=height, width=width, resize_mode="crop"))
        references, ids = pipeline.prepare_image_latents(
            prepared, 1, self.generator(request), self.device, pipeline.vae.dtype
        )
        state.conditioning |= {"references": references, "reference_ids": ids}
        return state

    def predicting(self, state: RequestState, timestep: torch.Tensor) -> Predicting:
        noise = yield from self._forward(state, timestep, "embeds")
        if self.info.guided(state.request):
            assert state.request.guidance_scale is not None
            negative = yield from self._forward(state, timestep, "negative_embeds")
            noise = negative + state.request.guidance_scale * (noise - negative)
        return noise

    def spatial(self, request: GenerateRequest, latents: torch.Tensor) -> torch.Tensor:
        """Out of their packing, and out of the normalisation that the sampler works in."""
        pipeline, vae, token = self.pipeline, self.pipeline.vae, self.info.token_pixels
        height, width = request.height // token, request.width // token
        unpacked = latents.transpose(1, 2).unflatten(2, (height, width))
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
        variance = vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
        deviation = torch.sqrt(variance).to(latents.device, latents.dtype)
        return pipeline._unpatchify_latents(unpacked * deviation + mean)

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]

    def _forward(self, state: RequestState, timestep: torch.Tensor, text: str) -> Predicting:
        request, latents, conditioning = state.request, state.latents, state.conditioning
        token, embeds = self.info.token_pixels, conditioning[text]
        ids = self._image_ids(request.height // token, request.width // token)
        transformer = self.pipeline.transformer
        arguments = {
            "hidden_states": beside(latents, conditioning, "references").to(transformer.dtype),
            "timestep": timestep.expand(1).to(latents.dtype) / 1000,
            "guidance": self._guidance(request),
            "encoder_hidden_states": embeds,
            "txt_ids": self._text_ids(embeds.shape),
            "img_ids": beside(ids, conditioning, "reference_ids"),
        }
        noise = yield Call(transformer, arguments)
        return noise[:, : latents.shape[1]]

    def _guidance(self, request: GenerateRequest) -> torch.Tensor | None:
        """What the transformer is told of it."""
        return None

    def _make_text_ids(self, shape: torch.Size) -> Any:
        return self.pipeline._prepare_text_ids(torch.empty(shape)).to(self.device)

    def _make_image_ids(self, height: int, width: int) -> Any:
        return self.pipeline._prepare_latent_ids(torch.empty(1, 1, height, width)).to(self.device)


class Flux2KleinAdapter(Flux2Adapter):
    """The base model is guided by an empty prompt, or the request's negative one; the distilled one is not guided."""

    pipeline_class = Flux2KleinPipeline
    family = "flux2-klein"

    def _info(self, limits: ModelLimits) -> ModelInfo:
        distilled = bool(self.pipeline.config.is_distilled)
        return self._info_of(
            limits,
            cfg_above=None if distilled else 1.0,
            steps=4 if distilled else 50,
            default_guidance_scale=1.0 if distilled else 4.0,
        )


class Flux2DevAdapter(Flux2Adapter):
    """Its guidance is distilled: the transformer is told the scale."""

    pipeline_class = Flux2Pipeline
    family = "flux2-dev"

    def _info(self, limits: ModelLimits) -> ModelInfo:
        return self._info_of(limits, cfg_above=None, steps=50, default_guidance_scale=4.0)

    def _guidance(self, request: GenerateRequest) -> torch.Tensor:
        assert request.guidance_scale is not None
        return torch.full([1], request.guidance_scale, dtype=torch.float32, device=self.device)
