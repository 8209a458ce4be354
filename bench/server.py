"""A server for the length of a benchmark, and the step times of the machine it runs on."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


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


def measured_profile(config: Path, folder: Path) -> Path:
    """This machine's step times for the model of a config, by `tetriserve profile`, as a file in `folder`."""
    out = folder / "profile.yaml"
    tetriserve = str(Path(sys.executable).parent / "tetriserve")
    subprocess.run([tetriserve, "profile", "--config", str(config), "--out", str(out)], check=True)
    return out
