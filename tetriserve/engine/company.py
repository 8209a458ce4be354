"""One forward of a transformer for the steps of several requests, at whatever shapes and timesteps they are.

A family yields its transformer's calls (`Call`) instead of making them, so that those of several requests can be made
together. Calls of equal shapes share the batch axis. Others lie behind each other on the token axis, as one flat
sequence (PatchedServe cuts pictures into patches for that; tokens are the smallest patches there are): linear layers,
norms and rotary tables see tokens only, what modulates them is a row a request that is spread over the request's
tokens, and attention is computed request by request. The blocks are diffusers' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from tetriserve.engine.groups import SPGroup
from tetriserve.engine.kernels import Kernel, Mask

Streams = tuple[str, ...]
"""The token arguments that a sequence consists of, in order."""


@dataclass(frozen=True)
class Call:
    """A transformer is to be called with these arguments; who yields it is sent what it makes."""

    transformer: torch.nn.Module
    arguments: Mapping[str, Any]

    def make(self) -> torch.Tensor:
        """By itself."""
        made: torch.Tensor = self.transformer(**self.arguments, return_dict=False)[0]
        return made


Predicting = Generator[Call, torch.Tensor, torch.Tensor]
"""A prediction on its way: yields calls, returns what is predicted."""


def _same(tokens: torch.Tensor) -> torch.Tensor:
    return tokens


def _as_made(made: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return made


@dataclass(frozen=True)
class Flat:
    """How a family's calls become one flat sequence.

    Attributes:
        tokens: the arguments whose tokens follow each other, and along which axis; `image` and `text` first.
        rows: the arguments with a row a call.
        modulated: (pattern of a module's name, streams): modules that make of a row what modulates all tokens of the
            streams.
        joint: the streams in the order in which attention over both has them.
        instead: name of a method below the transformer, which knows one picture at a time only, to a function that
            gets the method, the members and the arguments.
        enter: image latents as something that can be laid behind each other along their axis ...
        leave: ... and back what was made, with the latents for their shape.
        image, text: the names of these arguments.
    """

    tokens: Mapping[str, int]
    rows: Streams
    modulated: tuple[tuple[str, Streams], ...]
    joint: Streams
    instead: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    enter: Callable[[torch.Tensor], torch.Tensor] = _same
    leave: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = _as_made
    token_rows: int = 1
    """Rows along the image's axis that a token takes."""
    image: str = "hidden_states"
    text: str = "encoder_hidden_states"


class Members:
    """The requests of a forward: whose token is which.

    Args:
        lengths: by stream, the tokens of each member.
        sides: the last two of the shape of each member's image argument.
        group: over which all streams are cut, each into contiguous shards of the whole; None for one GPU.
    """

    def __init__(
        self,
        flat: Flat,
        lengths: Mapping[str, Sequence[int]],
        sides: Sequence[tuple[int, ...]],
        group: SPGroup | None,
        device: torch.device,
    ) -> None:
        self.flat = flat
        self.lengths = lengths
        self.sides = sides
        self._group = group
        self._device = device
        self._owners: dict[tuple[Streams, str], torch.Tensor] = {}
        self._orders: dict[tuple[Streams, str], tuple[torch.Tensor, torch.Tensor, list[int]]] = {}

    @cached_property
    def count(self) -> int:
        return len(self.lengths[self.flat.image])

    def owners(self, streams: Streams, where: str) -> torch.Tensor:
        """Of each token the number of its member: [tokens], int64, on the device.

        Args:
            where: "whole": the streams one after the other; "own": this rank's shards of them; "exchanged": those of
                all ranks, rank by rank.
        """
        key = (streams, where)
        if key not in self._owners:
            self._owners[key] = self._owners_on_host(streams, where).to(self._device)
        return self._owners[key]

    def _owners_on_host(self, streams: Streams, where: str) -> torch.Tensor:
        members = torch.arange(self.count)
        whole = [members.repeat_interleave(torch.tensor(self.lengths[stream])) for stream in streams]
        group = self._group
        if where != "whole" and group is not None:
            shards = [one.split(group.rows(len(one))) for one in whole]
            ranks = range(group.degree) if where == "exchanged" else (group.rank,)
            whole = [shard[rank] for rank in ranks for shard in shards]
        return torch.cat(whole)

    def order(self, streams: Streams, where: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """The tokens member by member, the way back, and how many each member has."""
        key = (streams, where)
        if key not in self._orders:
            # on the host: the device would have to be waited for to know how many there are
            owners = self._owners_on_host(streams, where)
            order = owners.argsort(stable=True)
            counts = torch.bincount(owners, minlength=self.count).tolist()
            self._orders[key] = order.to(self._device), order.argsort().to(self._device), counts
        return self._orders[key]

    def streams_of(self, tokens: int, where: str) -> Streams:
        """What a sequence of which so many tokens are there consists of: both streams, or the picture's."""
        image = (self.flat.image,)
        return image if len(self.owners(image, where)) == tokens else self.flat.joint

    def attend(
        self,
        kernel: Kernel,
        streams: Streams,
        where: tuple[str, str],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Mask = None,
        scale: float | None = None,
        gqa: bool = False,
    ) -> torch.Tensor:
        """Attention of every member by itself; what follows `where` is as for `Kernel`, batch 1, and without a mask.

        A loop: fused kernels for sequences of several lengths are slower, on CPU by far, on an H200 too.

        Args:
            where: the tokens of the query, and those of key and value, as for `owners`.
        """
        assert mask is None, "families with masks have no `Flat`"
        order, back, counts = self.order(streams, where[0])
        queries = query[:, order].split(counts, 1)
        order, _, counts = self.order(streams, where[1])
        keys, values = key[:, order].split(counts, 1), value[:, order].split(counts, 1)
        made = [
            kernel(q, k, v, None, scale, gqa) if q.shape[1] else q
            for q, k, v in zip(queries, keys, values, strict=True)
        ]
        return torch.cat(made, 1)[:, back]


class Modulation(torch.Tensor):
    """[members, features], and when it is given an axis for tokens: [1, tokens, features].

    Blocks write `scale[:, None]` or `gate.unsqueeze(1)` where a row a picture has to fit all of the picture's tokens:
    there the rows are spread over the tokens of their members.
    """

    owners: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, owners: torch.Tensor) -> Modulation:
        made: Modulation = rows.as_subclass(cls)
        made.owners = owners
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        owners = next(x.owners for x in args if isinstance(x, Modulation))
        with torch._C.DisableTorchFunctionSubclass():
            if _adds_tokens(func, args, kwargs):
                return args[0].as_subclass(torch.Tensor).index_select(0, owners).unsqueeze(0)
            made = func(*args, **kwargs)
        if isinstance(made, torch.Tensor):
            return _wrapped(made, owners)
        if isinstance(made, list | tuple):
            return type(made)(_wrapped(one, owners) for one in made)
        return made


def _adds_tokens(func: Any, args: Any, kwargs: Any) -> bool:
    if func is torch.Tensor.unsqueeze or func is torch.unsqueeze:
        return bool((args[1] if len(args) > 1 else kwargs.get("dim")) == 1)
    if func is torch.Tensor.__getitem__:
        at = args[1] if isinstance(args[1], tuple) else (args[1],)
        whole = slice(None)
        return at[:2] == (whole, None) and all(one == whole for one in at[2:])
    return False


def _wrapped(made: Any, owners: torch.Tensor) -> Any:
    if not isinstance(made, torch.Tensor):
        return made
    if made.dim() != 2:
        raise RuntimeError(f"a modulation of {tuple(made.shape)} is not known to belong to any tokens")
    return Modulation.of(made.as_subclass(torch.Tensor), owners)


def modules(transformer: torch.nn.Module, pattern: str) -> list[torch.nn.Module]:
    """Those below a transformer whose names are like `pattern`; "*" stands for any number."""
    if "*" not in pattern:
        return [transformer.get_submodule(pattern)]
    wanted = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [module for name, module in transformer.named_modules() if wanted.fullmatch(name)]


def rows_apart(call: Call, flat: Flat) -> list[Call]:
    """A call for each row of the batch that it has already, as guidance makes one."""
    count = call.arguments[flat.image].shape[0]
    if count == 1:
        return [call]
    batched = {*flat.rows, flat.image, flat.text}
    return [
        Call(
            call.transformer,
            {
                name: value[i : i + 1] if name in batched and isinstance(value, torch.Tensor) else value
                for name, value in call.arguments.items()
            },
        )
        for i in range(count)
    ]


def flat_arguments(flat: Flat, calls: Sequence[Call]) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The arguments of one forward for all `calls`, of one row each, and the tokens that each has in every stream."""
    first = calls[0].arguments
    joined: dict[str, Any] = {}
    for name, value in first.items():
        values = [call.arguments[name] for call in calls]
        if name == flat.image:
            joined[name] = torch.cat([flat.enter(one) for one in values], flat.tokens[name])
        elif name in flat.tokens:
            joined[name] = torch.cat(values, flat.tokens[name])
        elif name in flat.rows and value is not None:
            joined[name] = (
                [x for one in values for x in one] if isinstance(value, list) else torch.cat(values)
            )
        else:
            joined[name] = value
    axis = flat.tokens[flat.image]
    images = [flat.enter(call.arguments[flat.image]).shape[axis] // flat.token_rows for call in calls]
    texts = [call.arguments[flat.text].shape[flat.tokens[flat.text]] for call in calls]
    return joined, {flat.image: images, flat.text: texts}


def apart(flat: Flat, calls: Sequence[Call], made: torch.Tensor) -> list[torch.Tensor]:
    """What each call would have made by itself."""
    axis = flat.tokens[flat.image]
    latents = [call.arguments[flat.image] for call in calls]
    sizes = [flat.enter(one).shape[axis] for one in latents]
    ends = list(accumulate(sizes))
    return [
        flat.leave(made.narrow(axis, end - size, size), one)
        for end, size, one in zip(ends, sizes, latents, strict=True)
    ]


def on_the_batch_axis(calls: Sequence[Call], batched: Streams) -> dict[str, Any] | None:
    """The arguments of one forward for all `calls`, each with its rows of the batch; None where their shapes, or what
    has no row a call, differ."""
    if not batched:
        return None
    joined: dict[str, Any] = {}
    for name, value in calls[0].arguments.items():
        values = [call.arguments[name] for call in calls]
        if name in batched and isinstance(value, torch.Tensor):
            if any(one.shape[1:] != value.shape[1:] for one in values):
                return None
            joined[name] = torch.cat(values)
        elif name in batched and isinstance(value, list):
            joined[name] = [x for one in values for x in one]
        elif all(_is_equal(one, value) for one in values):
            joined[name] = value
        else:
            return None
    return joined


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.shape == other.shape and bool(torch.equal(one, other)))
    return bool(one == other)
