"""Attention kernels behind one interface: full attention of one GPU over the heads or queries it holds.

Sharding is done around the kernel (`sequence`), so any kernel serves every degree: torch's by the device ("auto"),
those of diffusers' dispatcher, or xfuser's on CUDA (extra `gpu`; xfuser cannot be imported without a GPU).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tetriserve.errors import ConfigError

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(query, key, value), each [batch, tokens, heads, head_dim], to an output shaped like the query."""


HOPPER = (9, 0)
"""Compute capability of H100 and H200."""

ON_HOPPER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""torch prefers FlashAttention 2, which knows nothing of Hopper: cuDNN was measured 1.7 to 2.3 times as fast there,
and on no other GPU (huggingface/transformers#48163)."""


def attention_kernel(name: str, device: torch.device) -> Kernel:
    """The kernel called `name`: "auto", a diffusers backend ("native", "flash", ...), "xfuser" or "xfuser:NAME".

    "auto" is the fastest of torch's own for `device`. Raises `ConfigError` naming the allowed values, or what keeps
    the backend from loading here.
    """
    if name == "auto":
        on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER
        return _torch_kernel(ON_HOPPER) if on_hopper else attention_kernel("native", device)
    if name == "xfuser" or name.startswith("xfuser:"):
        return _xfuser_kernel(name.partition(":")[2] or "SDPA_FLASH")
    try:
        backend = AttentionBackendName(name)
    except ValueError:
        allowed = ", ".join(member.value for member in AttentionBackendName)
        raise ConfigError(
            f"cell.attention_backend: unknown {name!r}, allowed are auto, xfuser, xfuser:NAME, {allowed}"
        ) from None

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return dispatch_attention_fn(query, key, value, backend=backend)

    return kernel


def _torch_kernel(order: list[SDPBackend]) -> Kernel:
    """torch's kernels, the first of `order` that takes the shapes at hand."""

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(order, set_priority=True):
            return scaled_dot_product_attention(query, key, value).transpose(1, 2)

    return kernel


def _xfuser_kernel(kind: str) -> Kernel:
    try:
        from xfuser.core.distributed.attention_backend import (
            ATTENTION_FUNCTION_REGISTRY,
            AttentionBackendType,
        )
    except Exception as error:  # without a GPU xfuser fails in several ways while it is imported
        raise ConfigError(
            "cell.attention_backend: xfuser needs a CUDA device and `pip install tetriserve[gpu]` "
            f"({type(error).__name__}: {error})"
        ) from None
    backends = {member.name: ATTENTION_FUNCTION_REGISTRY.get(member) for member in AttentionBackendType}
    call = backends.get(kind)
    if call is None:
        allowed = ", ".join(name for name, function in backends.items() if function)
        raise ConfigError(f"cell.attention_backend: unknown xfuser kernel {kind!r}, allowed are {allowed}")

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        output, _ = call(*heads_first, dropout_p=0.0, is_causal=False)
        return output.transpose(1, 2)

    return kernel
