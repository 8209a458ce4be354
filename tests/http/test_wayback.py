"""What the edge expects an answer to take, from what others took."""

from __future__ import annotations

from deployments.wayback import KEPT, WayBack


def test_it_says_what_was_measured_and_scales_up_only() -> None:
    way_back = WayBack()
    assert way_back.predict("png", 512 * 512) == 0
    way_back.note("png", 512 * 512, 9.0)  # with what is loaded once
    way_back.note("png", 512 * 512, 0.1)
    assert way_back.predict("png", 512 * 512) == 0.1
    assert way_back.predict("png", 1024 * 1024) == 0.4
    assert way_back.predict("png", 256 * 256) == 0.1  # the hops are the same
    assert way_back.predict("jpeg", 512 * 512) == 0  # another kind of file


def test_it_forgets_and_does_not_follow_the_rare_one() -> None:
    way_back = WayBack()
    for _ in range(KEPT):
        way_back.note("", 100, 0.5)
    for seconds in [0.1] * (KEPT - 2) + [7.0, -0.2]:  # clocks of two nodes may differ
        way_back.note("", 100, seconds)
    assert way_back.predict("", 100) == 0.1
