"""Processes that the kernel ended for lack of memory are named as the likely reason."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deployments import memory
from deployments.memory import HostMemory

VERSION_1 = (
    "4:memory:{group}\n0::/elsewhere\n",
    "memory",
    "memory.oom_control",
    "memory.limit_in_bytes",
    str(1 << 63),
)
VERSION_2 = ("0::{group}\n", "", "memory.events", "memory.max", "max")


@pytest.fixture(
    params=[(VERSION_1, "/box/inner"), (VERSION_2, "/box/inner"), (VERSION_2, "/not/seen/from/inside")]
)
def kill(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], None]:
    """A control group, in which so many have been killed by now, in one of 2 GiB; in a container it is the root."""
    (ours, hierarchy, events, limit, none), group = request.param
    root = tmp_path / "cgroup" / hierarchy
    inner = root / group.lstrip("/") if "box" in group else root
    inner.mkdir(parents=True)
    for folder in {inner, inner.parent, root} if "box" in group else {root}:
        (folder / limit).write_text(none)
    (inner.parent if "box" in group else root).joinpath(limit).write_text(str(2 << 30))
    (tmp_path / "ours").write_text(ours.format(group=group))
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OURS", tmp_path / "ours")

    def killed(n: int) -> None:
        (inner / events).write_text(f"low 0\noom 9\noom_kill {n}\nunder_oom 0\n")

    killed(3)
    return killed


def test_who_was_killed_since_is_counted(kill: Callable[[int], None]) -> None:
    host = HostMemory()
    assert host.shortage() == ""
    kill(4)
    assert host.shortage() == "; likely for lack of host memory of 2.0 GiB: the kernel ended a process for it"
    kill(6)
    assert "ended 3 processes" in host.shortage()
    assert "ended 3 processes" in host.shortage()


def test_what_was_long_ago_is_no_reason(kill: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostMemory()
    kill(4)
    assert host.shortage()
    monkeypatch.setattr(memory, "RECENT_S", -1.0)
    assert host.shortage() == ""
    kill(5)
    monkeypatch.setattr(memory, "RECENT_S", 600.0)
    assert "ended a process" in host.shortage()


def test_a_real_kill_is_seen() -> None:
    """Where this process may make control groups."""
    (folder, *_) = memory._folders() or [Path("/nowhere")]
    group = folder / f"tetriserve-test-{os.getpid()}"
    limit = group / ("memory.max" if (folder / "memory.max").exists() else "memory.limit_in_bytes")
    try:
        group.mkdir()
        limit.write_text(str(100 << 20))
    except OSError:
        pytest.skip("may not make control groups")
    program = f"""
import pathlib, subprocess, sys
pathlib.Path({str(group / "cgroup.procs")!r}).write_text(str(__import__("os").getpid()))
from deployments.memory import HostMemory
host = HostMemory()
ended = subprocess.run([sys.executable, "-c", "x = bytearray(400 << 20); print(len(x))"])
print(ended.returncode, host.shortage())
"""
    try:
        said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    finally:
        group.rmdir()
    assert said.stdout.startswith("-9 ; likely for lack of host memory of 0.1 GiB"), said
