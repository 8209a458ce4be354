"""Previews: a rough picture from latents on the way, at an eighth of the size. No model runs for it.

The VAE decodes smooth latents nearly pixel by pixel, so that a linear map from channels to colours, fitted once to
what it decodes, is enough to see what the picture will be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

if TYPE_CHECKING:
    from tetriserve.engine.adapter import ModelAdapter

SIDE = 16
"""Latents along one side of what is decoded for the fit."""

CELLS = 6
"""Random latents along one side; the rest is interpolated, for those of a picture are smooth."""

SAMPLES_PER_CHANNEL = 16


def marks_passed(previews: int, steps: int, first_step: int, end_step: int) -> bool:
    """Whether steps `first_step` to `end_step` pass one of the marks that cut a request's steps into equal parts, one
    mark for each preview."""
    parts = previews + 1
    marks = (-(-steps * mark // parts) for mark in range(1, parts))
    return any(first_step < mark <= end_step for mark in marks)


def fit_colors(adapter: ModelAdapter) -> torch.Tensor:
    """Least squares from latents to the colours that the VAE makes of them, on a few small decodes.

    Returns float32 [channels + 1, 3] on the adapter's device, the last row being constant; colours are -1 to 1.
    """
    channels = adapter.latent_channels
    generator = torch.Generator("cpu").manual_seed(0)
    inputs, colors = [], []
    for _ in range(-(-SAMPLES_PER_CHANNEL * (channels + 1) // CELLS**2)):
        cells = torch.randn(1, channels, CELLS, CELLS, generator=generator)
        latents = interpolate(cells, size=(SIDE, SIDE), mode="bicubic").to(adapter.device)
        inputs.append(_rows(latents))
        colors.append(_rows(adaptive_avg_pool2d(adapter.pixels(latents).float(), SIDE)))
    x, y = torch.cat(inputs).double().cpu(), torch.cat(colors).double().cpu()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    return torch.linalg.lstsq(x, y).solution.float().to(adapter.device)


def picture(latents: torch.Tensor, colors: torch.Tensor) -> np.ndarray:
    """Latents [1, channels, height, width] to a picture of that size, uint8 [height, width, 3]."""
    height, width = latents.shape[2:]
    rgb = _rows(latents.float()) @ colors[:-1] + colors[-1]
    return ((rgb + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).reshape(height, width, 3).cpu().numpy()


def _rows(planes: torch.Tensor) -> torch.Tensor:
    """[1, channels, height, width] as [height * width, channels]."""
    return planes[0].flatten(1).T
