"""A result (the Result contract) as a picture: the board of GPU x time."""

from __future__ import annotations

import colorsys
import math
from pathlib import Path
from typing import Any

from tetriserve.errors import ConfigError
from tetriserve.scheduler.history import runs_of

Color = tuple[float, float, float]

MAX_PANELS = 20
LATENCIES_PER_PANEL = 30
"""Width of a panel in median request latencies: so many rectangles side by side can still be told apart."""
GOLDEN = 0.618034


def draw_board(result: dict[str, Any], n_gpus: int, path: Path) -> None:
    """GPU x time as a picture, in strips below each other.

    One colour per request; a triangle at the top marks its deadline; requests that missed theirs are hatched.
    Raises ConfigError when matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None

    colors = {request["id"]: _color(i) for i, request in enumerate(result["requests"])}
    start_s, end_s, panels = _panels(result)
    width_s = (end_s - start_s) / panels
    figure = Figure(figsize=(18, 1.0 + panels * (0.6 + 0.12 * n_gpus)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    for index, axis in enumerate(axes):
        left_s = start_s + index * width_s
        axis.set_xlim(left_s, left_s + width_s)
        axis.set_ylim(n_gpus - 0.5, -1.0)
        _draw_panel(axis, result, colors)
        axis.set_yticks(range(n_gpus))
        axis.tick_params(labelsize=6)
        axis.set_ylabel("GPU", fontsize=7)
    axes[-1].set_xlabel("seconds", fontsize=8)
    summary = result["summary"]
    figure.suptitle(
        f"{summary['policy']}: {summary['slo_attainment']:.1%} of {len(result['requests'])} requests on time, "
        f"GPUs {summary['gpu_utilisation']:.0%} busy (hatched: late, triangle: deadline)",
        fontsize=10,
    )
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from None


def _draw_panel(axis: Any, result: dict[str, Any], colors: dict[str, Color]) -> None:
    """What falls into the limits of the axis."""
    from matplotlib.patches import Rectangle

    left_s, right_s = axis.get_xlim()
    missed = {request["id"] for request in result["requests"] if not request["met"]}
    for entry in result["schedule"]:
        start_s, end_s = entry["start_s"], entry["end_s"]
        if end_s <= left_s or start_s >= right_s:
            continue
        request_id = entry["request_ids"][0]
        for first, count in runs_of(entry["gpus"]):
            axis.add_patch(
                Rectangle(
                    (start_s, first - 0.46),
                    end_s - start_s,
                    count - 0.08,
                    facecolor=colors[request_id],
                    edgecolor="black" if request_id in missed else colors[request_id],
                    hatch="/////" if request_id in missed else None,
                    linewidth=0.2,
                )
            )
    due = [(request["arrival_s"] + request["slo_s"], colors[request["id"]]) for request in result["requests"]]
    due = [mark for mark in due if left_s <= mark[0] <= right_s]
    at_s, marks = [mark[0] for mark in due], [mark[1] for mark in due]
    axis.scatter(at_s, [-0.75] * len(due), marker="v", s=14, c=marks, edgecolors="black", linewidths=0.3)
    axis.vlines(at_s, -0.75, axis.get_ylim()[0], colors=marks, linewidth=0.5, linestyles="dotted", zorder=0)


def _panels(result: dict[str, Any]) -> tuple[float, float, int]:
    """First second, last second, number of strips."""
    requests = result["requests"]
    start_s = min(request["arrival_s"] for request in requests)
    ends_s = [entry["end_s"] for entry in result["schedule"]]
    end_s = max([*ends_s, *(request["arrival_s"] + request["slo_s"] for request in requests)])
    median_s = result["summary"]["p50_s"] or (end_s - start_s)
    panels = math.ceil((end_s - start_s) / max(median_s * LATENCIES_PER_PANEL, 1e-9))
    return start_s, end_s, min(max(panels, 1), MAX_PANELS)


def _color(index: int) -> Color:
    """Neighbours in the trace get hues far apart, and lightness tells the next round of hues apart."""
    return colorsys.hls_to_rgb(index * GOLDEN % 1.0, (0.45, 0.6, 0.72)[index % 3], 0.65)
