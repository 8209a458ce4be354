"""The profile contract: reading, writing, interpolation, clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetriserve.errors import ConfigError
from tetriserve.profile import Profile
from tetriserve.request import Shape

PROFILE = Profile(
    model="FLUX.1-dev",
    device="H100",
    source="test",
    degrees=(1, 2),
    step_seconds={
        Shape(256, 256): {1: 0.02, 2: 0.03},
        Shape(512, 512): {1: 0.04, 2: 0.035},
        Shape(1024, 1024): {1: 0.16, 2: 0.1},
    },
    encode_seconds={Shape(512, 512): 0.05},
    decode_seconds={Shape(256, 256): 0.01, Shape(1024, 1024): 0.16},
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(PROFILE.to_yaml())
    assert Profile.load(path) == PROFILE


def test_listed_shapes_are_exact_and_others_lie_between_their_neighbours() -> None:
    assert PROFILE.step_s(Shape(512, 512)) == {1: 0.04, 2: 0.035}
    between = PROFILE.step_s(Shape(512, 1024))
    assert 0.04 < between[1] < 0.16 and 0.035 < between[2] < 0.1
    assert between[1] == pytest.approx(
        0.08
    )  # a straight line in log-log: four times the time at four times the size
    assert PROFILE.step_s(Shape(64, 64))[1] == 0.02  # bound by launches below the table
    assert PROFILE.step_s(Shape(2048, 2048))[1] == pytest.approx(0.64)  # the last slope goes on
    assert PROFILE.decode_s(Shape(512, 512)) == pytest.approx(0.04)
    assert PROFILE.encode_s(Shape(256, 256)) == 0.05


@given(st.integers(64, 4096), st.integers(64, 4096))
def test_interpolation_grows_with_size(height: int, width: int) -> None:
    here = PROFILE.step_s(Shape(height, width))
    larger = PROFILE.step_s(Shape(height + 64, width))
    assert all(0 < here[degree] <= larger[degree] for degree in (1, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "not YAML"),
        ("just text", "expected a mapping"),
        ("model: a\ndevice: b\nstep_seconds: {512x512: {1: 0.1}}", "missing field 'degrees'"),
        ("model: a\ndevice: b\ndegrees: [1]\nstep_seconds: {512y512: {1: 0.1}}", "shape must look like"),
        ("model: a\ndevice: b\ndegrees: [1]\nstep_seconds: {512x512: {1: -1}}", "not a time"),
        ("model: a\ndevice: b\ndegrees: [1]\nstep_seconds: {512x512: {1: .nan}}", "not a time"),
        ("model: a\ndevice: b\ndegrees: [1]\nstep_seconds: {512x512: {2: 0.1}}", "beyond"),
        ("model: a\ndevice: b\ndegrees: [1, 2]\nstep_seconds: {512x512: {1: 0.1}}", "for degree 2"),
        ("model: a\ndevice: b\ndegrees: [0]\nstep_seconds: {512x512: {0: 0.1}}", "must be positive"),
        ("model: a\ndevice: b\ndegrees: [1]\nstep_seconds: {}", "empty"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Profile.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: No such file"):
        Profile.load("nowhere.yaml")


def test_shapes() -> None:
    assert Shape.parse("480x832x81") == Shape(480, 832, 81)
    assert str(Shape(512, 768)) == "512x768" and str(Shape(480, 832, 81)) == "480x832x81"
    for text in ("", "512", "0x512", "axb", "1x2x3x4", "-512x512"):
        with pytest.raises(ValueError, match="shape must look like"):
            Shape.parse(text)
