"""The batch law from measured steps: the figures of a GPU and of a CPU are found again."""

from __future__ import annotations

import pytest

from tetriserve.batch_law import SharedTimes, law_of
from tetriserve.profile import Profile
from tetriserve.request import Shape

SMALL, LARGE = Shape(256, 256), Shape(512, 512)


def profile(law: dict[str, object]) -> Profile:
    alone = {SMALL: {1: 0.1, 2: 0.06}, LARGE: {1: 0.3, 2: 0.2}}
    return Profile.from_body(Profile("m", "d", "s", (1, 2), alone, **law).to_body())


def test_a_gpu_has_a_floor() -> None:
    times = [SharedTimes(SMALL, 0.1, {2: 0.1, 4: 0.12}), SharedTimes(LARGE, 0.3, {2: 0.5, 4: 1.0})]
    law = law_of({1: times})
    assert law["batch_floor_seconds"] == {1: 0.1} and not law["batch_overhead_seconds"]
    assert law["batch_step_seconds"] == {SMALL: {1: pytest.approx(0.03)}, LARGE: {1: pytest.approx(0.25)}}
    terms = profile(law).shared(SMALL)
    assert set(terms) == {1} and terms[1].floor_s == 0.1 and terms[1].add_s == 0.03


def test_a_cpu_has_an_overhead() -> None:
    """Eight parts in a thousand are the same for however many."""
    times = [
        SharedTimes(SMALL, 0.025, {n: 0.008 + 0.017 * n for n in (2, 4)}),
        SharedTimes(LARGE, 0.11, {n: 0.008 + 0.1 * n for n in (2, 4)}),
    ]
    law = law_of({1: times})
    assert law["batch_floor_seconds"] == {1: 0.0}
    assert law["batch_overhead_seconds"] == {1: pytest.approx(0.008)}
    assert law["batch_step_seconds"][LARGE] == {1: pytest.approx(0.1)}


def test_what_does_not_pay_is_not_there() -> None:
    no = [SharedTimes(SMALL, 0.1, {2: 0.2, 4: 0.41})]
    assert law_of({1: no}) == {}
    yes = [SharedTimes(SMALL, 0.06, {2: 0.06, 4: 0.1})]
    assert set(law_of({1: no, 2: yes})["batch_floor_seconds"]) == {2}


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"batch_overhead_seconds": {1: 0.1}}, "batch_overhead_seconds needs batch_floor_seconds"),
        ({"batch_step_seconds": {"256x256": {1: 0.1}}}, "batch_step_seconds needs batch_floor_seconds"),
        ({"batch_floor_seconds": {4: 0.1}}, r"batch_floor_seconds has degrees \[4\] beyond"),
        (
            {"batch_floor_seconds": {1: 0.1}, "batch_step_seconds": {"256x256": {1: 0.2}}},
            "adds 0.2, more than the 0.1 that a step takes alone",
        ),
        ({"batch_floor_seconds": {1: -1}}, "-1 is not a time"),
        ({"batch_floor_seconds": {1: 0.1}, "batch_step_seconds": {"256x256": {8: 0.1}}}, "has degrees"),
    ],
)
def test_sections_that_contradict_each_other(sections: dict[str, object], says: str) -> None:
    body = profile({}).to_body() | sections
    with pytest.raises(ValueError, match=says):
        Profile.from_body(body)
