"""What a request consists of: the chain of its phases, what each needs and what it costs.

Written once, for the server, the simulator, `explain` and the bound.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from solver.problem import Phase, Shared
from tetriserve.request import Shape

STAGES: Mapping[str, str] = {
    "encode": "encoder",
    "encode_image": "vae",
    "denoise": "transformer",
    "decode": "vae",
}
"""By kind of phase, the stage of its model that it runs on."""


class Times(Protocol):
    """A profile, or one that follows what is measured."""

    @property
    def model(self) -> str: ...

    def step_s(self, shape: Shape) -> dict[int, float]:
        """Seconds of one denoising step by degree."""

    def encode_s(self, shape: Shape) -> float: ...

    def encode_image_s(self, shape: Shape) -> float: ...

    def decode_s(self, shape: Shape) -> float: ...

    def shared(self, shape: Shape) -> dict[int, Shared]:
        """The batch law's terms by degree; empty: no batches."""


def component_of(model: str, kind: str) -> str:
    """What a GPU must hold to run a phase of that kind: "MODEL/STAGE"."""
    return f"{model}/{STAGES[kind]}"


def chain_of(
    times: Times,
    shape: Shape,
    steps: int,
    degrees: Collection[int],
    *,
    cost: float = 1.0,
    step_shape: Shape | None = None,
    images: Sequence[Shape] = (),
    company: str = "",
) -> tuple[Phase, ...]:
    """encode -> encode_image, where there are pictures -> denoise -> decode.

    Args:
        degrees: those that the denoising steps of this shape may run at; the profile may know fewer.
        cost: of a step, in steps of the profile (guidance evaluates the model twice).
        step_shape: whose steps take as long, where it is not `shape`.
        images: pictures that go in.
        company: whose denoising steps may be shared with those of others that have the same; "" for none.
    """
    of_steps = times.step_s(shape if step_shape is None else step_shape)
    step_s = {degree: cost * t for degree, t in of_steps.items() if degree in degrees}
    rows = [("encode", 1, {1: times.encode_s(shape)})]
    if images:
        rows.append(("encode_image", 1, {1: sum(map(times.encode_image_s, images))}))
    rows += [("denoise", steps, step_s), ("decode", 1, {1: times.decode_s(shape)})]
    chain = [Phase(kind, n, table, component_of(times.model, kind)) for kind, n, table in rows]
    terms = times.shared(shape if step_shape is None else step_shape) if company else {}
    if terms:
        shared = {
            degree: Shared(cost * t.floor_s, cost * t.overhead_s, cost * t.add_s)
            for degree, t in terms.items()
            if degree in step_s
        }
        # those who evaluate the model once a step do not wait for those who do it twice
        with_cost = f"{company} {cost:g}"
        chain[-2] = replace(chain[-2], company=with_cost, shared=shared)
    return tuple(chain)
