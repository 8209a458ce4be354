"""Ends what a server leaves when it is killed: Ray's agents outlive Ray by minutes.

A process of its own that waits for the end of the server, which it sees by a pipe, and then looks for the mark that
all of the server's processes have in their environment, and for their children: who gives itself a title, as Ray's
agents do, may write it over the mark.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

MARK = "TETRISERVE_SERVER"
ROUNDS, PAUSE_S = 5, 0.5
"""New ones may be on their way."""


_started: list[subprocess.Popen[bytes]] = []
"""To be kept: the pipe to a guard closes with it."""


def start_guard() -> None:
    """Mark this process's children to come, and have those that are left ended when it ends, where there is /proc."""
    os.environ[MARK] = secrets.token_hex(16)
    if Path("/proc/self/environ").exists():
        command = [sys.executable, "-I", __file__, os.environ[MARK]]
        # in a session of its own neither Ctrl-C nor the end of a process group reaches it
        _started.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
            )
        )


def left_behind(mark: str) -> set[int]:
    """Other processes that have the mark, and all that descend from them."""
    found, parents, wanted = set(), {}, f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, or not ours to see
            # after its name, which may hold anything: state, parent
            parents[int(folder.name)] = int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1])
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
    while children := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= children
    return found - {os.getpid()}


def main() -> None:
    sys.stdin.buffer.read()  # until the server is gone
    for _ in range(ROUNDS):
        for pid in left_behind(sys.argv[1]):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
