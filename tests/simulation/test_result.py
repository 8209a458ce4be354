"""Results of live runs: what several requests report of steps that they shared."""

from __future__ import annotations

from tetriserve.simulation.result import Executed, shared_once


def test_a_shared_range_is_there_once() -> None:
    mine = Executed(1.0, 2.0, (0, 1), ("a",), 3, "denoise", "m/transformer")
    theirs = Executed(1.0, 2.0, (0, 1), ("b",), 3, "denoise", "m/transformer")
    beside = Executed(0.5, 2.0, (2,), ("c",), 3, "denoise", "m/transformer")
    later = Executed(2.0, 3.0, (0, 1), ("a",), 3, "denoise", "m/transformer")
    joined = Executed(1.0, 2.0, (0, 1), ("a", "b"), 3, "denoise", "m/transformer")
    assert shared_once([mine, later, theirs, beside]) == [beside, joined, later]
