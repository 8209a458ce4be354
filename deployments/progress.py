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
    """What the cell with that folder does now, or what befell it; made one line."""
    with (folder / "progress").open("a", encoding="utf-8") as file:
        file.write(" ".join(text.split()) + "\n")


def notes() -> list[str]:
    """What was noted in this Ray session, oldest first within a cell."""
    files = sorted(session_folder().glob("*/progress"), key=lambda path: path.stat().st_mtime)
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
