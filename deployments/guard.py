"""Ends what a server leaves when it is killed: Ray's agents outlive Ray by minutes.

A process of its own that waits for the end of the server, which it sees by a pipe. It knows the server's processes by
a mark that all of them have in their environment, and by their descent, which it looks at while the server lives: who
gives itself a title, as Ray's agents do, may write it over the mark, and is an orphan as soon as Ray is dead.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

MARK = "TETRISERVE_SERVER"
ROUNDS, PAUSE_S = 5, 0.5
"""New ones may be on their way."""
LOOK_S, LOOK_LATER_S, START_S = 0.5, 10.0, 90.0
"""How often it looks who is there, while the server starts and from then on."""


_started: list[subprocess.Popen[bytes]] = []
"""To be kept: the pipe to a guard closes with it."""


def start_guard() -> None:
    """Mark this process's children to come, and have those that are left ended when it ends, where there is /proc."""
    os.environ[MARK] = secrets.token_hex(16)
    if Path("/proc/self/environ").exists():
        command = [sys.executable, "-I", __file__, os.environ[MARK], str(os.getpid())]
        # in a session of its own neither Ctrl-C nor the end of a process group reaches it
        _started.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
            )
        )


Process = tuple[int, int]
"""A pid and when it started, in clock ticks: pids come again."""


def processes() -> dict[Process, int]:
    """All that run, with their parents' pids."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):  # gone meanwhile
            # behind its name, which may hold anything: state, parent, and as the 20th when it started
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            found[int(folder.name), int(fields[19])] = int(fields[1])
    return found


def descendants(pids: set[int]) -> set[Process]:
    """Of these processes, themselves left out."""
    running, family = processes(), set(pids)
    while children := {pid for (pid, _), parent in running.items() if parent in family} - family:
        family |= children
    return {process for process in running if process[0] in family - pids}


def marked(mark: str) -> set[int]:
    """Other processes that have the mark."""
    found, wanted = set(), f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, or not ours to see
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
    return found - {os.getpid()}


def left_behind(mark: str, known: set[Process]) -> set[int]:
    """Of those that are known, marked, or descend from one that is, the ones that run."""
    family = marked(mark) | {pid for pid, _ in known & set(processes())}
    return (family | {pid for pid, _ in descendants(family)}) - {os.getpid()}


def main() -> None:
    mark, server = sys.argv[1], int(sys.argv[2])
    known: set[Process] = set()
    began_s = time.monotonic()
    while True:
        is_new = time.monotonic() - began_s < START_S
        ended, _, _ = select.select([sys.stdin], [], [], LOOK_S if is_new else LOOK_LATER_S)
        if ended:
            break
        known = known & set(processes()) | descendants({server})
    for _ in range(ROUNDS):
        for pid in left_behind(mark, known):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
