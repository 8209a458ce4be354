"""It starts wherever its user may run a process, and finishes what runs when it is stopped."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from live_server import BIN, Server, body, free_port, write_config

PROXY = "http://127.0.0.1:9"
HOSTILE = {
    **dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "grpc_proxy"), PROXY),
    "SSL_CERT_FILE": "/nowhere",
    "HOME": "/nowhere/home",
    "XDG_CACHE_HOME": "/dev/null",
    "LC_ALL": "C",
    "PYTHONWARNINGS": "error",
    "PYTHONUTF8": "0",
    "RAY_ADDRESS": "192.0.2.1:6379",
}
"""Nothing of this concerns a server that talks to its own machine."""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server started without CAP_SYS_NICE, in a folder that has modules of the same names as those that it needs,
    by a relative path."""
    config = write_config(tmp_path_factory.mktemp("hostile"), logging={"log_level": "DEBUG"})
    folder = config.parent / "a folder of the user"
    folder.mkdir()
    for name in ("numpy", "yaml", "random", "token"):
        (folder / f"{name}.py").write_text("raise RuntimeError('not yours')")
    for name in ("deployments", "solver", "ray"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('not yours')")
    text = config.read_text().replace(str(config.parent), "..")
    assert "../tiny-flux" in text
    config.write_text(text)
    no_nice = ["setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice"]
    may_drop = (
        shutil.which("setpriv") and subprocess.run([*no_nice, "true"], capture_output=True).returncode == 0
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as for_ray:
        env = {**HOSTILE, "RAY_TMPDIR": for_ray}
        yield Server(Path("..") / config.name, before=no_nice if may_drop else [], cwd=folder, env=env)


def post(server: Server, **more: object) -> httpx.Response:
    asked = body("256x256", 1, **more)
    return httpx.post(f"{server.url}/v1/images/generations", json=asked, timeout=60, trust_env=False)


def test_what_is_of_no_concern_stops_nothing(hostile: Server, tmp_path: Path) -> None:
    assert len(hostile.replicas()) == 2
    out = tmp_path / "picture.png"
    command = [
        str(BIN / "tetriserve"),
        "generate",
        "x",
        "--size",
        "256x256",
        "--steps",
        "2",
        "--url",
        hostile.url,
    ]
    said = subprocess.run(
        [*command, "--out", str(out)], env=HOSTILE, capture_output=True, text=True, timeout=60
    )
    assert (said.returncode, out.exists()) == (0, True), said.stderr


def test_nothing_that_a_client_sent_is_in_a_log(hostile: Server) -> None:
    """At the most talkative level; one prompt is longer than the encoders read, of which libraries warn."""
    code = "Xylograph"
    key = {"Authorization": f"Bearer {code}-key", "Idempotency-Key": f"{code}-key", "User-Agent": code}
    long = " ".join(["a small red circle"] * 30) + f" {code}"
    odd = [
        {"prompt": long},
        {"prompt": long, "negative_prompt": f"{code} {long}", "true_cfg_scale": 3.0},
        {"prompt": long, "stream": True, "partial_images": 1},
        {"prompt": [code]},
        {"prompt": code, "size": code},
        {"prompt": code, code: code, "user": code, "extra_args": {code: code}},
        {"prompt": code, "seed": code, "model": code},
        {"prompt": f"{code}\0\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"), "n": 99},
    ]
    with httpx.Client(base_url=hostile.url, timeout=60, trust_env=False) as client:
        for number, asked in enumerate(odd):
            headers = {**key, "Idempotency-Key": f"{code}-{number}"}
            small = {"size": "256x256", "num_inference_steps": 1}
            client.post("/v1/images/generations", json={**small, **asked}, headers=headers)
        client.post("/v1/images/generations", content=f'{{"prompt": "{code}'.encode(), headers=key)
        client.delete("/v1/images/generations", headers=key)
        client.get(f"/v1/models/{code}?{code}={code}", headers=key)
    session = next(Path(hostile.env["RAY_TMPDIR"]).glob("**/logs"))
    files = [file for file in session.rglob("*") if file.is_file()]
    assert any("GPUReplica" in file.name for file in files)
    telling = [file for file in files if code.lower() in file.read_text(errors="replace").lower()]
    assert {file.name: lines_with(file, code) for file in telling} == {}


def lines_with(file: Path, code: str) -> list[str]:
    return [line for line in file.read_text(errors="replace").splitlines() if code.lower() in line.lower()][
        :3
    ]


def test_what_runs_is_finished_before_it_stops(hostile: Server) -> None:
    """The last test of this server."""
    family = psutil.Process(hostile.process.pid).children(recursive=True)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(post, hostile, num_inference_steps=50)
        while not hostile.health()["cells"][0]["running"]:
            time.sleep(0.05)
        hostile.process.send_signal(signal.SIGHUP)
        while hostile.health()["status"] == "ready":
            time.sleep(0.05)
        refused = post(hostile)
        assert (refused.status_code, refused.json()["error"]["message"]) == (
            503,
            "the server is shutting down",
        )
        assert int(refused.headers["Retry-After"]) > 0
        assert not running.done()
        assert running.result(60).status_code == 200
    assert hostile.process.wait(60) == 0
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [("RAY_TMPDIR", "/dev/null/x"), ("TMPDIR", f"/tmp/{'x' * 95}"), ("RAY_TMPDIR", "/proc/x")],
)
def test_what_stops_it_is_named_in_one_line(variable: str, value: str) -> None:
    command = [sys.executable, "-m", "tetriserve.cli", "serve", "--port", str(free_port())]
    said = subprocess.run(command, env={variable: value}, capture_output=True, text=True, timeout=60)
    assert said.returncode == 1
    assert said.stderr.startswith("tetriserve: error: Ray does not start: ") and said.stderr.count("\n") == 1
    assert f"{variable}={value}" in said.stderr
