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
from tetriserve.trace import TraceRequest
from tetriserve.workload import SloRule, Workload, parse_shapes

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
    command = [str(Path(sys.executable).parent / "tetriserve"), "serve", "--config", str(config)]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--policy", policy], stdout=subprocess.PIPE, text=True
    )
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
        profile_file = profile_file or measured_profile(Path(folder))
        args["profile"]["path"] = str(profile_file.resolve())
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        yield Setup(path, args, Profile.load(profile_file))


def measured_profile(folder: Path) -> Path:
    """This machine's step times, by `tetriserve profile`, as a file in `folder`."""
    out = folder / "profile.yaml"
    tetriserve = str(Path(sys.executable).parent / "tetriserve")
    subprocess.run([tetriserve, "profile", "--config", str(CONFIG), "--out", str(out)], check=True)
    return out
