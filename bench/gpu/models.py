"""Random weights in the dimensions of the models that people serve, and the same in small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from record import Place
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tetriserve.models.embedded.build import make_flux, make_scheduler, make_text_stack

FLUX_BYTES = 36 << 30
"""Of the folder in full size."""

SD35_LARGE: dict[str, Any] = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
"""huggingface.co/stabilityai/stable-diffusion-3.5-large, transformer/config.json"""

WAN_1_3B: dict[str, Any] = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
"""huggingface.co/Wan-AI/Wan2.1-T2V-1.3B-Diffusers, transformer/config.json"""


@contextmanager
def made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have their weights there, of that type."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def write_flux(place: Place, folder: Path) -> None:
    """A pipeline folder in FLUX.1-dev's dimensions; its tokenizers are small ones, words are not what is timed."""
    if place.small:
        make_flux(folder, heads=4, head_dim=16, double_blocks=1, single_blocks=1)
        return
    text = make_text_stack(width=64)
    clip_tokenizer = text["clip_tokenizer"]
    with made_on(place.device, torch.bfloat16):
        clip = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                projection_dim=768,
                num_hidden_layers=12,
                num_attention_heads=12,
                bos_token_id=clip_tokenizer.bos_token_id,
                eos_token_id=clip_tokenizer.eos_token_id,
                pad_token_id=clip_tokenizer.pad_token_id,
            )
        )
        t5 = T5EncoderModel(
            T5Config(
                d_model=4096,
                d_ff=10240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        vae: Any = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    pipeline: Any = FluxPipeline(
        scheduler=make_scheduler(),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=text["t5_tokenizer"],
        transformer=transformer,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def make_sd35(place: Place) -> Any:
    """The transformer of SD3.5 large."""
    small = {"num_layers": 2, "num_attention_heads": 4, "caption_projection_dim": 256} if place.small else {}
    return _made(place, SD3Transformer2DModel, **{"sample_size": 128, **SD35_LARGE, **small})


def make_z_image(place: Place) -> Any:
    """The transformer of Z-Image, whose dimensions are diffusers' defaults."""
    small: dict[str, Any] = {"dim": 128, "n_layers": 2, "n_heads": 1, "n_kv_heads": 1} if place.small else {}
    return _made(place, ZImageTransformer2DModel, **small)


def make_qwen_image(place: Place) -> Any:
    """The transformer of Qwen-Image, as Z-Image's; 41 GB."""
    small = {"num_layers": 2, "num_attention_heads": 2} if place.small else {}
    return _made(place, QwenImageTransformer2DModel, **small)


def make_wan(place: Place) -> Any:
    """The transformer of Wan 2.1 1.3B."""
    small = {"num_layers": 2, "num_attention_heads": 2, "ffn_dim": 256} if place.small else {}
    return _made(place, WanTransformer3DModel, **{**WAN_1_3B, **small})


def _made(place: Place, kind: Any, **config: Any) -> Any:
    with made_on(place.device, torch.bfloat16):
        return kind(**config).eval()


def twin(module: Any) -> Any:
    """Another module over the same weights, with the family's own attention."""
    with torch.device("meta"):
        other = type(module).from_config(module.config)
    other.load_state_dict(module.state_dict(), assign=True)
    return other.eval()


def bytes_of(module: Any) -> int:
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))
