"""The suite as data: which workloads on which machines, and which policies under which conditions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tetriserve.profile import Profile
from tetriserve.simulation.trace import TraceRequest
from tetriserve.simulation.workload import SloRule, Workload, parse_shapes

PAPER_SHAPES = "256x256,512x512,1024x1024,2048x2048"
PAPER_SLO = "256x256=1.5,512x512=2,1024x1024=3,2048x2048=5"
BEST_ALONE = "2.5x"
RATES = (6, 12, 18, 24, 36)
SCALES = (1.1, 1.2, 1.3, 1.4, 1.5)
FIVE_SEEDS = frozenset("h100-uniform-12 h100-skewed-12 h100-uniform-24 h100-uniform-36 l20-uniform-9".split())
"""The cells of design.md section 5; the others get three seeds."""


@dataclass(frozen=True)
class Cell:
    """One workload on one machine."""

    name: str
    profile: str
    mix: str
    rate_per_min: float
    shapes: str = PAPER_SHAPES
    slo: str = PAPER_SLO
    slo_scale: float = 1.0
    n_gpus: int = 8
    n_requests: int = 300

    @property
    def seeds(self) -> range:
        return range(5 if self.name in FIVE_SEEDS else 3)

    def trace(self, seed: int, profile: Profile) -> list[TraceRequest]:
        return Workload(
            self.mix,
            self.rate_per_min,
            self.n_requests,
            shapes=parse_shapes(self.shapes),
            slo=SloRule.parse(self.slo),
            slo_scale=self.slo_scale,
            seed=seed,
            profile=profile,
            n_gpus=self.n_gpus,
        ).generate()


def _suite() -> Iterator[Cell]:
    h100, l20, sd3 = "flux_h100_derived", "flux_l20", "sd3_l20"
    sd3_shapes = "256x256,512x512,1024x1024,1536x1536"
    for mix in ("uniform", "skewed"):
        for rate in RATES:
            yield Cell(f"h100-{mix}-{rate}", h100, mix, rate)
        for scale in SCALES:
            yield Cell(f"h100-{mix}-12-slo{scale}", h100, mix, 12, slo_scale=scale)
        for rate in (6, 9, 12, 18, 36):
            yield Cell(f"l20-{mix}-{rate}", l20, mix, rate, slo=BEST_ALONE)
        yield Cell(f"l20-{mix}-9-slo1.5", l20, mix, 9, slo=BEST_ALONE, slo_scale=1.5)
        for rate in (12, 24, 36):
            yield Cell(f"sd3-{mix}-{rate}", sd3, mix, rate, sd3_shapes, BEST_ALONE, n_gpus=4)
        yield Cell(f"sd3-{mix}-24-slo1.5", sd3, mix, 24, sd3_shapes, BEST_ALONE, slo_scale=1.5, n_gpus=4)
    yield Cell("h100-bursty-12", h100, "bursty", 12)
    yield Cell("h100-bursty-24", h100, "bursty", 24)
    yield Cell("l20-bursty-9", l20, "bursty", 9, slo=BEST_ALONE)
    yield Cell("sd3-bursty-24", sd3, "bursty", 24, sd3_shapes, BEST_ALONE, n_gpus=4)
    # rates at which the cheapest degrees alone would keep about half to nine tenths of the GPUs busy
    for shape, rate in (("512x512", 240), ("1024x1024", 72), ("2048x2048", 12)):
        yield Cell(f"h100-homogeneous-{shape}", h100, "homogeneous", rate, shape)
    yield Cell("h100-flood-256x256", h100, "uniform", 480, "256x256=60,512x512=2,1024x1024,2048x2048")


SUITE: tuple[Cell, ...] = tuple(_suite())


@dataclass(frozen=True)
class Variant:
    """A policy under conditions.

    Attributes:
        events: a policy of rounds decides at arrivals and freed GPUs as well.
        swept: the column in which the best of several round lengths is reported, per cell.
    """

    name: str
    policy: str
    round_steps: float | None = None
    events: bool = False
    switch_s: float = 0.0
    jitter: float = 0.0
    swept: str | None = None


DP_ROUND_STEPS = (0.2, 0.6, 0.8, 1.0, 5.0)
DP_EVENTS_ROUND_STEPS = (1.5, 3.0, 5.0)
"""Steps of the largest open shape at its fastest; `dp` is the paper as written, `dp+events` a stronger reading."""
VARIANTS: tuple[Variant, ...] = (
    *(Variant(name, name) for name in ("sp1", "sp2", "sp4", "sp8", "rssp", "edf", "ilp")),
    *(Variant(f"dp@{steps:g}", "dp", steps, swept="dp") for steps in DP_ROUND_STEPS),
    *(
        Variant(f"dp+events@{steps:g}", "dp", steps, events=True, swept="dp+events")
        for steps in DP_EVENTS_ROUND_STEPS
    ),
    Variant("ilp+noise", "ilp", switch_s=0.002, jitter=0.03),
)
COLUMNS = ("sp1", "sp2", "sp4", "sp8", "rssp", "edf", "dp", "dp+events", "ilp", "ilp+noise")
