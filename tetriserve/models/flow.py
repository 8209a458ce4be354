"""Flow matching as these families' pipelines set it up: timesteps moved with the number of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps


def shift(config: Any, tokens: int, max_shift: float = 1.15) -> float:
    """How far the timesteps of a sampler with that configuration move towards noise."""
    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", max_shift),
    )


def set_timesteps(sampler: Any, steps: int, mu: float, device: torch.device) -> None:
    """Evenly spaced ones moved by `mu`, or the sampler's own where it has flow sigmas; the first step is next."""
    sigmas: Any = None
    if not sampler.config.get("use_flow_sigmas"):
        sigmas = np.linspace(1.0, 1 / steps, steps)
    retrieve_timesteps(sampler, steps, device, sigmas=sigmas, mu=mu)
    sampler.set_begin_index(0)


def start_late(sampler: Any, steps: int, left: int) -> None:
    """Only the last `left` of the `steps` of a sampler; the first of them is next."""
    sampler.timesteps = sampler.timesteps[steps - left :]
    sampler.sigmas = sampler.sigmas[steps - left :]
    sampler.set_begin_index(0)
