"""Where tetriserve keeps what it can make again: profiles, and checkpoints of training."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`~/.cache/tetriserve/NAME`, or the same under `XDG_CACHE_HOME`, or in the temporary folder for whoever has no
    home; it need not exist yet."""
    if "XDG_CACHE_HOME" in os.environ:
        cache = Path(os.environ["XDG_CACHE_HOME"])
    else:
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:
            cache = Path(tempfile.gettempdir())
    return cache / "tetriserve" / name
