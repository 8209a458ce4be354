"""From a model folder or hub id to an adapter on a device, by the real `from_pretrained`."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from tetriserve.engine.adapter import ModelAdapter, ModelLimits
from tetriserve.engine.kernels import Kernel
from tetriserve.errors import ConfigError
from tetriserve.models.embedded import EMBEDDED, embedded_folder
from tetriserve.models.flux import FluxAdapter
from tetriserve.models.flux2 import Flux2KleinAdapter
from tetriserve.models.hunyuan_video import HunyuanVideo15Adapter
from tetriserve.models.qwen_image import QwenImageAdapter
from tetriserve.models.sd3 import SD3Adapter
from tetriserve.models.wan import WanAdapter
from tetriserve.models.z_image import ZImageAdapter

ADAPTERS: dict[str, type[ModelAdapter]] = {
    adapter.pipeline_class.__name__: adapter
    for adapter in (
        FluxAdapter,
        Flux2KleinAdapter,
        HunyuanVideo15Adapter,
        QwenImageAdapter,
        SD3Adapter,
        WanAdapter,
        ZImageAdapter,
    )
}


def load_model(
    path: str,
    limits: ModelLimits,
    kernel: Kernel,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
) -> ModelAdapter:
    """Load a diffusers pipeline, straight to `device`: a node with eight GPUs need not hold the weights eight times.

    Raises `ConfigError` when the folder is missing, of no known family, or the family cannot have the `dtype`.
    """
    source = str(embedded_folder(path)) if path in EMBEDDED else path
    try:
        index = DiffusionPipeline.load_config(source, revision=revision)
    except (OSError, ValueError) as error:
        missing = "no such folder" if not Path(source).exists() else str(error).splitlines()[0]
        raise ConfigError(f"model.path: cannot read {source!r}: {missing}") from None
    adapter = ADAPTERS.get(index["_class_name"])
    if adapter is None:
        raise ConfigError(
            f"model.path: {source!r} is a {index['_class_name']}, supported are {', '.join(sorted(ADAPTERS))}"
        )
    name = str(dtype).removeprefix("torch.")
    if name not in adapter.dtypes:
        raise ConfigError(
            f"model.dtype: {name} overflows in {adapter.family} models, allowed are {', '.join(adapter.dtypes)}"
        )
    dtypes = {"default": dtype, **dict.fromkeys(adapter.in_float32, torch.float32)}
    pipeline = adapter.pipeline_class.from_pretrained(
        source, dtype=dtypes, revision=revision, device_map=device.type
    )
    return adapter(pipeline, limits, kernel)
