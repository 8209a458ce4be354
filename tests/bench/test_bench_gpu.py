"""The run that lies ready for the first GPU at hand goes through on the CPU, all of it."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tetriserve.profile import Profile

GPU_BENCH = Path(__file__).parents[2] / "bench" / "gpu"


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(GPU_BENCH / script), *arguments], capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(folder: Path, part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    run("run.py", "--small", "--out", str(folder))
    return folder


@pytest.mark.long
@pytest.mark.timeout(900)
def test_all_parts_end_well_and_say_what_they_should(results: Path) -> None:
    ends = {row["part"]: row["ended"] for row in rows(results, "parts")}
    assert len(ends) == 11 and set(ends.values()) == {"well"}, ends
    raw = json.loads((results / "raw.json").read_text())
    assert [part for part in ends if any("error" in row for row in raw[part])] == []

    gloo = [row for row in raw["gloo"] if "psnr_db" in row]
    assert [tuple(row["gpus"]) for row in gloo] == [(0,), (1,), (0, 1)]
    assert all(row["members_equal"] and row["max_of_255"] <= 1 for row in gloo)
    nccl = {key: value for row in raw["nccl"] for key, value in row.items()}
    assert nccl["uneven_exchange"] == nccl["group_anew"] == nccl["group_with_the_new_member"] == ["ok", "ok"]
    assert nccl["listens_beyond_loopback"] == [[], []]
    assert nccl["member_killed_in_the_exchange"]["error"].startswith("GivenUp")
    assert all(row["latents_differ"] == 0 for row in raw["flux"] if "latents_differ" in row)
    assert all(row["equal"] for row in raw["flux"] if "equal" in row)
    assert {row["degree"] for row in raw["flux"] if "degree" in row} == {1, 2, 4, 8}
    assert {row["family"] for row in raw["families"]} == {
        "SD3.5 large",
        "Z-Image",
        "Qwen-Image",
        "Wan 2.1 1.3B",
    }
    assert {row["batch"] for row in raw["batches"]} == {row["batch"] for row in raw["families"]} == {1, 2}
    assert all(0 < row["added"] < row["total"] for row in raw["stack"] if "added" in row)

    report = (results / "report.md").read_text()
    assert report.count("\n## ") == 11 and "| side | loop | ours_ms | plain_ms |" in report
    (profile,) = results.glob("flux_*_measured.yaml")
    assert Profile.load(profile).degrees == (1,)


@pytest.mark.long
def test_a_second_call_goes_on_where_the_first_was_cut(results: Path, tmp_path: Path) -> None:
    (tmp_path / "parts.jsonl").write_text(
        "".join(
            json.dumps(row | ({"ended": "cut after 1 s"} if row["part"] == "errors" else {})) + "\n"
            for row in rows(results, "parts")
        )
    )
    said = run("run.py", "--small", "--out", str(tmp_path))
    assert [line.split(":")[0] for line in said.splitlines() if ", at most" in line] == ["errors"]
    assert rows(tmp_path, "parts")[-1]["ended"] == "well"


def test_a_part_that_takes_too_long_is_cut_with_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(GPU_BENCH))
    bench = importlib.import_module("run")
    part = bench.Part("gloo", "groups", 8.0, "")
    bench.supervise(argparse.Namespace(out=tmp_path, small=True), part, tmp_path, 100.0)
    assert rows(tmp_path, "parts")[-1]["ended"] == "cut after 8 s"
    here = str(tmp_path)
    assert [p for p in psutil.process_iter(["cmdline"]) if here in " ".join(p.info["cmdline"] or [])] == []


@pytest.mark.long
def test_a_part_without_time_is_left_out(tmp_path: Path) -> None:
    said = run("run.py", "--small", "--out", str(tmp_path), "--only", "gloo", "machine", "--minutes", "0.29")
    ends = {row["part"]: row["ended"] for row in rows(tmp_path, "parts")}
    assert ends["machine"] == "well" and ends["gloo"] == "left out", said
    assert "s were left" in (tmp_path / "report.md").read_text()


@pytest.mark.long
@pytest.mark.timeout(400)
def test_several_gpus(tmp_path: Path) -> None:
    run("multi.py", "--out", str(tmp_path), "--gpus", "3")
    found = rows(tmp_path, "multi")
    assert all("error" not in row for row in found)
    merged = {key: value for row in found for key, value in row.items()}
    assert merged["exchange"] == merged["rest_anew"] == ["ok", "ok"] and merged["all_anew"] == ["ok"] * 3
    assert [row["gpu"] for row in found if "member_killed" in row] == [0, 1]
    assert all(row["member_killed"]["device_works"] for row in found if "member_killed" in row)
    assert {row["degree"] for row in found if "efficiency" in row} == {1, 2}
