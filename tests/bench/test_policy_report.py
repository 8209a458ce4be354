"""The tables of `bench/policies.py`: what they say of runs that are not all there yet."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "bench"))
policy_report, suite = importlib.import_module("policy_report"), importlib.import_module("suite")

CELL = suite.Cell("small", "flux_l20", "uniform", 6)


def _run(slo_attainment: float) -> dict[str, Any]:
    return {**dict.fromkeys(policy_report.FIGURES, 1.0), "slo_attainment": slo_attainment}


def _reported(folder: Path, runs: dict[str, Any], seeds: list[int] | None = None) -> dict[str, Any]:
    (folder / "small.json").write_text(json.dumps(runs))
    policy_report.write_report(folder, [CELL], suite.VARIANTS, suite.COLUMNS, seeds)
    row: dict[str, Any]
    (row,) = json.loads((folder / "policies.json").read_text())
    return row


def test_the_best_round_length_stands_for_a_sweep(tmp_path: Path) -> None:
    runs = {f"dp@{steps} {seed}": _run(0.5 + 0.1 * (steps == 5)) for steps in (1, 5) for seed in range(3)}
    row = _reported(tmp_path, runs)
    assert row["policies"]["dp"]["variant"] == "dp@5"
    assert row["policies"]["dp"]["slo_attainment"] == 0.6


def test_means_over_fewer_seeds_than_the_cell_has_are_not_shown(tmp_path: Path) -> None:
    runs = {f"edf {seed}": _run(0.5) for seed in range(3)}
    runs |= {"ilp 0": _run(0.9), "ilp 1": _run(0.9)}
    runs |= {f"bound {seed}": {**_run(1.0), "optimal": True} for seed in range(2)}
    row = _reported(tmp_path, runs)
    assert set(row["policies"]) == {"edf"}
    assert row["bound"] is None
    table = (tmp_path / "policies.md").read_text()
    assert "| small | 3 | - | - | - | - | - | 0.500 | - | - | - | - | - | - | - |" in table


def test_means_are_over_the_seeds_asked_for(tmp_path: Path) -> None:
    row = _reported(tmp_path, {"edf 0": _run(0.5), "edf 1": _run(0.7), "edf 2": _run(0.9)}, seeds=[1, 2])
    assert row["policies"]["edf"]["slo_attainment"] == 0.8
    assert row["policies"]["edf"]["seeds"] == 2
