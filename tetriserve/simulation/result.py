"""The Result contract of the design page: what a run came to, the same from the simulator and from a live run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tetriserve.errors import ConfigError
from tetriserve.request import MET_SLACK_S, Shape


@dataclass(frozen=True)
class Outcome:
    """What became of one request of the trace.

    Attributes:
        slo_s: from arrival; infinite without a deadline.
        finish_s: None when it was dropped.
        alone_s: seconds that it takes by itself, every step at its fastest degree; None where nobody knows.
    """

    id: str
    shape: Shape
    arrival_s: float
    slo_s: float
    finish_s: float | None
    alone_s: float | None = None

    @property
    def latency_s(self) -> float | None:
        return None if self.finish_s is None else self.finish_s - self.arrival_s

    @property
    def met(self) -> bool:
        return self.latency_s is not None and self.latency_s <= self.slo_s + MET_SLACK_S

    @property
    def lateness_s(self) -> float | None:
        """Seconds behind its deadline; None when it was on time or dropped."""
        return None if self.met or self.latency_s is None else self.latency_s - self.slo_s


@dataclass(frozen=True)
class Executed:
    """A step range as it ran, switching cost included. Field names are those of the contract."""

    start_s: float
    end_s: float
    gpus: tuple[int, ...]
    request_ids: tuple[str, ...]
    steps: int
    kind: str
    component: str = ""


def shared_once(schedule: Iterable[Executed]) -> list[Executed]:
    """In order of start; what several requests report of the steps that they shared is one range of all of them."""
    ranges: dict[tuple[object, ...], Executed] = {}
    for entry in sorted(schedule, key=lambda entry: entry.start_s):
        key = (entry.kind, entry.gpus, entry.start_s, entry.end_s)
        before = ranges.get(key)
        joined = () if before is None else before.request_ids
        ranges[key] = replace(entry, request_ids=(*joined, *entry.request_ids))
    return list(ranges.values())


def result_of(
    policy: str,
    n_gpus: int,
    outcomes: Sequence[Outcome],
    schedule: Sequence[Executed],
    plan_ms: tuple[float, float],
) -> dict[str, Any]:
    """Summary, requests and schedule, ready for JSON. `plan_ms` is the median and 99th percentile.

    Every request of the trace counts for SLO attainment; latencies are those of requests that finished.
    Goodput and utilisation refer to the time from the first arrival to the last result.
    """
    ends_s = [entry.end_s for entry in schedule] + [o.finish_s for o in outcomes if o.finish_s is not None]
    start_s = min(outcome.arrival_s for outcome in outcomes)
    span_s = max(ends_s, default=start_s) - start_s
    gpu_seconds = sum((entry.end_s - entry.start_s) * len(entry.gpus) for entry in schedule)
    shapes = sorted({outcome.shape for outcome in outcomes}, key=lambda shape: (shape.pixels, shape))
    return {
        "summary": {
            "policy": policy,
            "slo_attainment": _attainment(outcomes),
            "goodput_rps": sum(outcome.met for outcome in outcomes) / span_s if span_s else 0.0,
            **_latencies(outcomes),
            "gpu_utilisation": gpu_seconds / (n_gpus * span_s) if span_s else 0.0,
            "gpu_seconds": gpu_seconds,
            "plan_ms_p50": plan_ms[0],
            "plan_ms_p99": plan_ms[1],
            "by_shape": {
                str(shape): _of_shape([o for o in outcomes if o.shape == shape]) for shape in shapes
            },
        },
        "requests": [
            {
                "id": outcome.id,
                "arrival_s": outcome.arrival_s,
                "finish_s": outcome.finish_s,
                "slo_s": outcome.slo_s if math.isfinite(outcome.slo_s) else None,
                "met": outcome.met,
            }
            for outcome in outcomes
        ],
        "schedule": [asdict(entry) for entry in schedule],
    }


def write_json(path: str | Path, body: Any) -> None:
    """Write a JSON file. Raises ConfigError when it cannot be written."""
    try:
        Path(path).write_text(json.dumps(body) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def summary_table(summary: dict[str, Any]) -> str:
    """The summary for people: one row for all requests and one for each shape."""
    rows = [f"{'':>12} {'requests':>9} {'on time':>8} {'mean s':>8} {'p50 s':>8} {'p99 s':>8}"]
    parts = {**summary["by_shape"], "all": summary}
    requests = sum(part["requests"] for part in summary["by_shape"].values())
    for name, part in parts.items():
        seconds = " ".join(
            f"{'-' if part[key] is None else format(part[key], '.3f'):>8}"
            for key in ("mean_s", "p50_s", "p99_s")
        )
        rows.append(
            f"{name:>12} {part.get('requests', requests):>9} {part['slo_attainment']:>8.1%} {seconds}"
        )
    rows.append(
        f"policy {summary['policy']}, goodput {summary['goodput_rps']:.3f}/s, "
        f"GPUs {summary['gpu_utilisation']:.1%} busy, {summary['gpu_seconds']:.1f} GPU-seconds, "
        f"planning p50 {summary['plan_ms_p50']:.1f} ms, p99 {summary['plan_ms_p99']:.1f} ms"
    )
    return "\n".join(rows)


def _of_shape(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "requests": len(outcomes),
        "slo_attainment": _attainment(outcomes),
        **_latencies(outcomes),
    }


def _attainment(outcomes: Sequence[Outcome]) -> float:
    return sum(outcome.met for outcome in outcomes) / len(outcomes)


def _latencies(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    seconds = [outcome.latency_s for outcome in outcomes if outcome.latency_s is not None]
    if not seconds:
        return {**dict.fromkeys(("mean_s", "p50_s", "p95_s", "p99_s")), **_lateness(outcomes)}
    return {
        "mean_s": float(np.mean(seconds)),
        "p50_s": percentile(seconds, 50),
        "p95_s": percentile(seconds, 95),
        "p99_s": percentile(seconds, 99),
        **_lateness(outcomes),
    }


def _lateness(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Seconds by which late requests were late, and how much longer than alone requests took."""
    late = [outcome.lateness_s for outcome in outcomes if outcome.lateness_s is not None]
    slowdowns = [o.latency_s / o.alone_s for o in outcomes if o.latency_s is not None and o.alone_s]
    return {
        "lateness_mean_s": float(np.mean(late)) if late else None,
        "lateness_p99_s": percentile(late, 99) if late else None,
        "slowdown_mean": float(np.mean(slowdowns)) if slowdowns else None,
        "slowdown_p99": percentile(slowdowns, 99) if slowdowns else None,
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """0 for no values."""
    return float(np.percentile(values, percent)) if values else 0.0
