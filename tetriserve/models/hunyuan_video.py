"""HunyuanVideo-1.5 text-to-video, by diffusers' blocks."""

from __future__ import annotations

from typing import Any

from diffusers import HunyuanVideo15AutoBlocks, HunyuanVideo15Pipeline
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from tetriserve.engine.adapter import ModelLimits
from tetriserve.engine.sequence import ShardPlan
from tetriserve.errors import ConfigError
from tetriserve.model_info import ModelInfo
from tetriserve.models.modular import ModularAdapter

TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)


class HunyuanVideo15Adapter(ModularAdapter):
    """The distilled ones carry their guidance scale, 1, in their folder."""

    pipeline_class = HunyuanVideo15Pipeline
    blocks_class = HunyuanVideo15AutoBlocks
    family = "hunyuan-video-1.5"
    dtypes = ("float32", "bfloat16")

    def _info(self, limits: ModelLimits) -> ModelInfo:
        pipeline, config = self.pipeline, self.pipeline.transformer.config
        texts = (
            pipeline.tokenizer_max_length,
            pipeline.tokenizer_2_max_length,
            pipeline.vision_num_semantic_tokens,
        )
        if limits.max_sequence_length not in (None, texts[0]):
            raise ConfigError(f"model.max_sequence_length: HunyuanVideo-1.5 always takes {texts[0]}")
        return limits.info(
            family=self.family,
            side=pipeline.vae_scale_factor_spatial * config.patch_size,
            text_tokens=sum(texts),
            heads=config.num_attention_heads,
            cfg_field="guidance_scale",
            frame_step=pipeline.vae_scale_factor_temporal,
            max_frames=limits.max_frames or 121,
            steps=50,
            default_guidance_scale=pipeline.guider.guidance_scale,
        )

    def shard_plan(self, transformer: Any) -> ShardPlan:
        """diffusers ships none. The refiner of the text is small and runs whole on every GPU."""
        table = ContextParallelInput(split_dim=0, expected_dims=2)
        return {
            "transformer_blocks.0": {"hidden_states": TOKENS, "encoder_hidden_states": TOKENS},
            "transformer_blocks.*": {
                "attention_mask": ContextParallelInput(split_dim=1, expected_dims=2),
                "freqs_cis": [table] * 2,
            },
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        }
