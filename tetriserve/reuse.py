"""Steps that need not be computed: the velocity of the flow is extrapolated from the last two that were.

The schedule is TaylorSeer's (arXiv 2503.06923): the first steps are computed, then every so-manieth. It is applied to
the velocity of the whole latents, not to features inside the model: its state is two tensors as large as the latents,
whole on every GPU of a group, so that pictures do not depend on degrees and moves; and it is known beforehand which
steps cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from tetriserve.errors import InvalidRequest

QUALITIES: Mapping[str, str | None] = {"lossless": None, "high": "low", "fast": "high"}
"""What a request may say of `quality`, and the level of reuse that it allows at most."""

FIRST = 2
"""So many steps are always computed: an extrapolation needs two."""


def computed_steps(steps: int, every: int) -> tuple[int, ...]:
    """Of that many denoising steps those that are computed; `every` 1: all of them."""
    return tuple(step for step in range(steps) if step < FIRST or (step - FIRST - 1) % every == 0)


def check_quality(quality: str | None) -> None:
    """Raise `InvalidRequest` for what is no quality."""
    if quality is not None and quality not in QUALITIES:
        raise InvalidRequest("quality", f"{quality!r}, allowed are {', '.join(QUALITIES)}")
