"""What a cell counts and measures, in Prometheus' terms: for the app's own `/metrics` and for Ray's exporter.

The number of series is bounded: shapes that the configuration does not list count as "other".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import prometheus_client
import ray.util.metrics
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector

from tetriserve.engine.report import Report, seconds_per_step, together
from tetriserve.request import CellStatus, Metrics, Shape

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 180.0)
"""Upper bounds of the histograms' buckets."""

OTHER_SHAPE = "other"

Families = list[Metric]


class _Meter:
    """A metric in our registry and, with the same name and labels, in Ray's exporter."""

    def __init__(
        self, registry: CollectorRegistry, kind: str, name: str, about: str, labels: Sequence[str]
    ) -> None:
        ours: dict[str, Any] = {"buckets": BUCKETS_S} if kind == "Histogram" else {}
        rays: dict[str, Any] = {"boundaries": list(BUCKETS_S)} if kind == "Histogram" else {}
        self._labels = tuple(labels)
        self._ours = getattr(prometheus_client, kind)(name, about, labels, registry=registry, **ours)
        self._rays = getattr(ray.util.metrics, kind)(name, about, tag_keys=self._labels, **rays)

    def add(self, amount: float, *labels: object) -> None:
        if amount > 0:  # Ray refuses zero
            self._child(labels).inc(amount)
            self._rays.inc(amount, self._tags(labels))

    def observe(self, value: float, *labels: object) -> None:
        self._child(labels).observe(value)
        self._rays.observe(value, self._tags(labels))

    def set(self, value: float, *labels: object) -> None:
        self._child(labels).set(value)
        self._rays.set(value, self._tags(labels))

    def _child(self, labels: Sequence[object]) -> Any:
        return self._ours.labels(*labels) if labels else self._ours

    def _tags(self, labels: Sequence[object]) -> dict[str, str]:
        return dict(zip(self._labels, map(str, labels), strict=True))


