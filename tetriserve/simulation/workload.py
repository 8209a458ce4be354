"""Synthetic traces (papers/tetriserve.md, section 3): which shapes, when they arrive, how soon they are due."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from solver.problem import least_work_s
from tetriserve.errors import ConfigError
from tetriserve.profile import Profile
from tetriserve.request import Shape
from tetriserve.simulation.trace import TraceRequest

MIXES = ("uniform", "skewed", "bursty", "homogeneous")
SKEW = 1.0
"""The paper's alpha in p proportional to exp(alpha * L / L_max), L the latent tokens of a shape."""
BURST_RATE, CALM_RATE = 3.0, 0.5
"""Arrival rate inside and outside a burst, in multiples of the mean rate."""
BURST_REQUESTS = 12.0
"""Mean number of requests in a burst; calm lasts so long that the mean rate comes out."""


@dataclass(frozen=True)
class SloRule:
    """How long after its arrival a request is due.

    Attributes:
        seconds: by shape.
        times_best: instead, a multiple of the best time of the request when it is alone.
    """

    seconds: Mapping[Shape, float] = field(default_factory=dict)
    times_best: float | None = None

    @classmethod
    def parse(cls, text: str) -> SloRule:
        """Read "256x256=1.5,512x512=2" or "2.5x". Raises ConfigError with the expected form."""
        try:
            if text.endswith("x"):
                return cls(times_best=_positive(text[:-1]))
            return cls({Shape.parse(shape): _positive(s) for shape, _, s in _pairs(text)})
        except ValueError:
            raise ConfigError(f"--slo must look like 256x256=1.5,512x512=2 or 2.5x, got {text!r}") from None

    def slo_s(self, request: TraceRequest, profile: Profile | None, n_gpus: int) -> float:
        """Seconds for this request. Raises ConfigError when the rule does not cover it."""
        if self.times_best is None:
            if request.shape not in self.seconds:
                raise ConfigError(f"--slo has no {request.shape}; add {request.shape}=SECONDS")
            return self.seconds[request.shape]
        if profile is None:
            raise ConfigError(f"--slo {self.times_best:g}x needs --profile to know the best time alone")
        return self.times_best * least_work_s(request.chain(profile, n_gpus))

    def fill(
        self, requests: Iterable[TraceRequest], profile: Profile, n_gpus: int
    ) -> tuple[list[TraceRequest], int]:
        """The requests, all with a deadline, and how many brought none of their own."""
        filled = [
            request
            if request.slo_s is not None
            else replace(request, slo_s=self.slo_s(request, profile, n_gpus))
            for request in requests
        ]
        return filled, sum(new is not old for new, old in zip(filled, requests, strict=True))


class ShapeWeight(NamedTuple):
    """A shape and how often it comes relative to the others of its mix."""

    shape: Shape
    weight: float


def parse_shapes(text: str) -> tuple[ShapeWeight, ...]:
    """Read "256x256,512x512" or, with weights, "256x256=20,2048x2048". Raises ConfigError."""
    try:
        parsed = [
            ShapeWeight(Shape.parse(shape), _positive(weight) if equals else 1.0)
            for shape, equals, weight in _pairs(text)
        ]
    except ValueError:
        raise ConfigError(
            f"--shapes must look like 256x256,512x512 or 256x256=20,512x512, got {text!r}"
        ) from None
    if len({shape for shape, _ in parsed}) < len(parsed):
        raise ConfigError(f"--shapes names a shape twice: {text!r}")
    return tuple(parsed)


@dataclass(frozen=True)
class Workload:
    """What to generate; every trace is a pure function of these fields.

    Attributes:
        rate_per_min: mean arrivals per minute.
        shapes: "homogeneous" takes exactly one.
        n_gpus: for deadlines that are multiples of the best time alone.
    """

    mix: str
    rate_per_min: float
    n_requests: int
    shapes: Sequence[ShapeWeight]
    slo: SloRule
    steps: int = 28
    slo_scale: float = 1.0
    seed: int = 0
    profile: Profile | None = None
    n_gpus: int = 8

    def generate(self) -> list[TraceRequest]:
        """The trace, in order of arrival. Raises ConfigError for a workload that makes no sense."""
        if self.mix not in MIXES:
            raise ConfigError(f"unknown mix {self.mix!r}; use one of {', '.join(MIXES)}")
        if self.mix == "homogeneous" and len(self.shapes) != 1:
            raise ConfigError("a homogeneous mix has one shape; name it with --shapes 1024x1024")
        rng = np.random.default_rng(self.seed)
        arrivals_s = np.cumsum(self._gaps_s(rng))
        requests = []
        for index, (arrival_s, shape) in enumerate(zip(arrivals_s, self._draw_shapes(rng), strict=True)):
            request = TraceRequest(
                f"r{index}", round(float(arrival_s), 6), shape.height, shape.width, self.steps, shape.frames
            )
            slo_s = self.slo_scale * self.slo.slo_s(request, self.profile, self.n_gpus)
            requests.append(replace(request, slo_s=round(slo_s, 6)))
        return requests

    def _draw_shapes(self, rng: np.random.Generator) -> list[Shape]:
        """Shapes in random order, in exact proportion (the paper's "equal counts"), rounded by remainder."""
        weights = np.array([weight for _, weight in self.shapes])
        if self.mix == "skewed":
            tokens = np.array([shape.pixels for shape, _ in self.shapes], dtype=float)
            weights = weights * np.exp(SKEW * tokens / tokens.max())
        exact = self.n_requests * weights / weights.sum()
        counts = np.floor(exact).astype(int)
        remainders = np.argsort(counts - exact, kind="stable")
        counts[remainders[: self.n_requests - counts.sum()]] += 1
        order = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        return [self.shapes[index].shape for index in order]

    def _gaps_s(self, rng: np.random.Generator) -> list[float]:
        """Seconds between arrivals: Poisson, or for "bursty" a Poisson process modulated by a two-state chain."""
        rate = self.rate_per_min / 60.0
        if self.mix != "bursty":
            return list(rng.exponential(1.0 / rate, self.n_requests))
        stay_s = {
            BURST_RATE: BURST_REQUESTS / (BURST_RATE * rate),
            CALM_RATE: BURST_REQUESTS / (BURST_RATE * rate) * (BURST_RATE - 1.0) / (1.0 - CALM_RATE),
        }
        gaps_s: list[float] = []
        state, left_s, gap_s = CALM_RATE, float(rng.exponential(stay_s[CALM_RATE])), 0.0
        while len(gaps_s) < self.n_requests:
            # without memory, an arrival that would fall behind the change of state can be drawn anew there
            draw_s = float(rng.exponential(1.0 / (state * rate)))
            if draw_s <= left_s:
                gaps_s.append(gap_s + draw_s)
                left_s, gap_s = left_s - draw_s, 0.0
            else:
                gap_s += left_s
                state = CALM_RATE if state == BURST_RATE else BURST_RATE
                left_s = float(rng.exponential(stay_s[state]))
        return gaps_s


def _pairs(text: str) -> list[tuple[str, str, str]]:
    return [part.strip().partition("=") for part in text.split(",")]


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError(f"must be positive, got {text!r}")
    return number
