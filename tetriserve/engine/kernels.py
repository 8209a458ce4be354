"""Attention kernels behind one interface: full attention of one GPU over the heads or queries it holds.

Sharding is done around the kernel (`sequence`), so any kernel serves every degree: torch's by the device ("auto"),
those of diffusers' dispatcher, or xfuser's on CUDA (extra `gpu`; xfuser cannot be imported without a GPU).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tetriserve.errors import ConfigError

Mask = torch.Tensor | None


class Kernel(Protocol):
    """Full attention of one GPU over the heads or queries it holds."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Mask = None,
        scale: float | None = None,
        gqa: bool = False,
    ) -> torch.Tensor:
        """Query, key and value are [batch, tokens, heads, head_dim]; the output is shaped like the query.

        Args:
            mask: [batch or 1, heads or 1, queries or 1, keys], of bool (False: not seen) or added to the scores.
            scale: of the scores; None: 1 / sqrt(head_dim).
            gqa: key and value have fewer heads than the query, each of which serves several.
        """


HOPPER = (9, 0)
"""Compute capability of H100 and H200."""

ON_HOPPER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""FlashAttention 2 knows nothing of Hopper: cuDNN is 1.7 to 2.0 times as fast there (bench/results/gpu, H200), and
on no other GPU (huggingface/transformers#48163). Newer torch (2.11) puts it first by itself, older does not."""


MASKABLE = ("native", "_native_cudnn", "_native_efficient", "_native_math", "flex")
"""diffusers' backends that take a mask; where there is one, "native" stands in for the others."""


def attention_kernel(name: str, device: torch.device) -> Kernel:
    """The kernel called `name`: "auto", a diffusers backend ("native", "flash", ...), "xfuser" or "xfuser:NAME".

    "auto" is the fastest of torch's own for `device`. Raises `ConfigError` naming the allowed values, or what keeps
    the backend from loading here.
    """
    if name == "auto":
        on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER
        return _torch_kernel([] if not on_hopper or _chooses_cudnn(device) else ON_HOPPER)
    if name == "xfuser" or name.startswith("xfuser:"):
        return _xfuser_kernel(name.partition(":")[2] or "SDPA_FLASH")
    try:
        backend = AttentionBackendName(name)
    except ValueError:
        allowed = ", ".join(member.value for member in AttentionBackendName)
        raise ConfigError(
            f"cell.attention_backend: unknown {name!r}, allowed are auto, xfuser, xfuser:NAME, {allowed}"
        ) from None

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Mask = None,
        scale: float | None = None,
        gqa: bool = False,
    ) -> torch.Tensor:
        chosen = backend if mask is None or name in MASKABLE else AttentionBackendName.NATIVE
        return dispatch_attention_fn(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa, backend=chosen
        )

    return kernel


def _chooses_cudnn(device: torch.device) -> bool:
    """Whether torch takes cuDNN here without being told to."""
    query = torch.empty(1, 1, 128, 128, device=device, dtype=torch.bfloat16)
    return bool(torch._fused_sdp_choice(query, query, query) == SDPBackend.CUDNN_ATTENTION.value)


def _torch_kernel(order: list[SDPBackend]) -> Kernel:
    """torch's kernels, the first of `order` that takes the shapes at hand; empty: torch's own choice.

    Saying an order costs 70 us a call on the host, 4 of the 60 ms that launching a step of FLUX takes (H200).
    """

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Mask = None,
        scale: float | None = None,
        gqa: bool = False,
    ) -> torch.Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(order, set_priority=True) if order else nullcontext():
            output = scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa
            )
        return output.transpose(1, 2)

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
    masked = _torch_kernel(ON_HOPPER)

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Mask = None,
        scale: float | None = None,
        gqa: bool = False,
    ) -> torch.Tensor:
        if mask is not None or scale is not None or gqa:  # xfuser's kernels take none of these
            return masked(query, key, value, mask, scale, gqa)
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        output, _ = call(*heads_first, dropout_p=0.0, is_causal=False)
        return output.transpose(1, 2)

    return kernel
