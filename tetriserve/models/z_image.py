"""Z-Image and Z-Image-Turbo, after `ZImagePipeline`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ZImagePipeline
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from tetriserve.engine.adapter import ModelAdapter, ModelLimits, RequestState
from tetriserve.engine.sequence import Joint, ShardPlan
from tetriserve.model_info import ModelInfo
from tetriserve.models.flow import set_timesteps, shift
from tetriserve.request import GenerateRequest

TURBO_STEPS = 8
"""Of Z-Image-Turbo, which is distilled and takes no guidance."""

TEXT_MULTIPLE = 32
"""The transformer pads text to a multiple of this."""

FOLLOWS_TOKENS = dict.fromkeys(("attn_mask", "freqs_cis", "noise_mask"), Joint(1, ("x",)))


class ZImageAdapter(ModelAdapter):
    """Text and picture run in one sequence behind refiners of their own.

    The model has 30 heads: degrees 4 and 8, which do not divide them, gather keys and values instead.
    """

    pipeline_class = ZImagePipeline
    family = "z-image"
    dtypes = ("float32", "bfloat16")

    def _info(self, limits: ModelLimits) -> ModelInfo:
        pipeline, config = self.pipeline, self.pipeline.transformer.config
        # a text and the place behind it have to fit the table of places
        longest = (config.axes_lens[0] - 1) // TEXT_MULTIPLE * TEXT_MULTIPLE
        self._text_tokens = limits.text_tokens(min(512, longest), longest, "this Z-Image")
        side = 2 * pipeline.vae_scale_factor
        turbo = "turbo" in limits.name.lower()  # nothing in its folder says so
        return limits.info(
            family=self.family,
            side=side,
            text_tokens=self._text_tokens,
            heads=config.n_heads,
            cfg_field="guidance_scale",
            cfg_above=0.0,
            max_side=min(config.axes_lens[1:]) * side,
            steps=TURBO_STEPS if turbo else 50,
            default_guidance_scale=0.0 if turbo else 5.0,
        )

    def shard_plan(self, transformer: Any) -> ShardPlan:
        """diffusers ships none. The refiner of the text is small and runs whole on every GPU."""
        plan: dict[str, Any] = {}
        for blocks in ("noise_refiner", "layers"):
            last = len(getattr(transformer, blocks)) - 1
            plan[f"{blocks}.0"] = {"x": ContextParallelInput(split_dim=1, expected_dims=3)}
            plan[f"{blocks}.*"] = FOLLOWS_TOKENS
            plan[f"{blocks}.{last}"] = ContextParallelOutput(gather_dim=1, expected_dims=3)
        return plan

    def encode(self, request: GenerateRequest) -> dict[str, torch.Tensor]:
        positive, negative = self.pipeline.encode_prompt(
            prompt=request.prompt,
            device=self.device,
            do_classifier_free_guidance=self.info.guided(request),
            negative_prompt=request.negative_prompt,
            max_sequence_length=self._text_tokens,
        )
        return dict(zip(("embeds", "negative_embeds"), [*positive, *negative], strict=False))

    def begin(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor]) -> RequestState:
        pipeline, steps = self.pipeline, request.num_inference_steps
        assert steps is not None
        latents = pipeline.prepare_latents(
            1,
            pipeline.transformer.in_channels,
            request.height,
            request.width,
            torch.float32,
            self.device,
            self.generator(request),
        )
        sampler = self.new_sampler()
        set_timesteps(sampler, steps, shift(sampler.config, self.info.tokens(request.shape)), self.device)
        return RequestState(request, conditioning, latents, sampler)

    def predict_alone(self, state: RequestState, timestep: torch.Tensor) -> torch.Tensor:
        """Guidance evaluates both prompts in one batch, in which the shorter one is masked."""
        transformer, texts = self.pipeline.transformer, list(state.conditioning.values())
        time = ((1000 - timestep.expand(1)) / 1000).repeat(len(texts))
        latents = state.latents.to(transformer.dtype).repeat(len(texts), 1, 1, 1).unsqueeze(2)
        positive, *negative = transformer(list(latents.unbind(0)), time, texts, return_dict=False)[0]
        velocity = positive.float()
        for one in negative:
            assert state.request.guidance_scale is not None
            velocity = velocity + state.request.guidance_scale * (velocity - one.float())
        return -velocity.squeeze(1).unsqueeze(0)

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        return super().pixels(latents.to(self.pipeline.vae.dtype))
