"""A transformer's blocks compiled once for all sizes and degrees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tetriserve.errors import ConfigError


def check_compiler(device: torch.device) -> None:
    """Raise `ConfigError` where nothing can be compiled for a device."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigError(
                "model.compile: Triton is not installed here; install it, or set compile: false"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ConfigError(
            "model.compile: no C++ compiler (g++ or clang++) is on this machine; install one, or set compile: false"
        ) from None


def compile_blocks(transformer: torch.nn.Module) -> None:
    """Compile the forward of every block that the transformer repeats, with sizes left open.

    The forwards only: hooks around them cut and gather tokens, and the exchange inside is an operator that compiled
    code does not look into. Equal blocks share what was compiled for the first.
    """
    for block in repeated(transformer):
        block.forward = _compact_before(torch.compile(block.forward, dynamic=True))


def _compact_before(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled code is guarded on strides: give it those of whole tensors, whether they were cut or transposed."""

    def compact(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(map(compact, x))
        return x.contiguous().view(-1).view(x.shape) if isinstance(x, torch.Tensor) else x

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*map(compact, args), **{name: compact(value) for name, value in kwargs.items()})

    return call


def repeated(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """Its blocks: those that diffusers names, else what stands in its lists of one kind."""
    names = getattr(transformer, "_repeated_blocks", None)
    if names:
        return [module for module in transformer.modules() if type(module).__name__ in names]
    lists = [module for module in transformer.children() if isinstance(module, torch.nn.ModuleList)]
    return [block for blocks in lists for block in blocks if len({type(one) for one in blocks}) == 1]
