"""Which GPU sets exist, and which one is taken."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_checker import is_allowed_set

from solver.placement import blocks_of, choose, earliest, gpu_sets, group_sets, mask_of, sets_of


def test_sets_of_a_full_node() -> None:
    assert gpu_sets(8, 2) == ((0, 1), (2, 3), (4, 5), (6, 7))
    fours = gpu_sets(8, 4)
    assert fours[0] == (0, 1, 2, 3) and (0, 1, 6, 7) in fours and len(fours) == 6
    assert gpu_sets(16, 4) == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15))
    assert gpu_sets(8, 3) == ((0, 1, 2), (1, 2, 3), (4, 5, 6), (5, 6, 7))
    assert gpu_sets(8, 6) == ((0, 1, 2, 3, 4, 5), (2, 3, 4, 5, 6, 7))
    assert gpu_sets(8, 16) == ()
    assert len(group_sets(8)) == 11


def test_sets_of_an_odd_node() -> None:
    assert gpu_sets(6, 4) == ((0, 1, 2, 3), (0, 1, 4, 5), (2, 3, 4, 5))
    assert gpu_sets(6, 6) == ((0, 1, 2, 3, 4, 5),)
    assert gpu_sets(3, 3) == ((0, 1, 2),)
    assert group_sets(5) == ((0, 1), (2, 3), (0, 1, 2, 3))
    assert group_sets(1) == ()
    with pytest.raises(ValueError, match="at least 1"):
        gpu_sets(8, 0)


@given(n_gpus=st.integers(1, 20), degree=st.integers(1, 20))
def test_sets_are_allowed_and_exist_when_they_fit(n_gpus: int, degree: int) -> None:
    sets = gpu_sets(n_gpus, degree)
    assert len(set(sets)) == len(sets)
    assert all(len(gpus) == degree and is_allowed_set(gpus, n_gpus) for gpus in sets)
    assert bool(sets) == (degree <= n_gpus)


@given(st.permutations([4, 2, 1, 1]), st.integers(0, 255))
def test_power_of_two_widths_fit_by_place_when_they_fit_by_count(widths: list[int], previous: int) -> None:
    idle = 255
    for width in sorted(widths, reverse=True):
        taken = choose(sets_of(8, width), idle, previous)
        assert taken is not None
        idle &= ~taken.mask
    assert idle == 0


def test_choice_keeps_gpus_then_spares_free_blocks() -> None:
    idle = mask_of([1, 2, 3, 4, 5, 6, 7])
    single = sets_of(8, 1)
    kept = choose(single, idle, mask_of([6]))
    assert kept is not None and kept.gpus == (6,)
    lonely = choose(single, idle, 0)
    assert lonely is not None and lonely.gpus == (1,)  # its buddy is busy: no pair is broken up
    narrowed = choose(sets_of(8, 2), 255, mask_of([4, 5, 6, 7]))
    assert narrowed is not None and narrowed.gpus == (4, 5)
    assert choose(sets_of(8, 8), idle, 0) is None


def test_earliest_start_first_and_never_a_lost_gpu() -> None:
    free_at_s = [0.0, math.inf, 2.0, 1.0, 3.0, 3.0, 0.0, 0.0]
    found = earliest(sets_of(8, 2), free_at_s, 0.0, mask_of([4, 5]))
    assert found is not None and (found[0], found[1].gpus) == (0.0, (6, 7))
    found = earliest(sets_of(8, 2), free_at_s, 3.0, mask_of([4, 5]))
    assert found is not None and (found[0], found[1].gpus) == (3.0, (4, 5))
    assert earliest(sets_of(8, 8), free_at_s, 0.0, 0) is None
    assert earliest((), free_at_s, 0.0, 0) is None


@settings(max_examples=300, deadline=None)
@given(n_gpus=st.integers(1, 20), data=st.data())
def test_blocks_find_what_choose_takes(n_gpus: int, data: st.DataObject) -> None:
    degree = data.draw(st.integers(1, n_gpus))
    idle = data.draw(st.integers(0, (1 << n_gpus) - 1))
    previous = data.draw(
        st.one_of(
            st.just(0),
            st.integers(0, (1 << n_gpus) - 1),
            st.sampled_from([one.mask for width in (1, 2, 4, 8) for one in sets_of(n_gpus, width)]),
        )
    )
    assert blocks_of(n_gpus).find(degree, idle, previous) == choose(sets_of(n_gpus, degree), idle, previous)