class Meters:
    """The meters of one cell; `shapes` are those that get a label of their own."""

    def __init__(self, shapes: Collection[Shape]) -> None:
        self._shapes = frozenset(shapes)
        self._registry = registry = CollectorRegistry()

        def meter(kind: str, name: str, about: str, *labels: str) -> _Meter:
            return _Meter(registry, kind, f"tetriserve_{name}", about, labels)

        self._requests = meter("Counter", "requests_total", "Ended requests.", "outcome", "shape")
        self._phases = meter(
            "Histogram", "phase_seconds", "Seconds of a finished request, by phase.", "phase", "shape"
        )
        self._lateness = meter(
            "Histogram",
            "lateness_seconds",
            "Seconds from the deadline to the end, 0 before it, of requests with one.",
            "outcome",
            "shape",
        )
        self._steps = meter("Histogram", "step_seconds", "Seconds of a denoising step.", "shape", "degree")
        self._ratio = meter(
            "Gauge",
            "step_time_ratio",
            "Measured over profiled seconds of a step, median of the last ranges.",
            "shape",
            "degree",
            "shared",
        )
        self._shared = meter(
            "Counter", "shared_steps_total", "Denoising steps by how many requests ran in them.", "requests"
        )
        self._busy = meter("Counter", "gpu_busy_seconds_total", "GPU-seconds of step ranges.", "degree")
        self._switches = meter("Counter", "degree_switches_total", "Changes of degree between two ranges.")
        self._switch_s = meter("Histogram", "switch_seconds", "Seconds from a range's start to its steps.")
        self._plans = meter("Histogram", "plan_seconds", "Seconds of a planning decision.")
        self._fallbacks = meter("Counter", "plan_fallbacks_total", "Decisions the fallback took over.")
        self._losses = meter("Counter", "gpu_losses_total", "Times a GPU's replica was lost.", "gpu")
        self._lost_ranges = meter(
            "Counter", "lost_ranges_total", "Step ranges that did not count and are run again.", "kind"
        )
        self._resubmitted = meter(
            "Counter", "resubmitted_requests_total", "Requests taken over from a lost cell."
        )
        self._open = meter("Gauge", "open_requests", "Accepted requests that have not ended.")
        self._waiting = meter("Gauge", "waiting_requests", "Open requests with nothing on a GPU.")
        self._running = meter("Gauge", "running_ranges", "Step ranges sent out and not yet reported.")
        self._held = meter("Gauge", "held_requests", "Requests with tensors on the GPUs, over all GPUs.")
        self._gpus = meter("Gauge", "gpus", "GPUs of the cell by state.", "state")

    def ended(
        self, outcome: str, shape: Shape, metrics: Metrics | None = None, past_s: float | None = None
    ) -> None:
        """A request ended: "met", "late" or "no_deadline", with its metrics, or with the code of its error.

        `past_s` is how long after its deadline, negative before it; None without one.
        """
        label = self._label(shape)
        self._requests.add(1, outcome, label)
        if past_s is not None:
            self._lateness.observe(max(0.0, past_s), outcome, label)
        if metrics is not None:
            for phase in ("queue", "encode", "denoise", "decode", "total"):
                self._phases.observe(getattr(metrics, f"{phase}_s"), phase, label)

    def ran(
        self, shapes: Sequence[Shape], degree: int, steps: int, switched: int, reports: Sequence[Report]
    ) -> None:
        """A range of requests of these shapes was run by all its members.

        Args:
            steps: of denoising, 0 for the other phases.
            switched: for so many the degree changed.
        """
        start_s, end_s = together(reports)
        self._busy.add(degree * (end_s - start_s), degree)
        if steps:
            for label in {self._label(shape) for shape in shapes}:
                self._steps.observe(seconds_per_step(reports, steps), label, degree)
            self._shared.add(steps, len(shapes))
            self._switch_s.observe(max(report.switch_s for report in reports))
            self._switches.add(switched)

    def corrected(self, shape: Shape, degree: int, ratio: float, *, shared: bool) -> None:
        """What the profile's step time, or a shared step's, is multiplied by from now on."""
        if shape in self._shapes:
            self._ratio.set(ratio, str(shape), degree, "yes" if shared else "no")

    def planned(self, seconds: float) -> None:
        self._plans.observe(seconds)

    def fell_back(self) -> None:
        self._fallbacks.add(1)

    def lost_gpu(self, gpu: int) -> None:
        self._losses.add(1, gpu)

    def lost_range(self, kind: str) -> None:
        self._lost_ranges.add(1, kind)

    def resubmitted(self) -> None:
        self._resubmitted.add(1)

    def families(self, status: CellStatus, waiting: int) -> Families:
        """All of it, the gauges as they are now."""
        self._open.set(status.open_requests)
        self._waiting.set(waiting)
        self._running.set(status.running)
        self._held.set(status.held)
        cordoned = len(status.cordoned)
        self._gpus.set(status.gpus_ready, "ready")
        self._gpus.set(cordoned, "cordoned")
        self._gpus.set(status.gpus - status.gpus_ready - cordoned, "lost")
        return list(self._registry.collect())

    def _label(self, shape: Shape) -> str:
        return str(shape) if shape in self._shapes else OTHER_SHAPE


def exposition(cells: Sequence[tuple[int, Families]]) -> bytes:
    """Prometheus' text of several cells, by number; every series gets the label `cell`."""
    joined: dict[str, Metric] = {}
    for cell, families in cells:
        for family in families:
            if family.name not in joined:
                joined[family.name] = Metric(family.name, family.documentation, family.type, family.unit)
            joined[family.name].samples += [
                sample._replace(labels={"cell": str(cell), **sample.labels})
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]
    return generate_latest(_Fixed(joined.values()))


class _Fixed(Collector):
    """What `generate_latest` reads."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
