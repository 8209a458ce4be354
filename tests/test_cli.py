"""The command line: what it refuses, sends and prints. Real serving is tested end to end elsewhere."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from deployments import guard
from deployments.local import one_line
from tetriserve.cli import main

LOCAL = Path(__file__).parent.parent / "cluster_configs" / "cpu_local.yaml"


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tetriserve.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error that exits with 2."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("tetriserve: error: ")
    return line


def changed(tmp_path: Path, **args: Any) -> str:
    """The local config with some arguments replaced, as a file."""
    body = yaml.safe_load(LOCAL.read_text())
    for section, values in args.items():
        body["applications"][0]["args"][section] |= values
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(body))
    return str(file)


def test_help_ends_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("serve", "generate", "profile"):
        with pytest.raises(SystemExit) as done:
            main([name, "--help"])
        assert done.value.code == 0
        lines = capsys.readouterr().out.strip().splitlines()
        assert lines[-2] == "example:"
        assert lines[-1].startswith(f"  tetriserve {name} ")


def test_start_is_light() -> None:
    """--help and generate must not wait for Ray or torch."""
    script = "import tetriserve.cli, tetriserve.client, sys; print({'ray', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_serve_refuses_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in refused(run("serve", "--port", port))


def test_serve_refuses_an_unknown_key(tmp_path: Path) -> None:
    assert "args.cell.gpuz" in refused(run("serve", "--config", changed(tmp_path, cell={"gpuz": 3})))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "No such file"),
        ("applications: [", "not valid YAML"),
        ("[]", "no mapping"),
        ("applications: 5", "applications"),
        ("applications: []", "exactly one application"),
        ("applications: []\nhttp_option: {}", "unknown key http_option"),
        (LOCAL.read_text().replace("port: 8000", "prot: 8000"), "unknown key http_options.prot"),
        (LOCAL.read_text().replace("route_prefix", "rout_prefix"), "unknown key applications.0.rout_prefix"),
        (LOCAL.read_text().replace("port: 8000", "port: high"), "http_options.port"),
        (LOCAL.read_text().replace("path: embedded", "path: /no/model"), "no such folder: /no/model"),
        (LOCAL.read_text().replace("path: embedded", f"path: {LOCAL.parent}"), "no model_index.json"),
        (LOCAL.read_text().replace("profile:\n", "profile:\n        path: /no/file\n"), "/no/file"),
        (LOCAL.read_text().replace("device: cpu", "device: cuda"), "CUDA devices wanted"),
    ],
)
def test_serve_refuses_before_anything_starts(
    tmp_path: Path,
    text: str | None,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    assert main(["serve", "--config", str(file), "--port", port]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["serve", "--port", "0"],
        ["serve", "--port", "http"],
        ["generate"],
        ["generate", "x", "--size", "512"],
        ["generate", "x", "--size", "0x512"],
        ["generate", "x", "--slo", "-1"],
        ["generate", "x", "--slo", "nan"],
        ["generate", "x", "--guidance", "inf"],
        ["generate", "x", "--n", "two"],
        ["profile"],
    ],
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("out", ["picture.gif", "/no/such/folder/x.png"])
def test_generate_refuses_a_file_it_cannot_write(out: str) -> None:
    assert out in refused(run("generate", "x", "--out", out))


class Server(BaseHTTPRequestHandler):
    """Answers as the HTTP API does; `status` 200 makes pictures, up to a `failure`."""

    status = 200
    failure = ""
    changed: dict[str, Any] = {}  # noqa: RUF012
    seen: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append(body)
        file = io.BytesIO()
        Image.new("RGB", (64, 96)).save(file, body["output_format"])
        metrics = {
            "slo_s": 5.0,
            "slo_met": False,
            "seed": 3,
            "steps": [
                {"steps": 8, "degree": 1, "gpus": [0]},
                {"steps": 12, "degree": 2, "gpus": [0, 1]},
            ],
            "stage_durations": {"total": 5.5},
            "schedule": [
                {"kind": "denoise", "steps": 8, "gpus": [0], "start_s": 100.0, "end_s": 103.2, "others": 2},
                {"kind": "denoise", "steps": 12, "gpus": [0, 1], "start_s": 103.2, "end_s": 105.5}
                | {"others": 0},
            ],
            "lost": [],
            "predicted_s": 4.9,
            "arrival_s": 100.0,
            "planned_with": {"encode_s": 0.0, "step_s": {"1": 0.4, "2": 0.15}, "decode_s": 0.0},
        } | self.changed
        picture = {"b64_json": base64.b64encode(file.getvalue()).decode(), "size": "64x96"}
        events: list[dict[str, Any]] = []
        for index in reversed(range(body["n"])):
            far = {"picture": index, "steps": 20, "predicted_finish_s": None}
            events += [
                {"type": "image_generation.progress", "phase": "queue", "steps_done": 0, **far},
                {"type": "image_generation.partial_image", "steps_done": 8, **far, **picture},
                {
                    "type": "image_generation.completed",
                    "steps_done": 20,
                    "metrics": metrics,
                    **far,
                    **picture,
                },
            ]
        if self.failure:
            events[-1:] = [{"type": "error", "error": {"message": self.failure}}]
        data = ": a comment\n\n" + "".join(f"event: x\ndata: {json.dumps(event)}\n\n" for event in events)
        if self.status != 200:
            data = json.dumps({"error": {"message": "size: too large"}})
        self.send_response(self.status)
        self.send_header("content-type", "text/event-stream" if self.status == 200 else "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def http_server(
    status: int = 200, failure: str = "", **changed: Any
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    settings = {"status": status, "failure": failure, "changed": changed, "seen": []}
    handler = type("Handler", (Server,), settings)
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.seen  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "circle.jpg"
    with http_server() as (url, seen):
        options = ["--size", "64x96", "--steps", "20", "--seed", "3", "--slo", "5", "--guidance", "2"]
        assert main(["generate", "a circle", *options, "--out", str(out), "--url", url + "/"]) == 0
    assert seen == [
        {
            "prompt": "a circle",
            "size": "64x96",
            "n": 1,
            "num_inference_steps": 20,
            "seed": 3,
            "guidance_scale": 2,
            "slo_ms": 5000,
            "output_format": "jpeg",
            "stream": True,
            "progress": True,
            "partial_images": 0,
        }
    ]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{out}  64x96  seed 3  ")
    assert first.endswith("deadline 5 s missed")
    assert second == "  8 steps SP1 [0] -> 12 steps SP2 [0,1]"
    assert Image.open(out).format == "JPEG"


def test_generate_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.png"
    with http_server() as (url, _):
        assert main(["generate", "x", "--verbose", "--out", str(out), "--url", url]) == 0
    _, path, head, first, second, end = capsys.readouterr().out.splitlines()
    assert path.startswith("  8 steps SP1")
    assert head.split() == "start s seconds steps degree GPUs end s spare s why".split()
    assert first.split(maxsplit=7) == [
        *"0.000 3.200 8 1 0 8.000 -3.000".split(),
        "to the end at 1 would be 3 s late, at 2 in time; a wider range follows",
    ]
    assert second.split(maxsplit=7) == [
        *"3.200 2.300 12 2 0,1 5.000 +0.000".split(),
        "degree 2 is in time and costs the fewest GPU-seconds; took 0.5 s longer than planned",
    ]
    assert end == "  done after 5.500 s, 0.5 s behind the deadline; the first plan had it done after 4.900 s"


def test_generate_from_a_server_that_does_not_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.png"
    with http_server(planned_with={}) as (url, _):
        assert main(["generate", "x", "--verbose", "--out", str(out), "--url", url]) == 1
    assert "does not say what --verbose needs: 'step_s'" in capsys.readouterr().err
    assert out.exists()


def test_generate_several(tmp_path: Path) -> None:
    with http_server() as (url, _):
        assert main(["generate", "x", "--n", "2", "--out", str(tmp_path / "x.png"), "--url", url]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x-0.png", "x-1.png"]


def test_generate_writes_previews_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--out", str(tmp_path / "x.png"), "--preview", str(tmp_path / "soon.png")]
    with http_server(failure="out of memory") as (url, seen):
        assert main(["generate", "x", *files, "--url", url]) == 1
    assert seen[0]["partial_images"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["soon.png"]
    assert Image.open(tmp_path / "soon.png").size == (64, 96)
    assert capsys.readouterr().err == f"tetriserve: error: {url} gave up: out of memory\n"
    with http_server() as (url, _):
        assert main(["generate", "x", "--n", "2", *files, "--url", url]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {
        "x-0.png",
        "x-1.png",
        "soon-0.png",
        "soon-1.png",
        "soon.png",
    }
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == [
        str(tmp_path / f"x-{index}.png") for index in range(2)
    ]


def test_generate_refuses_a_preview_of_another_format() -> None:
    assert "--preview x.jpg" in refused(run("generate", "x", "--out", "x.png", "--preview", "x.jpg"))


def test_generate_says_what_the_server_said(capsys: pytest.CaptureFixture[str]) -> None:
    with http_server(400) as (url, _):
        assert main(["generate", "x", "--url", url]) == 1
    assert capsys.readouterr().err == f"tetriserve: error: {url} answered 400: size: too large\n"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://no host"])
def test_generate_without_a_server(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--url", url]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"tetriserve: error: no answer from {url}: ")
    assert err.count("\n") == 1


def test_serve_interrupted_while_it_starts_leaves_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    marker = {"TETRISERVE_TEST": port}
    command = [sys.executable, "-m", "tetriserve.cli", "serve", "--port", port]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **marker})
    assert process.stdout is not None
    assert process.stdout.readline() == "starting Ray ...\n"
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert process.stdout.read().endswith("stopping ...\n")
    assert processes_with(f"TETRISERVE_TEST={port}") == []


def test_serve_that_is_killed_leaves_nothing() -> None:
    """Ray's agents would outlive it by minutes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tetriserve.cli", "serve", "--port", port]
    env = {**os.environ, "TETRISERVE_TEST": port}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("starting 2 replicas"):
        assert process.poll() is None
    time.sleep(2)
    assert any("agent" in line.lower() for line in processes_with(f"TETRISERVE_TEST={port}"))
    process.kill()
    process.wait(10)
    end_s = time.monotonic() + 15
    while processes_with(f"TETRISERVE_TEST={port}"):
        assert time.monotonic() < end_s, processes_with(f"TETRISERVE_TEST={port}")
        time.sleep(0.2)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_orphans_that_lost_the_mark_are_found() -> None:
    """As agents that write their titles over their environment, and whose parent is dead before anybody looks."""
    mark = secrets.token_hex(8)
    script = "sh -c 'env -i sleep 300 & echo $!; wait' & echo $!; wait"
    server = subprocess.Popen(
        ["sh", "-c", script], stdout=subprocess.PIPE, text=True, env={guard.MARK: mark, **os.environ}
    )
    assert server.stdout is not None
    parent, child = sorted(int(server.stdout.readline()) for _ in range(2))
    watching = subprocess.Popen(
        [sys.executable, "-I", guard.__file__, mark, str(server.pid)], stdin=subprocess.PIPE
    )
    assert watching.stdin is not None
    time.sleep(3 * guard.LOOK_S)
    os.kill(parent, signal.SIGKILL)
    server.kill()
    time.sleep(0.1)
    assert alive(child)
    watching.stdin.close()
    assert watching.wait(30) == 0 and server.wait(1) == -signal.SIGKILL
    assert not alive(child) and not guard.marked(mark)


def alive(pid: int) -> bool:
    """Not gone, nor dead and not yet waited for."""
    with contextlib.suppress(OSError):
        return bool(Path(f"/proc/{pid}/cmdline").read_text())
    return False


def processes_with(variable: str) -> list[str]:
    """Command lines of the running processes that have this in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_text())
    return found


def test_one_line() -> None:
    assert one_line("") == ""
    assert one_line("Deployment 'Cell' waits\nfor resources") == "Deployment 'Cell' waits"
    trace = "A replica failed. Error:\nTraceback (most recent call last):\n  File x\n"
    assert one_line(trace + "tetriserve.errors.ConfigError: profile: too old\n") == "profile: too old"
    assert one_line(trace + "ValueError: bad\n  detail\n") == "ValueError: bad"
