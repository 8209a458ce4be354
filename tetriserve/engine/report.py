"""What an engine says of an assignment; free of torch, so that the scheduler can read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class GivenUp(RuntimeError):
    """A range could not go on for something that happened elsewhere: another member failed, or the range before."""


@dataclass(frozen=True)
class Report:
    """When an assignment ran on one GPU (Unix seconds) and what it took.

    Attributes:
        switch_s: from the start to the first step: installing handed-over state and choosing the group.
        peak_memory_bytes: of the device since the last report, 0 on CPU.
        previews: by request of the range, uint8 [height / 8, width / 8, 3] of its picture, from the leader where it
            passed a mark; made after `ended_s`.
        failures: by request, why it cannot go on though the others can; "" where it can.
        truncated: of encode: fields of the request whose ends no text encoder saw.
    """

    started_s: float
    ended_s: float
    switch_s: float
    peak_memory_bytes: int
    previews: tuple[np.ndarray | None, ...] = (None,)
    failures: tuple[str, ...] = ("",)
    truncated: tuple[str, ...] = ()


def together(reports: Sequence[Report]) -> tuple[float, float]:
    """(start, end) of the time in which all members of a range were in it: the first ones wait for the others."""
    return max(report.started_s for report in reports), min(report.ended_s for report in reports)


def seconds_per_step(reports: Sequence[Report], steps: int) -> float:
    """Of a denoising range."""
    start_s, end_s = together(reports)
    return (end_s - start_s - max(report.switch_s for report in reports)) / steps
