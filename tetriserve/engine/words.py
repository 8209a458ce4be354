"""Which prompts were cut: tokenizers leave off what is beyond the length that a pipeline asks for, without a word."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from tetriserve.request import GenerateRequest

Call = tuple[str, bool]
"""The text of a call, and whether some of it was left off."""


class Watch:
    """Sees the calls of a pipeline's tokenizers."""

    def __init__(self, parts: Iterable[Any]) -> None:
        self._calls: list[Call] = []
        tokenizers = [getattr(part, "tokenizer", part) for part in parts]  # a processor has one inside
        for tokenizer in {id(one): one for one in tokenizers}.values():
            if isinstance(tokenizer, PreTrainedTokenizerBase):
                _watch(tokenizer, self._calls)

    def cut(self, request: GenerateRequest) -> tuple[str, ...]:
        """Fields of a request, encoded since the last call, whose ends no text encoder saw: what one of them leaves
        off, as CLIP does beyond 77 tokens, another may have read."""
        flags: dict[str, list[bool]] = {"prompt": [], "negative_prompt": []}
        prompt = _plain(request.prompt)
        for text, was_cut in self._calls:
            flags["prompt" if prompt in _plain(text) else "negative_prompt"].append(was_cut)
        self._calls.clear()
        return tuple(name for name, cuts in flags.items() if cuts and all(cuts))


def _plain(text: str) -> str:
    """As far as pipelines leave it alone."""
    return " ".join(text.split())


def _watch(tokenizer: PreTrainedTokenizerBase, calls: list[Call]) -> None:
    """Have it put down its calls. A call is looked up in the class, so it gets one of its own."""
    plain = type(tokenizer)

    def call(self: Any, text: Any = None, *args: Any, **options: Any) -> Any:
        made = plain.__call__(self, text, *args, **options)
        # without a limit nothing is cut; tokenizers in plain Python do not say
        if options.get("truncation") and made.encodings:
            words = text if isinstance(text, str) else " ".join(map(str, text))
            calls.append((words, any(encoding.overflowing for encoding in made.encodings)))
        return made

    tokenizer.__class__ = type(plain.__name__, (plain,), {"__call__": call, "__module__": plain.__module__})
