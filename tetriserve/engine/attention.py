"""Attention kernels behind one interface: full attention of one GPU over the heads or queries it holds.

Sharding is done around the kernel (`sequence`), so any kernel serves every degree: diffusers' own
dispatcher, or xfuser's kernels on CUDA (extra `gpu`; xfuser cannot be imported without a GPU).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from tetriserve.errors import ConfigError

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(query, key, value), each [batch, tokens, heads, head_dim], to an output shaped like the query."""


def attention_kernel(name: str) -> Kernel:
    """The kernel called `name`: a diffusers backend ("native", "flash", ...), "xfuser" or "xfuser:NAME".

    Raises `ConfigError` naming the allowed values, or what keeps the backend from loading here.
    """
    if name == "xfuser" or name.startswith("xfuser:"):
        return _xfuser_kernel(name.partition(":")[2] or "SDPA_FLASH")
    try:
        backend = AttentionBackendName(name)
    except ValueError:
        allowed = ", ".join(member.value for member in AttentionBackendName)
        raise ConfigError(
            f"cell.attention_backend: unknown {name!r}, allowed are xfuser, xfuser:NAME, {allowed}"
        ) from None

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return dispatch_attention_fn(query, key, value, backend=backend)

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
