"""Stable Diffusion 3 and 3.5, after `StableDiffusion3Pipeline`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from tetriserve.engine.adapter import ModelAdapter, ModelLimits, RequestState
from tetriserve.engine.sequence import SequenceParallel, ShardPlan
from tetriserve.request import GenerateRequest, ModelInfo


class SD3Attention:
    """Joint attention of image and text, and SD3.5's second attention over the image alone, sharded."""

    def __init__(self, sequence_parallel: SequenceParallel) -> None:
        self._parallel = sequence_parallel

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        def normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
            x = x.unflatten(-1, (attn.heads, -1))
            return x if norm is None else norm(x)

        image = hidden_states.shape[1]
        query = normed(attn.norm_q, attn.to_q(hidden_states))
        key = normed(attn.norm_k, attn.to_k(hidden_states))
        value = normed(None, attn.to_v(hidden_states))
        rows = self._parallel.image_rows
        if encoder_hidden_states is not None:
            rows = self._parallel.joint_rows
            text_query = normed(attn.norm_added_q, attn.add_q_proj(encoder_hidden_states))
            text_key = normed(attn.norm_added_k, attn.add_k_proj(encoder_hidden_states))
            text_value = normed(None, attn.add_v_proj(encoder_hidden_states))
            query = torch.cat([query, text_query], dim=1)
            key = torch.cat([key, text_key], dim=1)
            value = torch.cat([value, text_value], dim=1)
        output = self._parallel.attend(query, key, value, rows).flatten(2, 3).to(query.dtype)
        image_output = attn.to_out[1](attn.to_out[0](output[:, :image]))
        if encoder_hidden_states is None:
            return image_output
        text_output = output[:, image:]
        return image_output, text_output if attn.context_pre_only else attn.to_add_out(text_output)


class SD3Adapter(ModelAdapter):
    pipeline_class = StableDiffusion3Pipeline
    family = "sd3"
    # diffusers ships no plan for SD3: tokens exist between the patch embedding and the last projection
    shard_plan: ClassVar[ShardPlan] = {
        "pos_embed": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "context_embedder": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    def _info(self, limits: ModelLimits) -> ModelInfo:
        pipeline, config = self.pipeline, self.pipeline.transformer.config
        self._t5_tokens = limits.max_sequence_length or 256
        side = pipeline.vae_scale_factor * config.patch_size
        return ModelInfo(
            name=limits.name,
            family=self.family,
            size_multiple=side,
            token_pixels=side,
            text_tokens=pipeline.tokenizer_max_length + self._t5_tokens,
            heads=config.num_attention_heads,
            cfg_field="guidance_scale",
            min_pixels=(8 * side) ** 2,
            max_pixels=limits.max_pixels,
            max_side=config.pos_embed_max_size * side,
            default_steps=limits.default_steps or 28,
            max_steps=limits.max_steps,
            default_guidance_scale=7.0,
            max_prompt_chars=limits.max_prompt_chars,
            description=limits.description,
        )

    def _install_attention(self) -> None:
        self.pipeline.transformer.set_attn_processor(SD3Attention(self.sequence_parallel))

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
        sampler = self.new_sampler()
        config = sampler.config
        shift = {}
        if config.get("use_dynamic_shifting"):
            shift["mu"] = calculate_shift(
                self.info.tokens(request.shape),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.16),
            )
        retrieve_timesteps(sampler, request.num_inference_steps, self.device, **shift)
        return RequestState(request, conditioning, latents, sampler)

    def predict_noise(self, state: RequestState, timestep: torch.Tensor) -> torch.Tensor:
        guided = self.info.guided(state.request)
        latents = torch.cat([state.latents] * 2) if guided else state.latents
        noise = self.pipeline.transformer(
            hidden_states=latents,
            timestep=timestep.expand(latents.shape[0]),
            encoder_hidden_states=state.conditioning["embeds"],
            pooled_projections=state.conditioning["pooled"],
            return_dict=False,
        )[0]
        if guided:
            negative, positive = noise.chunk(2)
            noise = negative + state.request.guidance_scale * (positive - negative)
        return noise
