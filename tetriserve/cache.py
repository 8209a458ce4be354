"""Where tetriserve keeps what it can make again: profiles, and checkpoints of training."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`~/.cache/tetriserve/NAME`, or the same under `XDG_CACHE_HOME`; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tetriserve" / name
