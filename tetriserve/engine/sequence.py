"""Sequence parallelism whose degree may change between two steps.

Two small hooks split a transformer's token axes on the way in and gather them on the way out, following
diffusers' own context-parallel plan format. They and the attention read the *current* group, so a switch of
degree or GPU set is one assignment. Attention is exchanged by Ulysses all-to-all (heads for tokens); where
the heads do not divide, keys and values are gathered instead (ring attention with all-gather rotation, as in
diffusers). Shards may differ by one row: their sizes follow from the lengths, no rank has to ask another.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from tetriserve.engine.attention import Kernel
from tetriserve.engine.groups import SPGroup

ShardPlan = Mapping[str, Any]
"""diffusers' `_cp_plan`: module name to {argument or output index: ContextParallelInput}, or an output."""


class SequenceParallel:
    """Runs a transformer over the group of the moment.

    Args:
        transformer: the DiT; its attention processors must call `attend`.
        plan: where token axes are split and gathered.
        kernel: attention of one GPU.
    """

    def __init__(self, transformer: torch.nn.Module, plan: ShardPlan, kernel: Kernel) -> None:
        self._kernel = kernel
        self._group: SPGroup | None = None
        self.image_rows: tuple[int, ...] = ()
        self.joint_rows: tuple[int, ...] = ()
        for name, shards in plan.items():
            self._hook(transformer.get_submodule(name), shards)

    @contextmanager
    def over(self, group: SPGroup | None, image_tokens: int, text_tokens: int) -> Iterator[None]:
        """Run what is inside over `group`; None is one GPU alone. All members must enter together."""
        if group is not None:
            self.image_rows = group.rows(image_tokens)
            self.joint_rows = tuple(
                image + text for image, text in zip(self.image_rows, group.rows(text_tokens), strict=True)
            )
        self._group = group
        try:
            yield
        finally:
            self._group = None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: tuple[int, ...]
    ) -> torch.Tensor:
        """Attention of this rank's queries over all tokens of the group.

        Args:
            query, key, value: [batch, own tokens, heads, head_dim].
            rows: tokens of every rank (`image_rows` or `joint_rows`); ignored on one GPU.

        Returns:
            [batch, own tokens, heads, head_dim].
        """
        group = self._group
        if group is None:
            return self._kernel(query, key, value)
        if query.shape[2] % group.degree:
            key, value = self._gather_rows(torch.stack((key, value)), 2, rows)
            return self._kernel(query, key, value)
        return self._ulysses(group, query, key, value, rows)

    def _ulysses(
        self,
        group: SPGroup,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: tuple[int, ...],
    ) -> torch.Tensor:
        """Own tokens of all heads -> all tokens of own heads -> attention -> and back. Two exchanges."""
        batch, own, heads, dim = query.shape
        degree = group.degree
        sent = query.new_empty(degree, own, 3, batch, heads // degree, dim)
        for i, x in enumerate((query, key, value)):
            sent[:, :, i] = x.view(batch, own, degree, heads // degree, dim).permute(2, 1, 0, 3, 4)
        got = group.all_to_all(sent.flatten(0, 1), [own] * degree, rows)
        all_query, all_key, all_value = got.permute(1, 2, 0, 3, 4)
        output = self._kernel(all_query, all_key, all_value)
        got = group.all_to_all(output.transpose(0, 1).contiguous(), rows, [own] * degree)
        return got.view(degree, own, batch, heads // degree, dim).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def _gather_rows(self, x: torch.Tensor, dim: int, rows: tuple[int, ...]) -> torch.Tensor:
        """All ranks' shards of `x` along `dim`, in rank order."""
        group = self._group
        assert group is not None
        own = x.movedim(dim, 0).contiguous()
        sent = own.expand(group.degree, *own.shape).flatten(0, 1)
        return group.all_to_all(sent, [own.shape[0]] * group.degree, rows).movedim(0, dim)

    def _own_rows(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        group = self._group
        assert group is not None
        return x.split(group.rows(x.shape[dim]), dim=dim)[group.rank]

    def _hook(self, module: torch.nn.Module, shards: Any) -> None:
        if isinstance(shards, ContextParallelOutput):
            module.register_forward_hook(self._gather_hook(shards))
            return
        inputs = {k: v for k, v in shards.items() if not v.split_output}
        outputs = {k: v for k, v in shards.items() if v.split_output}
        if inputs:
            module.register_forward_pre_hook(self._split_inputs_hook(module, inputs), with_kwargs=True)
        if outputs:
            module.register_forward_hook(self._split_outputs_hook(outputs))

    def _split_inputs_hook(self, module: torch.nn.Module, inputs: dict[str, ContextParallelInput]) -> Any:
        signature = inspect.signature(type(module).forward)

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._group is None:
                return None
            bound = signature.bind(module, *args, **kwargs).arguments
            bound.pop("self")
            for name, shard in inputs.items():
                x = bound.get(name)
                if x is not None and x.dim() == (shard.expected_dims or x.dim()):
                    bound[name] = self._own_rows(x, shard.split_dim)
            return (), {**bound.pop("kwargs", {}), **bound}

        return hook

    def _split_outputs_hook(self, outputs: dict[int, ContextParallelInput]) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
            if self._group is None:
                return output
            if isinstance(output, torch.Tensor):
                return self._own_rows(output, outputs[0].split_dim)
            return tuple(
                self._own_rows(x, outputs[i].split_dim) if i in outputs else x for i, x in enumerate(output)
            )

        return hook

    def _gather_hook(self, shard: ContextParallelOutput) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            if self._group is None:
                return output
            return self._gather_rows(output, shard.gather_dim, self.image_rows)

        return hook
