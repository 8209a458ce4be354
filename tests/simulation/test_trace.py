"""Traces and synthetic workloads: round trips, what is refused and in which words, the statistics of the mixes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetriserve.errors import ConfigError
from tetriserve.profile import Profile
from tetriserve.request import Shape
from tetriserve.simulation.trace import MAX_LINE_CHARS, TraceRequest, read_trace, write_trace
from tetriserve.simulation.workload import SloRule, Workload, parse_shapes

PROFILES = Path(__file__).parents[2] / "bench" / "profiles"
GOOD: dict[str, Any] = {
    "id": "r0",
    "arrival_s": 0.0,
    "height": 256,
    "width": 256,
    "num_frames": 1,
    "num_inference_steps": 28,
    "slo_s": 1.5,
}
SHAPES = parse_shapes("256x256,512x512,1024x1024,2048x2048")
SLO = SloRule.parse("256x256=1.5,512x512=2,1024x1024=3,2048x2048=5")


def text_of(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refused(tmp_path: Path, text: str | bytes) -> str:
    file = tmp_path / "trace.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        list(read_trace(file))
    assert "\n" not in error.value.message and str(file) in error.value.message
    return error.value.message


finite = st.floats(0, 1e6, allow_nan=False)
requests = st.builds(
    TraceRequest,
    id=st.text(min_size=1, max_size=8),
    arrival_s=finite,
    height=st.integers(1, 4096),
    width=st.integers(1, 4096),
    num_inference_steps=st.integers(1, 100),
    num_frames=st.integers(1, 200),
    slo_s=st.none() | st.floats(1e-3, 1e6),
    prompt=st.none() | st.text(max_size=20),
    seed=st.none() | st.integers(0, 2**63 - 1),
    priority=st.integers(-5, 5),
    model=st.none() | st.text(min_size=1, max_size=5),
    drop_late=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, min_size=1, max_size=6, unique_by=lambda r: r.id))
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, trace: list[TraceRequest]
) -> None:
    trace.sort(key=lambda r: r.arrival_s)
    file = tmp_path_factory.mktemp("trace") / "t.jsonl"
    write_trace(file, trace)
    assert list(read_trace(file)) == trace


def test_lines_have_the_fields_of_the_contract(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.jsonl", [TraceRequest("r0", 0.0, 256, 256, 28, slo_s=1.5)])
    assert json.loads((tmp_path / "t.jsonl").read_text()) == GOOD


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arrival_s": -1.0}, "field arrival_s: must be a finite number of seconds, not negative"),
        ({"arrival_s": math.nan}, "field arrival_s"),
        ({"arrival_s": "0"}, "field arrival_s"),
        ({"arrival_s": None}, "field arrival_s is missing"),
        ({"slo_s": 0}, "field slo_s"),
        ({"slo_s": math.inf}, "field slo_s"),
        ({"height": 0}, "field height"),
        ({"width": 2.5}, "field width"),
        ({"num_inference_steps": 0}, "field num_inference_steps"),
        ({"num_frames": True}, "field num_frames"),
        ({"id": ""}, "field id"),
        ({"id": 7}, "field id"),
        ({"drop_late": "yes"}, "field drop_late"),
        ({"seed": -1}, "field seed"),
        ({"heigth": 256}, "unknown field 'heigth'"),
    ],
)
def test_bad_fields_are_named_with_file_and_line(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    message = refused(tmp_path, text_of(GOOD, {**GOOD, "id": "r1", **change}))
    assert "line 2" in message and says in message


def test_bad_files_are_refused(tmp_path: Path) -> None:
    assert "no requests" in refused(tmp_path, "\n\n")
    assert "r0" in refused(tmp_path, text_of(GOOD, GOOD))
    early = {**GOOD, "id": "r1", "arrival_s": 1.0}
    assert "sort the trace" in refused(tmp_path, text_of(early, GOOD))
    assert "not JSON" in refused(tmp_path, "{")
    assert "expected an object" in refused(tmp_path, "[1]\n")
    assert "field arrival_s" in refused(tmp_path, text_of(GOOD).replace("0.0", "1e999"))
    assert f"{MAX_LINE_CHARS} characters" in refused(tmp_path, "x" * (MAX_LINE_CHARS + 10))
    assert "UTF-8" in refused(tmp_path, b"\xff\xfe\x00")
    assert "line 1" in refused(tmp_path, "[" * 100_000)
    with pytest.raises(ConfigError, match="No such file"):
        list(read_trace(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="directory"):
        list(read_trace(tmp_path))


def test_too_many_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetriserve.simulation.trace.MAX_REQUESTS", 2)
    rows = [{**GOOD, "id": f"r{i}"} for i in range(3)]
    assert "more than 2 requests" in refused(tmp_path, text_of(*rows))


def test_reads_the_text_traces_of_hetu_dit(tmp_path: Path) -> None:
    file = tmp_path / "flux_trace.txt"
    file.write_text(
        "Request(request_id=0, timestamp=0.0, height=256, width=512, num_frames=1, prompt='a (b)', "
        "negative_prompt='low', num_inference_steps=28)\n"
        "Request(request_id=9, request_id_local=1, timestamp=0.6, height=64, width=64, num_frames=17, "
        'prompt="c", num_inference_steps=50)\n'
    )
    first, second = read_trace(file)
    assert first == TraceRequest("0", 0.0, 256, 512, 28, prompt="a (b)")
    assert (second.id, second.arrival_s, second.shape) == ("1", 0.6, Shape(64, 64, 17))


@pytest.mark.parametrize(
    "line",
    [
        "Request(request_id=0, timestamp=__import__('os').getpid(), height=1, width=1, num_inference_steps=1)",
        "Request(0, 1)",
        "Request(**{'height': 1})",
        "Request(request_id=0",
        "Request(request_id=0, timestamp=-1.0, height=1, width=1, num_inference_steps=1)",
        "Request(request_id=0, height=1, width=1, num_inference_steps=1)",
    ],
)
def test_hetu_lines_are_never_evaluated(tmp_path: Path, line: str) -> None:
    assert "line 1" in refused(tmp_path, line)


def test_workloads_are_a_function_of_their_seed() -> None:
    for mix in ("uniform", "skewed", "bursty"):
        one = Workload(mix, 12, 50, SHAPES, SLO, seed=3).generate()
        assert one == Workload(mix, 12, 50, SHAPES, SLO, seed=3).generate()
        assert one != Workload(mix, 12, 50, SHAPES, SLO, seed=4).generate()
        assert [r.arrival_s for r in one] == sorted(r.arrival_s for r in one)


def test_mixes_have_the_shares_of_the_paper() -> None:
    counts = Counter(str(r.shape) for r in Workload("uniform", 12, 300, SHAPES, SLO).generate())
    assert set(counts.values()) == {75}
    counts = Counter(str(r.shape) for r in Workload("skewed", 12, 1000, SHAPES, SLO).generate())
    assert [counts[str(shape)] for shape, _ in SHAPES] == [167, 175, 211, 447]
    flood = parse_shapes("256x256=9,512x512")
    counts = Counter(str(r.shape) for r in Workload("uniform", 12, 50, flood, SLO).generate())
    assert counts == {"256x256": 45, "512x512": 5}


@pytest.mark.parametrize("mix", ["uniform", "bursty"])
def test_mean_rate_comes_out(mix: str) -> None:
    trace = Workload(mix, 60, 30_000, SHAPES, SLO, seed=1).generate()
    assert trace[-1].arrival_s == pytest.approx(30_000, rel=0.06)
    gaps = np.diff([r.arrival_s for r in trace])
    spread = np.std(gaps) / np.mean(gaps)  # 1 for Poisson
    assert spread > 1.2 if mix == "bursty" else spread == pytest.approx(1.0, abs=0.05)


def test_deadlines_by_table_scale_or_best_time_alone() -> None:
    assert {r.slo_s for r in Workload("uniform", 9, 8, SHAPES, SLO, slo_scale=1.5).generate()} == {
        2.25,
        3.0,
        4.5,
        7.5,
    }
    profile = Profile.load(PROFILES / "flux_l20.yaml")
    alone = SloRule.parse("2.5x")
    one = parse_shapes("1024x1024")
    (request,) = Workload("homogeneous", 9, 1, one, alone, profile=profile).generate()
    assert request.slo_s == pytest.approx(2.5 * 28 * 0.227272727, abs=1e-6)
    (request,) = Workload("homogeneous", 9, 1, one, alone, profile=profile, n_gpus=2).generate()
    assert request.slo_s == pytest.approx(2.5 * 28 * 0.537634409, abs=1e-6)


def test_wrong_workloads_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown mix"):
        Workload("spiky", 12, 5, SHAPES, SLO).generate()
    with pytest.raises(ConfigError, match="one shape"):
        Workload("homogeneous", 12, 5, SHAPES, SLO).generate()
    with pytest.raises(ConfigError, match="64x64"):
        Workload("uniform", 12, 5, parse_shapes("64x64"), SLO).generate()
    with pytest.raises(ConfigError, match="--profile"):
        Workload("uniform", 12, 5, SHAPES, SloRule.parse("2.5x")).generate()
    for text in ("256x256=0", "256", "=", "-1x", "nanx"):
        with pytest.raises(ConfigError, match="--slo"):
            SloRule.parse(text)
    for text in ("", "256", "256x256=x", "256x256,256x256"):
        with pytest.raises(ConfigError, match="--shapes"):
            parse_shapes(text)


def test_the_command_writes_a_trace_and_refuses_in_one_line(tmp_path: Path) -> None:
    def workload(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tetriserve.cli", "workload", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    out = tmp_path / "t.jsonl"
    done = workload("--mix", "bursty", "--rate", "30", "--requests", "20", "--seed", "5", "--out", str(out))
    assert done.returncode == 0 and "20 requests" in done.stdout, done.stderr
    assert len(list(read_trace(out))) == 20
    for wrong in (
        ["--mix", "spiky"],
        ["--mix", "uniform", "--shapes", "9"],
        ["--mix", "uniform", "--slo", "2x"],
    ):
        done = workload(*wrong, "--rate", "30", "--out", str(out))
        assert done.returncode == 2 and done.stdout == ""
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("tetriserve: error: ")
