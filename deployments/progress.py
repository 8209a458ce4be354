"""What a starting cell is busy with, for whoever waits for it on the same machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray


def session_folder() -> Path:
    """Of Ray's session: on this node, as all of a cell is, and removed with the session's logs."""
    node: Any = ray._private.worker._global_node
    return Path(node.get_session_dir_path()) / "tetriserve"


def note(folder: Path, text: str) -> None:
    """What the cell with that folder does now, one line."""
    (folder / "progress").write_text(text)


def latest() -> str:
    """What was noted last in this Ray session; empty when nothing was."""
    notes = sorted(session_folder().glob("*/progress"), key=lambda path: path.stat().st_mtime)
    return notes[-1].read_text() if notes else ""
