"""Tables and plots of `bench/policies.py`, from the runs that it kept."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tetriserve.simulation.result import write_json

if TYPE_CHECKING:
    from suite import Cell, Variant

Row = dict[str, Any]
FIGURES = ("slo_attainment", "gpu_seconds_per_met", "mean_met_s", "late_p99_s", "plan_ms_p99", "plan_ms_max")


def write_report(
    folder: Path,
    suite: Iterable[Cell],
    variants: Sequence[Variant],
    columns: Sequence[str],
    seeds: Sequence[int] | None = None,
) -> None:
    """Write `policies.md`, `policies.json` and two plots to `folder`; cells without runs are left out.

    Args:
        seeds: means are over these instead of each cell's own.
    """
    rows = [row for cell in suite if (row := _row(folder, cell, variants, columns, seeds or cell.seeds))]
    if not rows:
        return
    write_json(folder / "policies.json", rows)
    sections = [
        ("SLO attainment, mean over seeds", _attainment_table(rows, columns)),
        (
            "All GPU-seconds (late requests too) per request on time",
            _table(rows, columns, "gpu_seconds_per_met", 2, bound=True),
        ),
        ("Mean latency of requests on time, seconds", _table(rows, columns, "mean_met_s", 3)),
        ("99th percentile of the latency of late requests, seconds", _table(rows, columns, "late_p99_s", 1)),
        ("Planning, 99th percentile, milliseconds", _table(rows, columns, "plan_ms_p99", 2)),
    ]
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in sections)
    (folder / "policies.md").write_text(f"# Policies on the suite\n\n{text}\n")
    _plot_attainment(rows, columns, folder / "attainment.png")
    _plot_gap(rows, folder / "gap.png")


def _row(
    folder: Path, cell: Cell, variants: Sequence[Variant], columns: Sequence[str], seeds: Sequence[int]
) -> Row | None:
    """One cell: per column the means over the seeds, the bound, and which variant stands for a swept one.

    A column that lacks a seed is left out: seeds differ by more than policies do.
    """
    file = folder / f"{cell.name}.json"
    if not file.exists():
        return None
    runs: Mapping[str, Row | None] = json.loads(file.read_text())
    by_name: dict[str, list[Row]] = {}
    for key, run in runs.items():
        name, _, seed = key.rpartition(" ")
        if run is not None and int(seed) in seeds:
            by_name.setdefault(name, []).append(run)
    by_name = {name: found for name, found in by_name.items() if len(found) == len(set(seeds))}
    bounds = by_name.pop("bound", [])
    means = {name: _means(found) for name, found in by_name.items()}
    row: Row = {"cell": cell.name, "policies": {}, "bound": None}
    for column in columns:
        swept = [v.name for v in variants if v.swept == column and v.name in means]
        name = max(swept, key=lambda n: means[n]["slo_attainment"]) if swept else column
        if name in means:
            row["policies"][column] = {"variant": name, **means[name]}
    if bounds:
        row["bound"] = {
            "slo_attainment": statistics.fmean(run["slo_attainment"] for run in bounds),
            "gpu_seconds_per_met": _mean(bounds, "gpu_seconds_per_met"),
            "seeds": len(bounds),
            "all_optimal": all(run["optimal"] for run in bounds),
        }
    return row


def _means(runs: Sequence[Row]) -> Row:
    attainment = [run["slo_attainment"] for run in runs]
    spread = statistics.stdev(attainment) if len(attainment) > 1 else None
    return {"seeds": len(runs), "slo_stdev": spread, **{key: _mean(runs, key) for key in FIGURES}}


def _mean(runs: Sequence[Row], key: str) -> float | None:
    values = [run[key] for run in runs if run[key] is not None]
    return statistics.fmean(values) if values else None


def _gap(row: Row) -> float | None:
    """Points of SLO attainment between `ilp` and the bound."""
    if row["bound"] is None or "ilp" not in row["policies"]:
        return None
    return 100 * float(row["bound"]["slo_attainment"] - row["policies"]["ilp"]["slo_attainment"])


def _attainment_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    head = ["cell", "seeds", *columns, "dp rounds", "bound", "gap of ilp, points"]
    body: list[list[str]] = []
    for row in rows:
        policies = row["policies"]
        seeds = max((policy["seeds"] for policy in policies.values()), default=0)
        rounds = policies["dp"]["variant"].removeprefix("dp@") if "dp" in policies else "-"
        bound = "-" if row["bound"] is None else f"{row['bound']['slo_attainment']:.3f}"
        if row["bound"] is not None and not row["bound"]["all_optimal"]:
            bound += " (dual)"
        gap = _gap(row)
        cells = [_cell(policies, column, "slo_attainment", 3) for column in columns]
        body.append([row["cell"], str(seeds), *cells, rounds, bound, "-" if gap is None else f"{gap:.1f}"])
    lines = [markdown_table(head, body)]
    gaps = [gap for row in rows if (gap := _gap(row)) is not None]
    if gaps:
        lines += [
            "",
            f"Mean gap of `ilp` to the bound: {statistics.fmean(gaps):.2f} points over {len(gaps)} cells.",
        ]
    lines += [
        "",
        "`dp` at the best of the round lengths tried, in steps of the largest open shape (dp rounds).",
    ]
    return "\n".join(lines)


def _table(rows: Sequence[Row], columns: Sequence[str], key: str, digits: int, bound: bool = False) -> str:
    head = ["cell", *columns, *(["bound"] if bound else [])]
    body: list[list[str]] = []
    for row in rows:
        cells = [_cell(row["policies"], column, key, digits) for column in columns]
        if bound:
            cells.append(_cell({"bound": row["bound"] or {}}, "bound", key, digits))
        body.append([row["cell"], *cells])
    return markdown_table(head, body)


def _cell(policies: Mapping[str, Row], name: str, key: str, digits: int) -> str:
    value = policies.get(name, {}).get(key)
    return "-" if value is None else f"{value:.{digits}f}"


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table of cells that are texts already."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def _plot_attainment(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """A row of dots for each cell, a bar for its bound."""
    figure, axis = _figure(rows)
    for column in columns:
        at = [
            (row["policies"][column]["slo_attainment"], i)
            for i, row in enumerate(rows)
            if column in row["policies"]
        ]
        axis.plot(
            [x for x, _ in at], [y for _, y in at], linestyle="", marker="o", markersize=5, label=column
        )
    bounds = [(row["bound"]["slo_attainment"], i) for i, row in enumerate(rows) if row["bound"]]
    axis.plot([x for x, _ in bounds], [y for _, y in bounds], "k|", markersize=12, label="bound")
    axis.set_xlabel("SLO attainment, mean over seeds")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=110)


def _plot_gap(rows: Sequence[Row], path: Path) -> None:
    figure, axis = _figure(rows)
    gaps = [(i, gap) for i, row in enumerate(rows) if (gap := _gap(row)) is not None]
    axis.barh([i for i, _ in gaps], [gap for _, gap in gaps], height=0.7)
    axis.set_xlabel("gap of ilp to the clairvoyant bound, points of SLO attainment")
    figure.savefig(path, dpi=110)


def _figure(rows: Sequence[Row]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(10, 1.5 + 0.22 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_yticks(range(len(rows)), [row["cell"] for row in rows], fontsize=7)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(alpha=0.3)
    return figure, axis
