"""The VAE of Wan, which Qwen-Image has too: it sees frames, four of which make one of latents."""

from __future__ import annotations

from typing import Any

import torch


def frames(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents [1, channels, frames, height, width] of unit variance to [1, 3, frames, height, width] in pixels,
    about -1 to 1."""
    latents = latents.to(vae.dtype)
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    pixels: torch.Tensor = vae.decode(latents / (1.0 / deviation) + mean, return_dict=False)[0]
    return pixels
