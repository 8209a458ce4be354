"""From a model folder or hub id to an adapter on a device, by the real `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig

from tetriserve.engine.adapter import ModelAdapter, ModelLimits
from tetriserve.engine.kernels import Kernel
from tetriserve.errors import ConfigError
from tetriserve.models.embedded import EMBEDDED, embedded_folder
from tetriserve.models.flux import FluxAdapter, FluxKontextAdapter
from tetriserve.models.flux2 import Flux2DevAdapter, Flux2KleinAdapter
from tetriserve.models.hunyuan_video import HunyuanVideo15Adapter
from tetriserve.models.qwen_image import (
    QwenImageAdapter,
    QwenImageEditAdapter,
    QwenImageEditPlusAdapter,
)
from tetriserve.models.sd3 import SD3Adapter
from tetriserve.models.wan import WanAdapter
from tetriserve.models.z_image import ZImageAdapter

ADAPTERS: dict[str, type[ModelAdapter]] = {
    adapter.pipeline_class.__name__: adapter
    for adapter in (
        FluxAdapter,
        FluxKontextAdapter,
        Flux2DevAdapter,
        Flux2KleinAdapter,
        HunyuanVideo15Adapter,
        QwenImageAdapter,
        QwenImageEditAdapter,
        QwenImageEditPlusAdapter,
        SD3Adapter,
        WanAdapter,
        ZImageAdapter,
    )
}


QUANTIZERS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}
"""By the name in a configuration, torchao's: weights of the transformers only, computed in the model's dtype."""


def load_model(
    path: str,
    limits: ModelLimits,
    kernel: Kernel,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    quantization: str | None = None,
    loras: Mapping[str, str] = MappingProxyType({}),
) -> ModelAdapter:
    """Load a diffusers pipeline, straight to `device`: a node with eight GPUs need not hold the weights eight times.

    Args:
        quantization: one of `QUANTIZERS`; None for the weights as they are.
        loras: files or folders by the name that requests choose them by.

    Raises `ConfigError` when the folder is missing, of no known family, the family cannot have the `dtype`, or a
    package or LoRA is missing or does not fit.
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
    options: dict[str, Any] = {}
    if quantization is not None:
        parts = [part for part in ("transformer", "transformer_2") if index.get(part, [None])[0]]
        options["quantization_config"] = _quantized(quantization, parts)
        limits = replace(limits, degraded=(*limits.degraded, quantization))
    dtypes = {"default": dtype, **dict.fromkeys(adapter.in_float32, torch.float32)}
    try:
        pipeline = adapter.pipeline_class.from_pretrained(
            source, dtype=dtypes, revision=revision, device_map=device.type, **options
        )
    except ImportError as error:  # FLUX.2 dev's processor needs torchvision, for one
        raise ConfigError(f"model.path: {source!r}: {str(error).strip().splitlines()[0]}") from None
    _load_loras(pipeline, loras, adapter.family)
    return adapter(pipeline, replace(limits, loras=tuple(loras)), kernel)


def _quantized(name: str, parts: Sequence[str]) -> Any:
    """A quantization configuration of diffusers for those parts of a pipeline."""
    _needs("torchao", f"model.quantization: {name}", "quantization")
    import torchao.quantization

    kind = getattr(torchao.quantization, QUANTIZERS[name])
    mapping: Any = {part: TorchAoConfig(kind()) for part in parts}
    return PipelineQuantizationConfig(quant_mapping=mapping)


def _load_loras(pipeline: Any, loras: Mapping[str, str], family: str) -> None:
    """Load them beside the weights, none of them in use."""
    if not loras:
        return
    _needs("peft", "model.loras", "lora")
    if not hasattr(pipeline, "load_lora_weights"):
        raise ConfigError(f"model.loras: diffusers loads none into {family} models")
    for name, path in loras.items():
        try:
            pipeline.load_lora_weights(path, adapter_name=name)
        except Exception as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise ConfigError(f"model.loras: {name}: cannot load {path!r}: {reason}") from None
        # diffusers warns, and goes on without, when a file has no weights for this model
        if name not in {one for names in pipeline.get_list_adapters().values() for one in names}:
            raise ConfigError(f"model.loras: {name}: {path!r} has no weights for this {family} model")
    pipeline.disable_lora()


def _needs(package: str, what: str, extra: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(
            f"{what} needs {package}, which is not installed: pip install 'tetriserve[{extra}]'"
        )
