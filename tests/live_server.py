"""A live server for the tests: `tetriserve serve` in a process of its own, and how to talk to it."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import yaml
from model_folders import tiny_flux
from PIL import Image

SHAPES = ("256x256", "512x512", "1024x1024")
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`tetriserve serve` on a config; knows its URL and its processes.

    Args:
        before: a command that runs it.
        env: added to the environment.
    """

    def __init__(
        self,
        config: Path,
        *,
        before: Sequence[str] = (),
        cwd: Path | None = None,
        env: Mapping[str, str] = {},
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        serve = [str(BIN / "tetriserve"), "serve", "--config", str(config), "--port", str(port)]
        self._command = [*before, *serve]
        self.env = {**os.environ, **env}
        self._where: dict[str, Any] = {"cwd": cwd, "env": self.env}
        self.start()

    def start(self) -> None:
        """Also after `stop`: on the same port."""
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **self._where
        )
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if "tetriserve is ready at" in line:
                return
        raise AssertionError("\n".join(self.lines))

    def replicas(self) -> list[psutil.Process]:
        return self._processes("ray::GPUReplica")

    def scheduler(self) -> psutil.Process:
        (found,) = self._processes("ray::Scheduler")
        return found

    def ingresses(self) -> list[psutil.Process]:
        return self._processes("ray::ServeReplica:tetriserve:Ingress")

    def _processes(self, title: str) -> list[psutil.Process]:
        """Living ones; the dead have no command line any more."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def health(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/health", timeout=10).json()

    def stop(self) -> None:
        """Ctrl-C; nothing of it may be left."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(timeout=60) == 0
        _, alive = psutil.wait_procs(family, timeout=15)
        assert alive == [], f"left running: {alive}"


def write_config(
    root: Path,
    profile: dict[str, Any] | None = None,
    ingresses: int = 1,
    logging: dict[str, Any] | None = None,
    **cell: Any,
) -> Path:
    """A cluster config in `root`: two CPU replicas of a tiny FLUX; `cell` adds to its `cell` section.

    `profile` takes the place of what the server would measure, `logging` is Serve's `logging_config`.
    """
    args: dict[str, Any] = {
        "model": {
            "path": str(tiny_flux(root / "tiny-flux")),
            "dtype": "float32",
            "max_sequence_length": 30,
            "max_pixels": 1024 * 1024,
            "max_steps": 50,
        },
        "cell": {
            "gpus": 2,
            "device": "cpu",
            "cpus_per_replica": 0.75,
            "scheduler_cpus": 0.25,
            "step_timeout_floor_s": 5,
            **cell,
        },
        "scheduler": {"max_open_requests": 64},
        "http": {"replicas": ingresses},
        "profile": {"shapes": list(SHAPES), "cache_dir": str(root / "profiles"), "repeats": 1},
    }
    if profile is not None:
        args["profile"] |= {"path": str(root / "profile.yaml"), "correct": False}
        (root / "profile.yaml").write_text(yaml.safe_dump(profile))
    application: dict[str, Any] = {
        "name": "tetriserve",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": args,
    }
    if logging is not None:
        application["logging_config"] = logging
    path = root / "test.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return path


def body(size: str, seed: int, **more: Any) -> dict[str, Any]:
    return {
        "prompt": f"a small red circle and a large blue star, number {seed}",
        "size": size,
        "seed": seed,
        "num_inference_steps": 6,
        **more,
    }


def pixels(item: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.2)
