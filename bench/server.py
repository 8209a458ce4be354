"""A server for the length of a benchmark, and the step times of the machine it runs on."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tetriserve.profile import Profile
from tetriserve.simulation.trace import TraceRequest
from tetriserve.simulation.workload import SloRule, Workload, parse_shapes

TETRISERVE = [sys.executable, "-m", "tetriserve.cli"]
"""The command line; where the package is not installed there is no script for it."""

CONFIG = Path("cluster_configs/cpu_local.yaml")
MIX = "256x256=4,512x512=3,1024x1024=1"
"""Shapes with their weights."""


class RunningServer(NamedTuple):
    url: str
    pid: int


@contextmanager
def running_server(config: Path, policy: str) -> Iterator[RunningServer]:
    """`tetriserve serve` with a config and a policy on a free port; stops it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*TETRISERVE, "serve", "--config", str(config), "--port", str(port), "--policy", policy]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if not any("tetriserve is ready" in line for line in process.stdout):
            raise RuntimeError(f"the server did not start with {config}")
        yield RunningServer(f"http://127.0.0.1:{port}", process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


@dataclass(frozen=True)
class Setup:
    """A server to be started on this machine: its config file with the `args` in it, and the step times in use."""

    config: Path
    args: dict[str, Any]
    profile: Profile

    @property
    def n_gpus(self) -> int:
        return int(self.args["cell"]["gpus"])

    def mixed_trace(
        self, per_min: float, requests: int, *, shapes: str, slo: str, steps: int, seed: int = 0
    ) -> list[TraceRequest]:
        """Poisson arrivals of weighted shapes with deadlines by this machine's step times."""
        return Workload(
            "uniform",
            per_min,
            requests,
            shapes=parse_shapes(shapes),
            slo=SloRule.parse(slo),
            steps=steps,
            seed=seed,
            profile=self.profile,
            n_gpus=self.n_gpus,
        ).generate()


@contextmanager
def local_setup(profile_file: Path | None = None, **cell: float) -> Iterator[Setup]:
    """`CONFIG` with the given step times, measured first by default; `cell` changes its `cell` section."""
    config = yaml.safe_load(CONFIG.read_text())
    args = config["applications"][0]["args"]
    args["cell"] |= cell
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        profile_file = profile_file or measured_profile(path)
        args["profile"]["path"] = str(profile_file.resolve())
        path.write_text(yaml.safe_dump(config))
        yield Setup(path, args, Profile.load(profile_file))


def measured_profile(config: Path) -> Path:
    """This machine's step times for a config, by `tetriserve profile`, as a file beside it."""
    out = config.with_name("profile.yaml")
    subprocess.run([*TETRISERVE, "profile", "--config", str(config), "--out", str(out)], check=True)
    return out
