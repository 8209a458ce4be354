"""Qwen-Image (2512 too), after `QwenImagePipeline`."""

from __future__ import annotations

import torch
from diffusers import QwenImagePipeline

from tetriserve.engine.adapter import ModelAdapter, ModelLimits, RequestState
from tetriserve.models.flow import set_timesteps, shift
from tetriserve.models.wan_vae import frames
from tetriserve.request import GenerateRequest, ModelInfo


class QwenImageAdapter(ModelAdapter):
    """Double blocks throughout; guidance only beside a negative prompt, as in the pipeline."""

    pipeline_class = QwenImagePipeline
    family = "qwen-image"
    dtypes = ("float32", "bfloat16")

    def _info(self, limits: ModelLimits) -> ModelInfo:
        pipeline, config = self.pipeline, self.pipeline.transformer.config
        self._text_tokens = limits.text_tokens(512, pipeline.tokenizer_max_length, "Qwen-Image")
        side = 2 * pipeline.vae_scale_factor
        return limits.info(
            family=self.family,
            side=side,
            text_tokens=self._text_tokens,
            heads=config.num_attention_heads,
            cfg_field="true_cfg_scale",
            steps=50,
            default_guidance_scale=0.0,
            default_true_cfg_scale=4.0,
        )

    @property
    def latent_channels(self) -> int:
        return int(self.pipeline.vae.config.z_dim)

    def encode(self, request: GenerateRequest) -> dict[str, torch.Tensor]:
        """One prompt at a time: there is no padding, and so no mask."""
        prompts = {"embeds": request.prompt}
        if self.info.guided(request):
            prompts["negative_embeds"] = request.negative_prompt or ""
        conditioning = {}
        for name, prompt in prompts.items():
            conditioning[name], mask = self.pipeline.encode_prompt(
                prompt=prompt, device=self.device, max_sequence_length=self._text_tokens
            )
            assert mask is None
        return conditioning

    def begin(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor]) -> RequestState:
        pipeline, steps = self.pipeline, request.num_inference_steps
        assert steps is not None
        latents = pipeline.prepare_latents(
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
        noise = self._forward(state, timestep, "embeds")
        if self.info.guided(state.request):
            assert state.request.true_cfg_scale is not None
            negative = self._forward(state, timestep, "negative_embeds")
            guided = negative + state.request.true_cfg_scale * (noise - negative)
            norms = (torch.norm(x, dim=-1, keepdim=True) for x in (noise, guided))
            noise = guided * (next(norms) / next(norms))
        return noise

    def spatial(self, request: GenerateRequest, latents: torch.Tensor) -> torch.Tensor:
        pipeline = self.pipeline
        unpacked = pipeline._unpack_latents(latents, request.height, request.width, pipeline.vae_scale_factor)
        return unpacked[:, :, 0]

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """By a VAE for video, which sees one frame."""
        return frames(self.pipeline.vae, latents.unsqueeze(2))[:, :, 0]

    def _forward(self, state: RequestState, timestep: torch.Tensor, text: str) -> torch.Tensor:
        request, latents, token = state.request, state.latents, self.info.token_pixels
        return self.pipeline.transformer(
            hidden_states=latents,
            timestep=timestep.expand(1).to(latents.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=state.conditioning[text],
            encoder_hidden_states_mask=None,
            img_shapes=[[(1, request.height // token, request.width // token)]],
            return_dict=False,
        )[0]
