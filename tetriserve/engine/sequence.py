"""Sequence parallelism whose degree may change between two steps.

Small hooks split a transformer's token axes on the way in and gather them on the way out, following diffusers' own
context-parallel plan format. They and the attention read the *current* group, so a switch of degree or GPU set is one
assignment. Attention is exchanged by Ulysses all-to-all (heads for tokens); where the heads do not divide, keys and
values are gathered instead (ring attention with all-gather rotation, as in diffusers). Shards may differ by one row:
their sizes follow from the lengths that were cut, no rank has to ask another.

One mechanism for every family: what a family adds is a plan of a few lines, often diffusers' own `_cp_plan`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations, combinations_with_replacement
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelOutput

from tetriserve.engine.attention import Kind, Kinds, install
from tetriserve.engine.company import (
    Call,
    Flat,
    Members,
    Modulation,
    Streams,
    apart,
    flat_arguments,
    modules,
    on_the_batch_axis,
    rows_apart,
)
from tetriserve.engine.groups import SPGroup
from tetriserve.engine.kernels import Kernel, Mask


@dataclass(frozen=True)
class Joint:
    """An argument that covers several streams one after the other: a joint mask, a rotary table.

    Attributes:
        streams: the arguments, cut before by the same plan, whose tokens it covers. Length 1 means the same for all
            tokens, and is left alone.
    """

    split_dim: int
    streams: tuple[str, ...]


ShardPlan = Mapping[str, Any]
"""diffusers' `_cp_plan`: module name to {argument or output index: ContextParallelInput or `Joint`}, or to a
ContextParallelOutput. "*" in a name stands for any number; a list of shards is for a tuple of tensors."""

Rows = tuple[int, ...]
"""How many rows of a sequence each rank has."""


class SequenceParallel:
    """Runs a transformer over the group of the moment.

    Args:
        transformer: the DiT, from diffusers.
        plan: where token axes are split and gathered.
        kernel: attention of one GPU.
        kinds: of attentions that are not to be sharded like the rest.
        batched: arguments with a row a picture, if pictures of one shape may share the batch axis.
        flat: how pictures of several shapes become one sequence, where they can.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        plan: ShardPlan,
        kernel: Kernel,
        kinds: Kinds = (),
        batched: Streams = (),
        flat: Flat | None = None,
    ) -> None:
        self._kernel = kernel
        self._batched = batched
        self._flat = flat
        self._members: Members | None = None
        self._last_members: tuple[tuple[object, ...], Members] | None = None
        self._group: SPGroup | None = None
        self._sharded = False  # between a split and its gather: what runs before and behind sees all tokens
        self._lengths: dict[str, int] = {}
        self._known: dict[tuple[int, int, tuple[int, ...]], dict[int, Rows] | None] = {}
        for pattern, shards in plan.items():
            for module in modules(transformer, pattern):
                self._hook(module, shards)
        install(transformer, self, kinds)
        if flat is not None:
            self._follow_members(transformer, flat)

    @contextmanager
    def over(self, group: SPGroup | None) -> Iterator[None]:
        """Run what is inside over `group`; None is one GPU alone. All members must enter together."""
        self._group = group
        try:
            yield
        finally:
            self._group, self._sharded = None, False

    # ---- several at a time --------------------------------------------------------------------------------

    def make(self, calls: Sequence[Call]) -> list[torch.Tensor]:
        """What each call makes, in one forward if their shapes allow it, over the group of the moment."""
        if len(calls) == 1:
            return [calls[0].make()]
        transformer = calls[0].transformer
        arguments = on_the_batch_axis(calls, self._batched)
        if arguments is not None:
            sizes = [len(call.arguments["hidden_states"]) for call in calls]
            return list(Call(transformer, arguments).make().split(sizes))
        if self._flat is None:
            return [call.make() for call in calls]
        rows = [rows_apart(call, self._flat) for call in calls]
        ones = [one for call in rows for one in call]
        arguments, lengths = flat_arguments(self._flat, ones)
        images = [one.arguments[self._flat.image] for one in ones]
        self._members = self._members_of(self._flat, lengths, images)
        try:
            made = iter(apart(self._flat, ones, Call(transformer, arguments).make()))
        finally:
            self._members = None
        return [torch.cat([next(made) for _ in call]) for call in rows]

    def _members_of(
        self, flat: Flat, lengths: Mapping[str, Sequence[int]], images: Sequence[torch.Tensor]
    ) -> Members:
        """Those of the forward before where it was the same mix: it is so in all steps of a range."""
        group, sides = self._group, [tuple(image.shape[-2:]) for image in images]
        place = None if group is None else (group.degree, group.rank)
        mix = (*map(tuple, lengths.values()), *sides, place)
        if self._last_members is None or self._last_members[0] != mix:
            self._last_members = mix, Members(flat, lengths, sides, group, images[0].device)
        return self._last_members[1]

    def _follow_members(self, transformer: torch.nn.Module, flat: Flat) -> None:
        """What knows pictures gets to know of several."""
        for pattern, streams in flat.modulated:
            for module in modules(transformer, pattern):
                module.register_forward_hook(self._modulation_hook(streams))
        for name, function in flat.instead.items():
            owner, _, method = name.rpartition(".")
            module = transformer.get_submodule(owner)
            setattr(module, method, self._instead(getattr(module, method), function))

    def _modulation_hook(self, streams: Streams) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            if self._members is None:
                return output
            return Modulation.of(output, self._members.owners(streams, self._here))

        return hook

    def _instead(self, method: Any, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._members is None:
                return method(*args, **kwargs)
            return function(method, self._members, *args, **kwargs)

        return call

    @property
    def _here(self) -> str:
        """Which tokens a block sees."""
        return "own" if self._group is not None and self._sharded else "whole"

    def _kernel_over(self, streams: Streams, where: tuple[str, str]) -> Kernel:
        """The kernel, of several requests for each by itself; arguments as for `Members.attend`."""
        if self._members is None:
            return self._kernel
        return partial(self._members.attend, self._kernel, streams, where)

    # ---- attention ----------------------------------------------------------------------------------------

    def attend(
        self,
        kind: Kind,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Mask,
        scale: float | None,
        gqa: bool,
    ) -> torch.Tensor:
        """Attention of this rank's queries over all tokens of the group; arguments as for `Kernel`, of own tokens."""
        group = self._group
        members = self._members
        streams = () if members is None else members.streams_of(query.shape[1], self._here)
        if group is None or kind == "local" or not self._sharded:
            kernel = self._kernel_over(streams, ("whole", "whole"))
            return kernel(query, key, value, mask, scale, gqa)
        key_rows = self._rows(group, key.shape[1], key.device)
        by_heads = kind == "shard" and not (query.shape[2] % group.degree or key.shape[2] % group.degree)
        if mask is not None:
            mask = self._of_all_keys(group, mask, key_rows, by_heads)
        if not by_heads:
            key, value = _gather(group, torch.stack((key, value)), 2, key_rows)
            kernel = self._kernel_over(streams, ("own", "exchanged"))
            return kernel(query, key, value, mask, scale, gqa)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.chunk(group.degree, 1)[group.rank]
        query_rows = self._rows(group, query.shape[1], query.device)
        if query.shape == key.shape:
            query, key, value = _to_heads(group, (query, key, value), query_rows)
        else:
            (query,) = _to_heads(group, (query,), query_rows)
            key, value = _to_heads(group, (key, value), key_rows)
        kernel = self._kernel_over(streams, ("exchanged", "exchanged"))
        return _to_tokens(group, kernel(query, key, value, mask, scale, gqa), query_rows)

    def _of_all_keys(self, group: SPGroup, mask: torch.Tensor, rows: Rows, all_queries: bool) -> torch.Tensor:
        """A mask [..., queries or 1, own keys] as one of all keys, in the order in which these are exchanged."""
        dtype, square = mask.dtype, mask.shape[-2] > 1
        if square:  # the product of who may look and who is seen: its diagonal is either
            mask = mask.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        mask = _gather(group, mask.to(torch.uint8) if dtype is torch.bool else mask, -1, rows).to(dtype)
        if not square:
            return mask
        queries = mask.transpose(-1, -2)
        return (queries if all_queries else queries.split(rows, -2)[group.rank]) * mask

    # ---- rows ---------------------------------------------------------------------------------------------

    def _rows(self, group: SPGroup, own: int, device: torch.device) -> Rows:
        """Every rank's rows of a sequence of which this one has `own`.

        The sequence is a stream that was cut, or two of them joined. Where two such sequences would give some rank
        the same number of rows, which all ranks see alike, they ask each other.
        """
        lengths = tuple(sorted(set(self._lengths.values())))
        key = (group.degree, group.rank, lengths)
        if key not in self._known:
            self._known[key] = _told_apart(group, lengths)
        known = self._known[key]
        if known is None:
            ones = [1] * group.degree
            sent = torch.full((group.degree,), own, dtype=torch.int64, device=device)
            return tuple(group.all_to_all(sent, ones, ones).tolist())
        if own not in known:
            raise RuntimeError(f"{own} tokens on rank {group.rank} of {group.degree}: no shard of {lengths}")
        return known[own]

    # ---- hooks --------------------------------------------------------------------------------------------

    def _hook(self, module: torch.nn.Module, shards: Any) -> None:
        if isinstance(shards, ContextParallelOutput):
            module.register_forward_hook(self._gather_hook(shards))
            return
        inputs = {name: shard for name, shard in shards.items() if isinstance(name, str)}
        outputs = {index: shard for index, shard in shards.items() if not isinstance(index, str)}
        if inputs:
            module.register_forward_pre_hook(self._split_inputs_hook(module, inputs), with_kwargs=True)
        if outputs:
            module.register_forward_hook(self._split_outputs_hook(outputs))

    def _split_inputs_hook(self, module: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        signature = inspect.signature(type(module).forward)

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._group is None:
                return None
            bound = signature.bind(module, *args, **kwargs).arguments
            bound.pop("self")
            for name, shard in inputs.items():
                if bound.get(name) is not None:
                    bound[name] = self._own(self._group, bound[name], shard, name)
            return (), {**bound.pop("kwargs", {}), **bound}

        return hook

    def _split_outputs_hook(self, outputs: dict[int, Any]) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
            group = self._group
            if group is None:
                return output
            if isinstance(output, torch.Tensor):
                return self._own(group, output, outputs[0], f"output of {type(module).__name__}")
            return tuple(
                self._own(group, x, outputs[i], f"output {i} of {type(module).__name__}")
                if i in outputs
                else x
                for i, x in enumerate(output)
            )

        return hook

    def _gather_hook(self, shard: ContextParallelOutput) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
            group = self._group
            if group is None:
                return output
            self._sharded = False
            if isinstance(output, tuple):  # the first is what was cut
                return (gathered(group, output[0]), *output[1:])
            return gathered(group, output)

        def gathered(group: SPGroup, x: torch.Tensor) -> torch.Tensor:
            dim = shard.gather_dim
            return _gather(group, x, dim, self._rows(group, x.shape[dim], x.device))

        return hook

    def _own(self, group: SPGroup, x: Any, shard: Any, name: str) -> Any:
        """This rank's part of an argument."""
        if isinstance(x, list | tuple):
            shards = shard if isinstance(shard, list | tuple) else [shard] * len(x)
            return type(x)(self._own(group, one, part, name) for one, part in zip(x, shards, strict=True))
        if not isinstance(x, torch.Tensor):
            return x
        if isinstance(shard, Joint):
            return self._own_of_joint(group, x, shard, name)
        if x.dim() != (shard.expected_dims or x.dim()):
            return x
        if not self._sharded:
            self._sharded, self._lengths = True, {}
        length = self._lengths[name] = x.shape[shard.split_dim]
        return x.split(group.rows(length), dim=shard.split_dim)[group.rank]

    def _own_of_joint(self, group: SPGroup, x: torch.Tensor, shard: Joint, name: str) -> torch.Tensor:
        lengths = [self._lengths[stream] for stream in shard.streams]
        if x.shape[shard.split_dim] == 1:
            return x
        if x.shape[shard.split_dim] != sum(lengths):
            raise RuntimeError(f"{name} {tuple(x.shape)} does not cover {shard.streams} of {lengths} tokens")
        parts = zip(x.split(lengths, shard.split_dim), lengths, strict=True)
        own = [part.split(group.rows(n), shard.split_dim)[group.rank] for part, n in parts]
        return torch.cat(own, shard.split_dim)


def _told_apart(group: SPGroup, lengths: Sequence[int]) -> dict[int, Rows] | None:
    """Rows of every rank by this rank's rows, for streams of these lengths and pairs of them; None where some rank
    could not tell two apart."""
    single = [group.rows(length) for length in lengths]
    joined = [
        tuple(a + b for a, b in zip(x, y, strict=True)) for x, y in combinations_with_replacement(single, 2)
    ]
    candidates = {*single, *joined}
    if any(a == b for x, y in combinations(candidates, 2) for a, b in zip(x, y, strict=True)):
        return None
    return {rows[group.rank]: rows for rows in candidates}


def _to_heads(group: SPGroup, tensors: Sequence[torch.Tensor], rows: Rows) -> tuple[torch.Tensor, ...]:
    """Own tokens of all heads to all tokens of own heads, [batch, tokens, heads, dim] each, in one exchange."""
    batch, own, heads, dim = tensors[0].shape
    degree, count = group.degree, len(tensors)
    sent = tensors[0].new_empty(degree, own, count, batch, heads // degree, dim)
    for i, x in enumerate(tensors):
        sent[:, :, i] = x.unflatten(2, (degree, heads // degree)).permute(2, 1, 0, 3, 4)
    got = group.all_to_all(sent.flatten(0, 1), [own] * degree, rows)
    return got.permute(1, 2, 0, 3, 4).unbind(0)


def _to_tokens(group: SPGroup, x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The way back."""
    degree, own = group.degree, rows[group.rank]
    got = group.all_to_all(x.transpose(0, 1).contiguous(), rows, [own] * degree)
    return got.unflatten(0, (degree, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)


def _gather(group: SPGroup, x: torch.Tensor, dim: int, rows: Rows) -> torch.Tensor:
    """All ranks' shards of `x` along `dim`, in rank order."""
    own = x.movedim(dim, 0).contiguous()
    sent = own.expand(group.degree, *own.shape).flatten(0, 1)
    return group.all_to_all(sent, [own.shape[0]] * group.degree, rows).movedim(0, dim)
