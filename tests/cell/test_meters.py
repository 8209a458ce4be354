"""`/metrics`: what a cell counts, in the words that Prometheus' own parser reads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from http_app import INFO, PICTURE, READY, URL, Cell, ask
from prometheus_client.parser import text_string_to_metric_families

from deployments.cell.meters import Families, Meters
from tetriserve.engine.report import Report
from tetriserve.request import CellStatus, Metrics, PlannedWith, Shape

PROMTOOL = shutil.which("promtool")
PLANNED_WITH = PlannedWith(0.2, {1: 0.03}, 0.4)
TOOK = Metrics(0.1, 0.2, 0.3, 0.4, 1.0, 0.9, None, None, (), (), 1, 0.0, PLANNED_WITH, 1 << 20)
SMALL, LARGE, ODD = Shape(256, 256), Shape(1024, 1024), Shape(384, 640)


def meters(gpu_seconds: float) -> Families:
    """Of a cell that ran one range and ended four requests."""
    cell = Meters([SMALL, LARGE])
    done = Report(10.0, 10.0 + gpu_seconds / 2, 0.0, 0)
    cell.ran([SMALL], 2, 5, 0, [done, Report(9.0, 11.0 + gpu_seconds / 2, 0.0, 0)])
    cell.ran([SMALL], 1, 0, 0, [Report(1.0, 2.0, 0.0, 0)])
    for shape, outcome in ((SMALL, "met"), (ODD, "met"), (LARGE, "late"), (Shape(64, 80), "met")):
        cell.ended(outcome, shape, TOOK, 1.5 if outcome == "late" else -0.5)
    cell.corrected(SMALL, 2, 1.1, shared=False)
    cell.planned(0.002)
    cell.fell_back()
    cell.lost_gpu(1)
    cell.lost_range("denoise")
    cell.resubmitted()
    return cell.families(CellStatus(True, "", 4, 2, 3, 2, "ilp", cordoned=(3,), held=5), waiting=1)


def read(answer: httpx.Response) -> dict[tuple[str, ...], float]:
    """Values by (name, label values in alphabetical order of the labels)."""
    assert answer.status_code == 200, answer.text
    families = list(text_string_to_metric_families(answer.text))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "a family is there twice"
    assert all(name.startswith("tetriserve_") for name in names)
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_every_cell_is_there_with_its_number() -> None:
    cell = Cell()
    cell.metrics = [(1, meters(8.0)), (0, meters(4.0))]
    cell.deaf = [ConnectionError("a cell that starts")]
    values = read(ask(cell, "GET", "/metrics"))
    assert values["tetriserve_gpu_busy_seconds_total", "0", "2"] == 4.0
    assert values["tetriserve_gpu_busy_seconds_total", "1", "2"] == 8.0
    assert values["tetriserve_gpu_busy_seconds_total", "1", "1"] == 1.0
    assert values["tetriserve_step_seconds_sum", "1", "2", "256x256"] == pytest.approx(4.0 / 5)
    assert values["tetriserve_requests_total", "0", "met", "256x256"] == 1
    assert values["tetriserve_requests_total", "0", "met", "other"] == 2
    assert values["tetriserve_requests_total", "0", "late", "1024x1024"] == 1
    gpus = {state: values["tetriserve_gpus", "0", state] for state in ("ready", "lost", "cordoned")}
    assert gpus == {"ready": 2, "lost": 1, "cordoned": 1}
    for name, value in {
        "open_requests": 3,
        "waiting_requests": 1,
        "running_ranges": 2,
        "held_requests": 5,
        "plan_seconds_count": 1,
        "plan_fallbacks_total": 1,
        "resubmitted_requests_total": 1,
    }.items():
        assert values[f"tetriserve_{name}", "0"] == value
    assert values["tetriserve_gpu_losses_total", "0", "1"] == 1
    assert values["tetriserve_lost_ranges_total", "0", "denoise"] == 1
    assert not any("created" in name for name, *_ in values)


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool here: apt-get install prometheus")
def test_prometheus_own_linter_finds_nothing() -> None:
    def lint(text: str) -> tuple[int, str]:
        command = [str(PROMTOOL), "check", "metrics"]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr

    assert all(family.samples for family in meters(1.0))  # others it would not look at
    cell = Cell()
    cell.metrics = [(0, meters(4.0)), (1, meters(8.0))]
    text = ask(cell, "GET", "/metrics").text
    assert lint(text) == (0, "")
    code, said = lint(text.replace("_requests_total", "_requests"))
    assert code != 0 and "tetriserve_requests counter metrics should have" in said


def test_without_a_cell_that_answers_there_is_nothing_to_read() -> None:
    cell = Cell()
    assert read(ask(cell, "GET", "/metrics")) == {}
    cell.silent = True
    assert ask(cell, "GET", "/metrics").status_code == 503


def test_shapes_that_nobody_configured_make_no_series() -> None:
    cell = Meters([SMALL])
    for side in range(64, 6400, 16):
        cell.ended("met", Shape(side, side))
    (requests,) = (f for f in cell.families(READY, 0) if f.name == "tetriserve_requests")
    assert {sample.labels["shape"] for sample in requests.samples} == {"256x256", "other"}


def test_metrics_need_a_key_where_keys_are_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERS_KEYS", "metrics-key-0123456789")
    limits = {"api_keys_env": "METERS_KEYS"}
    assert ask(Cell(), "GET", "/metrics", limits).status_code == 401
    headers = {"Authorization": "Bearer metrics-key-0123456789"}
    assert ask(Cell(), "GET", "/metrics", limits, headers=headers).status_code == 200
    assert ask(Cell(), "POST", URL, limits, headers=headers, json=PICTURE).json()["model"] == INFO.name


def test_the_dashboard_asks_for_every_metric_and_for_no_other() -> None:
    dashboard = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
    asked = set(re.findall(r"tetriserve_\w+", json.dumps(dashboard["panels"])))
    known = {family.name for family in meters(1.0)}
    stems = {name: re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked}
    assert {stem if stem in known else name for name, stem in stems.items()} == set(known)
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(places)
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert labels <= {
                "cell",
                "shape",
                "phase",
                "degree",
                "outcome",
                "state",
                "gpu",
                "kind",
                "shared",
                "requests",
            }
            assert target["expr"].count("(") == target["expr"].count(")")
