"""What an engine says of an assignment; free of torch, so that the scheduler can read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """When an assignment ran on one GPU (Unix seconds) and what it took.

    Attributes:
        switch_s: from the start to the first step: installing handed-over state and choosing the group.
        peak_memory_bytes: of the device since the last report, 0 on CPU.
    """

    started_s: float
    ended_s: float
    switch_s: float
    peak_memory_bytes: int
