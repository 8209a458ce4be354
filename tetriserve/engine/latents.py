"""What travels when a request changes GPUs: conditioning once, latents and sampler state after every range.

Tensors travel as NumPy arrays, which Ray moves through shared memory without a copy or a trip over disk.
bfloat16, which NumPy lacks, travels as its bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tetriserve.engine.adapter import ModelAdapter, RequestState
from tetriserve.request import GenerateRequest


@dataclass(frozen=True)
class PackedTensor:
    """A tensor off its device; `dtype` is torch's name of it."""

    array: np.ndarray
    dtype: str


@dataclass(frozen=True)
class Conditioning:
    """What encode made: constant for the life of a request. Values are `PackedTensor` or plain."""

    request: GenerateRequest
    values: dict[str, Any]


@dataclass(frozen=True)
class Latents:
    """The committed state after `step` denoising steps, with the sampler's own state (history included), and with
    reuse the velocities to extrapolate from."""

    step: int
    tensor: PackedTensor
    sampler: dict[str, Any]
    velocities: tuple[tuple[int, PackedTensor], ...] = ()


def pack_conditioning(state: RequestState) -> Conditioning:
    return Conditioning(state.request, {name: _pack_value(x) for name, x in state.conditioning.items()})


def pack_latents(state: RequestState) -> Latents:
    # `_internal_dict` is the configuration, equal on every replica
    sampler = {k: _pack_value(v) for k, v in vars(state.sampler).items() if k != "_internal_dict"}
    velocities = tuple((step, _pack(velocity)) for step, velocity in state.velocities)
    return Latents(state.step, _pack(state.latents), sampler, velocities)


def unpack_conditioning(conditioning: Conditioning, device: torch.device) -> dict[str, Any]:
    return {name: _unpack_value(packed, device) for name, packed in conditioning.values.items()}


def unpack_state(
    adapter: ModelAdapter, request: GenerateRequest, conditioning: dict[str, Any], latents: Latents
) -> RequestState:
    """The request's state on this GPU, ready for step `latents.step`."""
    sampler = adapter.new_sampler()
    vars(sampler).update({k: _unpack_value(v, adapter.device) for k, v in latents.sampler.items()})
    tensor = _unpack(latents.tensor, adapter.device)
    velocities = tuple((step, _unpack(velocity, adapter.device)) for step, velocity in latents.velocities)
    return RequestState(request, conditioning, tensor, sampler, latents.step, velocities)


def _pack(tensor: torch.Tensor) -> PackedTensor:
    host = tensor.detach().cpu().contiguous()
    bits = host.view(torch.int16) if host.dtype is torch.bfloat16 else host
    return PackedTensor(bits.numpy(), str(tensor.dtype).removeprefix("torch."))


def _unpack(packed: PackedTensor, device: torch.device) -> torch.Tensor:
    # the array may be a read-only view of shared memory that goes away with its object: take a copy
    host = torch.from_numpy(np.array(packed.array))
    return host.view(getattr(torch, packed.dtype)).to(device)


def _pack_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _pack(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_pack_value(item) for item in value)
    return value


def _unpack_value(value: Any, device: torch.device) -> Any:
    if isinstance(value, PackedTensor):
        return _unpack(value, device)
    if isinstance(value, (list, tuple)):
        return type(value)(_unpack_value(item, device) for item in value)
    return value
