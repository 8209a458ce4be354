"""The way in for every diffusers transformer: its attention goes through an exchange of ours.

No family has attention code here. Processors that go through diffusers' own dispatcher are told of a backend that is
ours; older ones, which call torch's scaled_dot_product_attention themselves, run in a mode that takes that call over.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from re import search
from typing import Any, Literal, Protocol

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from tetriserve.engine.kernels import Mask

Kind = Literal["shard", "kv", "local"]
"""How an attention is sharded: "shard" exchanges heads for tokens, "kv" gathers keys and values for queries that
nobody has cut, "local" attends to what is here, which is all there is (text that was not cut)."""

Kinds = Sequence[tuple[str, Kind]]
"""(pattern, kind): the first pattern found in a module's name counts; "shard" where none is."""


class Exchange(Protocol):
    """Attention over all tokens of the group of the moment (`sequence.SequenceParallel`)."""

    def attend(
        self,
        kind: Kind,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Mask,
        scale: float | None,
        gqa: bool,
    ) -> torch.Tensor: ...


class Attend:
    """What a processor holds where diffusers has a parallel configuration: whom to ask, and how.

    One for each kind, not for each module: compiled code is guarded on it and shared between blocks.
    """

    def __init__(self, exchange: Exchange, kind: Kind) -> None:
        self.exchange = exchange
        self.kind = kind
        self.index = len(_attends)
        _attends.append(self)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Mask,
        scale: float | None,
        gqa: bool,
    ) -> torch.Tensor:
        if mask is not None and mask.dim() < 4:  # [batch, keys] or [batch, queries, keys]
            mask = mask[:, None, None] if mask.dim() == 2 else mask[:, None]
        if torch.compiler.is_compiling():
            return _attend_op(query, key, value, mask, scale, gqa, self.index)
        return self.exchange.attend(self.kind, query, key, value, mask, scale, gqa)


_attends: list[Attend] = []


@torch.library.custom_op("tetriserve::attend", mutates_args=())
def _attend_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    gqa: bool,
    index: int,
) -> torch.Tensor:
    """Opaque to `torch.compile`: it breaks no graph, and none is guarded on the group or its degree."""
    attend = _attends[index]
    return attend.exchange.attend(attend.kind, query, key, value, mask, scale, gqa).contiguous()


@_attend_op.register_fake
def _attend_shape(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    gqa: bool,
    index: int,
) -> torch.Tensor:
    return query.new_empty(query.shape)


def install(transformer: torch.nn.Module, exchange: Exchange, kinds: Kinds = ()) -> None:
    """Have every attention of a transformer go through `exchange`, by the kind that its module's name says."""
    attends = {kind: Attend(exchange, kind) for kind in ("shard", "kv", "local")}
    backend = _backend(attends["local"])
    for name, module in transformer.named_modules():
        processor: Any = getattr(module, "processor", None)
        if processor is None:
            continue
        kind: Kind = next((kind for pattern, kind in kinds if search(pattern, name)), "shard")
        if hasattr(processor, "_parallel_config"):
            processor._attention_backend = backend
            processor._parallel_config = attends[kind]
        else:
            module.processor = _taking_over(processor, attends[kind])


def _backend(local: Attend) -> AttentionBackendName:
    """A backend of diffusers' dispatcher that hands all on to the processor's `Attend`, or to `local` where the
    processor gives none, as Wan's do for attention to text.

    It is no member of diffusers' enum, which cannot grow, but is looked up like one.
    """
    text = f"tetriserve-{local.index}"
    name: Any = str.__new__(AttentionBackendName, text)
    name._name_, name._value_ = text.upper(), text

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Mask = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor:
        _refuse(dropout_p, is_causal)
        return (_parallel_config or local)(query, key, value, attn_mask, scale, enable_gqa)

    attention_dispatch._AttentionBackendRegistry.register(name, supports_context_parallel=True)(attend)
    return name


class _TakeOver(TorchFunctionMode):
    """Calls of torch's attention inside go to `attend`."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._sdpa(*args, **(kwargs or {}))

    def _sdpa(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Mask = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        _refuse(dropout_p, is_causal)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return self._attend(query, key, value, attn_mask, scale, enable_gqa).transpose(1, 2)


def _taking_over(processor: Any, attend: Attend) -> Any:
    """A copy (modules may share one) of a processor that calls torch's attention itself, which calls `attend`."""
    processor = copy.copy(processor)
    plain: Any = type(processor)
    processor.__class__ = _taken_over(plain, attend)
    return processor


@functools.cache  # compiled code is guarded on the class
def _taken_over(plain: Any, attend: Attend) -> Any:
    @functools.wraps(plain.__call__)  # its signature tells diffusers which arguments it takes
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _TakeOver(attend):
            return plain.__call__(self, *args, **kwargs)

    return type(plain.__name__, (plain,), {"__call__": call})


def _refuse(dropout_p: float, is_causal: bool) -> None:
    if dropout_p or is_causal:
        raise NotImplementedError("attention with dropout or a causal mask is not sharded")
