"""Small diffusers-format model folders with random weights, made for the tests."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from tetriserve.models.embedded.build import make_flux, make_text_stack, make_vae

VAE_CHANNELS = (8, 8, 8, 8)


def tiny_flux(folder: Path, *, guidance_embeds: bool = True, heads: int = 4) -> Path:
    """FLUX with 4 heads (dev by default, schnell without `guidance_embeds`)."""
    make_flux(
        folder,
        heads=heads,
        head_dim=12,
        double_blocks=1,
        single_blocks=2,
        guidance_embeds=guidance_embeds,
        vae_channels=VAE_CHANNELS,
    )
    return folder


def tiny_sd3(folder: Path, *, dual_attention: bool = True) -> Path:
    """SD3 (SD3.5 medium with `dual_attention`: a second attention over the image, and query-key norms)."""
    torch.manual_seed(0)
    first = make_text_stack(width=32, projected=True)
    second = make_text_stack(width=32, projected=True)
    transformer = SD3Transformer2DModel(
        sample_size=64,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=64,
        dual_attention_layers=(0, 1) if dual_attention else (),
        qk_norm="rms_norm" if dual_attention else None,
    )
    t5 = make_text_stack(width=64)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(VAE_CHANNELS),
        text_encoder=first["clip"],
        tokenizer=first["clip_tokenizer"],
        text_encoder_2=second["clip"],
        tokenizer_2=second["clip_tokenizer"],
        text_encoder_3=t5["t5"],
        tokenizer_3=t5["t5_tokenizer"],
    ).save_pretrained(folder, safe_serialization=True)
    return folder
