"""The examples, as they are, against a live server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Server, write_config
from PIL import Image

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(write_config(tmp_path_factory.mktemp("examples")))
    yield server
    server.stop()


def run(name: str, *arguments: str, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_openai_client(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "circle.png"
    base = {"OPENAI_BASE_URL": f"{server.url}/v1"}
    said = run(
        "openai_client.py", "a red circle", "--size", "256x320", "--slo", "60", "--out", str(out), **base
    )
    assert "deadline met" in said and "steps at SP" in said
    assert Image.open(out).size == (256, 320)


def test_ray_app(server: Server) -> None:
    lines = run("ray_app.py").splitlines()
    assert [line.split(":")[0] for line in lines] == ["256x256", "512x512", "1024x1024"]
    assert all("deadline" in line for line in lines)


def test_batch_job(server: Server, tmp_path: Path) -> None:
    """Cut off by its own deadline, then finished by a second run that makes only what is missing."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "pictures"
    prompts.write_text("a red circle\n\na blue ring\na green cross\n")
    job = [str(prompts), "--out", str(out), "--url", server.url, "--size", "256x256"]
    said = run("batch_job.py", *job, "--until", "0.01", code=1)
    assert said.splitlines()[-1] == f"0 of 3 pictures in {out}"
    assert {line.split()[0] for line in said.splitlines()[:-1]} == {"0000", "0001", "0002"}
    out.mkdir(exist_ok=True)
    (out / "0001.png").write_bytes(b"made before")
    assert run("batch_job.py", *job, "--until", "120") == f"3 of 3 pictures in {out}\n"
    assert (out / "0001.png").read_bytes() == b"made before"
    assert {Image.open(out / f"000{number}.png").size for number in (0, 2)} == {(256, 256)}
