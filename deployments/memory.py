"""Whether processes of this server were ended for lack of host memory: Ray only tells that they died."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

RECENT_S = 600.0
GROUPS = Path("/sys/fs/cgroup")
OURS = Path("/proc/self/cgroup")
"""The control group of this process, which a container is."""


class HostMemory:
    """Watches the kernel's count of processes that it ended for lack of memory, in this process's control group and
    those inside it, or, where there is none, on the whole machine."""

    def __init__(self) -> None:
        self._killed = _killed()
        self._recent = 0
        self._noticed_s = 0.0

    def shortage(self) -> str:
        """To be put behind a failure that memory may be the cause of; empty when nothing was killed of late."""
        killed, now_s = _killed(), time.monotonic()
        if killed > self._killed:
            self._recent += killed - self._killed
            self._killed, self._noticed_s = killed, now_s
        if not self._recent or now_s - self._noticed_s > RECENT_S:
            self._recent = 0
            return ""
        limit = _limit_bytes()
        of = "" if limit is None else f" of {limit / 2**30:.1f} GiB"
        what = "a process" if self._recent == 1 else f"{self._recent} processes"
        return f"; likely for lack of host memory{of}: the kernel ended {what} for it"


def _folders() -> list[Path]:
    """Of this process's control group for memory, and those that it is in, version 2 or 1."""
    with contextlib.suppress(OSError):
        for line in OURS.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root = GROUPS / controllers
                # inside a container its own group is the root
                folder = next(
                    (f for f in (root / path.lstrip("/"), root) if _count_file(f) is not None), None
                )
                if folder is not None:
                    return [folder, *(up for up in folder.parents if up.is_relative_to(root))]
    return []


def _count_file(folder: Path) -> Path | None:
    files = (folder / "memory.events", folder / "memory.oom_control")
    return next((file for file in files if file.is_file()), None)


def _killed() -> int:
    folders = _folders()
    file = _count_file(folders[0]) if folders else Path("/proc/vmstat")
    with contextlib.suppress(OSError):
        if file is not None and (
            found := re.search(r"^oom_kill (\d+)", file.read_text(encoding="utf-8"), re.M)
        ):
            return int(found[1])
    return 0


def _limit_bytes() -> int | None:
    limits = []
    for folder in _folders():
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # "max": none
                limits.append(int((folder / name).read_text(encoding="utf-8")))
    limit = min(limits, default=1 << 62)
    return limit if limit < 1 << 60 else None
