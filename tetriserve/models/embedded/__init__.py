"""The embedded models: trained FLUX pipelines small enough for CPU cores, which draw coloured shapes.

Their folders are part of the package, so nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

EMBEDDED = {"embedded": "flux-shapes", "embedded-light": "flux-shapes-light"}
"""Folders by the name that stands for them in `model.path`; the light one has about a quarter of the compute."""

DESCRIPTION = 'draws one or two shapes: "a small red circle above a large blue square on a white background"'


def embedded_folder(name: str = "embedded") -> Path:
    """The folder of an embedded model."""
    return Path(__file__).parent / EMBEDDED[name]
