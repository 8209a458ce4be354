"""Step times follow what is measured, and single outliers move nothing."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
from http_app import PROFILE, Cell, ask, ingress, listening
from hypothesis import given
from hypothesis import strategies as st

from tetriserve.cli import main
from tetriserve.profile import Profile
from tetriserve.request import Shape
from tetriserve.scheduler.live_profile import FEWEST, MAX_PAIRS, WINDOW, LiveProfile

near = functools.partial(pytest.approx, rel=0.0101)  # to the next point of the grid

SMALL, LARGE, MIDDLE = Shape(256, 256), Shape(1024, 1024), Shape(512, 512)
BASE = Profile(
    "m", "d", "made up", (1, 2), {SMALL: {1: 0.1, 2: 0.08}, LARGE: {1: 2.0, 2: 1.2}}, {SMALL: 0.01}, {}
)


def feed(live: LiveProfile, shape: Shape, degree: int, *seconds: float, cost: float = 1.0) -> None:
    for step_s in seconds:
        live.measured([shape], degree, step_s, cost)


def test_a_few_ranges_say_nothing_yet() -> None:
    live = LiveProfile(BASE)
    feed(live, SMALL, 1, *[0.2] * (FEWEST - 1))
    assert live.step_s(SMALL) == BASE.step_s(SMALL)
    feed(live, SMALL, 1, 0.2)
    assert live.step_s(SMALL) == near({1: 0.2, 2: 0.08})
    assert live.step_s(LARGE) == BASE.step_s(LARGE)


def test_guidance_costs_are_taken_out() -> None:
    live = LiveProfile(BASE)
    feed(live, LARGE, 2, *[3.6] * FEWEST, cost=2.0)
    assert live.ratio(LARGE, 2) == near(1.5)


@given(
    outliers=st.lists(st.floats(1e-6, 1e6), max_size=WINDOW // 2),
    usual=st.floats(0.05, 0.2),
    seed=st.randoms(use_true_random=False),
)
def test_less_than_half_of_the_ranges_cannot_move_it(outliers: list[float], usual: float, seed) -> None:
    live = LiveProfile(BASE)
    mixed = outliers + [usual] * (WINDOW - len(outliers))
    seed.shuffle(mixed)
    feed(live, SMALL, 1, *mixed)
    assert live.step_s(SMALL)[1] == near(usual)


def test_what_is_long_gone_is_forgotten() -> None:
    live = LiveProfile(BASE)
    feed(live, SMALL, 1, *[9.0] * WINDOW, *[0.3] * WINDOW)
    assert live.step_s(SMALL)[1] == near(0.3)
    for side in range(16, 16 * 2 * MAX_PAIRS, 16):
        feed(live, Shape(side, 16), 1, *[1.0] * FEWEST)
    assert live.step_s(SMALL) == BASE.step_s(SMALL)
    assert len(live.corrected().step_seconds) <= MAX_PAIRS + 2


def test_it_can_be_told_not_to_follow_and_still_knows() -> None:
    live = LiveProfile(BASE, follows=False)
    feed(live, SMALL, 1, *[0.2] * WINDOW)
    assert live.step_s(SMALL) == BASE.step_s(SMALL)
    assert live.corrected().step_s(SMALL) == near({1: 0.2, 2: 0.08})


def test_the_corrected_profile_is_a_profile(tmp_path: Path) -> None:
    """Other shapes are in it too, at every degree: an unlisted degree would be one that is never used."""
    live = LiveProfile(BASE)
    feed(live, MIDDLE, 2, *[0.5] * FEWEST)
    feed(live, LARGE, 1, *[1.0] * FEWEST)
    (tmp_path / "p.yaml").write_text(live.corrected().to_yaml())
    read = Profile.load(tmp_path / "p.yaml")
    assert read.step_s(LARGE) == near({1: 1.0, 2: 1.2})
    assert read.step_s(MIDDLE) == near({1: BASE.step_s(MIDDLE)[1], 2: 0.5})
    assert read.encode_seconds == BASE.encode_seconds
    assert "10 step ranges" in read.source


def test_shared_steps_have_a_ratio_of_their_own() -> None:
    """Before it is known they follow the steps of requests alone."""
    batches = replace(
        BASE, batch_floor_seconds={1: 0.1}, batch_step_seconds={SMALL: {1: 0.04}, LARGE: {1: 2.0}}
    )
    live = LiveProfile(batches)
    feed(live, SMALL, 1, *[0.2] * FEWEST)
    assert live.shared(SMALL)[1].add_s == pytest.approx(0.08, rel=0.01)
    for _ in range(FEWEST):  # 0.12 by the law
        live.measured([SMALL] * 3, 1, 0.18)
    assert live.ratio(SMALL, 1, shared=True) == near(1.5)
    assert live.shared(SMALL)[1].add_s == pytest.approx(0.06, rel=0.01)
    assert live.step_s(SMALL)[1] == near(0.2)
    live.measured([SMALL, LARGE], 2, 1.0)  # of a degree that is not shared
    assert live.ratio(SMALL, 2, shared=True) == 1.0
    assert LiveProfile(BASE).shared(SMALL) == {}


def test_odd_measurements_are_ignored() -> None:
    live = LiveProfile(BASE)
    feed(live, SMALL, 1, *[0.0] * WINDOW)  # a clock that stood still
    feed(live, SMALL, 7, *[1.0] * WINDOW)  # a degree that the profile has not
    assert live.corrected().step_seconds == BASE.step_seconds


def test_from_live(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(Cell(), "GET", "/v1/profile").json()["step_seconds"] == {"256x256": {"1": 0.25, "2": 0.15}}
    out = tmp_path / "live.yaml"
    with listening(ingress(Cell())) as url:
        assert main(["profile", "--from-live", url, "--out", str(out)]) == 0
        assert Profile.load(out) == PROFILE
        nowhere = str(tmp_path / "no" / "live.yaml")
        assert main(["profile", "--from-live", url, "--out", nowhere]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["profile", "--from-live", url, "--out", str(out)]) == 1
    assert url in capsys.readouterr().err
