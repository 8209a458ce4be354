"""Flow matching as these families' pipelines set it up: timesteps moved with the number of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from tetriserve.engine.adapter import ModelAdapter, pictures_of
from tetriserve.request import GenerateRequest


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


def image_to_image(
    adapter: ModelAdapter, pipeline_class: Any, request: GenerateRequest, sampler: Any
) -> tuple[Any, torch.Tensor]:
    """The pipeline that starts from a picture, over the adapter's parts, and the request's picture as it takes it.

    Of the sampler's steps only the last ones are left, by the request's strength; the first of them is next.
    """
    (picture,) = pictures_of(request)
    first = len(sampler.timesteps) - adapter.info.steps_of(request)
    sampler.timesteps, sampler.sigmas = sampler.timesteps[first:], sampler.sigmas[first:]
    sampler.set_begin_index(0)
    pipeline = pipeline_class(**adapter.pipeline.components | {"scheduler": sampler})
    return pipeline, pipeline.image_processor.preprocess(picture, request.height, request.width)
