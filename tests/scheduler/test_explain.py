"""Why a range ran at its degree: the words for each case, and what must hold whatever ran."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.http.responses import metrics_body
from tetriserve.request import Execution, LostRange, Metrics, PlannedWith
from tetriserve.scheduler.explain import Explained, explain, merged, of_metrics, table

PLANNED = PlannedWith(0.1, {1: 1.0, 2: 0.6, 4: 0.4}, 0.2)
"""Ten steps: 10 GPU-seconds at degree 1, 12 at 2, 16 at 4."""


def ran(degree: int, steps: int, start_s: float, end_s: float | None = None, others: int = 0) -> Execution:
    end_s = start_s + steps * PLANNED.step_s[degree] if end_s is None else end_s
    return Execution("denoise", steps, tuple(range(degree)), start_s, end_s, others)


def why(*schedule: Execution, slo_s: float | None, steps: int = 10, lost: tuple[LostRange, ...] = ()) -> str:
    """Of the last range."""
    return explain(schedule, PLANNED, steps, slo_s, lost=lost)[-1].why


@pytest.mark.parametrize(
    ("degree", "slo_s", "says"),
    [
        (1, 10.2, "any degree is in time, 1 costs the fewest GPU-seconds"),
        (2, 10.1, "degree 1 would end 0.1 s late, 2 is the cheapest in time"),
        (4, 6.1, "degree 2 would end 0.1 s late, 4 is the cheapest in time"),
        (2, 20.0, "wider than needed, 1 would be in time for 2 GPU-seconds less; no other request was open"),
        (4, 8.0, "wider than needed, 2 would be in time for 4 GPU-seconds less; no other request was open"),
        (1, 8.0, "to the end at 1 would be 2.2 s late, at 2 in time; no other request was open"),
        (1, 4.0, "no degree is in time, 4 would be 0.2 s late: best effort"),
        (1, None, "no deadline, 1 costs the fewest GPU-seconds"),
        (4, None, "no deadline, 1 would cost 6 GPU-seconds less; no other request was open"),
    ],
)
def test_a_first_range(degree: int, slo_s: float | None, says: str) -> None:
    assert why(ran(degree, 10, 0.0), slo_s=slo_s) == says


def test_company_is_said() -> None:
    one = ran(1, 5, 0.0)._replace(shared_with=2)
    assert why(one, slo_s=None).endswith("; steps shared with 2 other requests")
    assert why(one._replace(shared_with=1, end_s=9.0), slo_s=None).endswith(
        "; steps shared with another request"
    )


def test_what_is_left_decides() -> None:
    """The same degree under the same deadline, for other reasons as time goes by."""
    first, second = ran(2, 5, 0.0), ran(2, 5, 3.0)
    assert "degree 1 would end" in why(first, slo_s=8.3)
    assert "wider than needed, 1 would be in time for 1 GPU-seconds less" in why(first, second, slo_s=8.3)
    assert "a wider range follows" in explain([ran(1, 5, 0.0), ran(2, 5, 5.0)], PLANNED, 10, 8.3)[0].why


def test_pauses_and_losses_and_slow_ranges_are_said() -> None:
    one, late = ran(1, 5, 0.0), ran(1, 5, 5.8, 12.0, others=1)
    says = why(one, late, slo_s=20.0)
    assert says.startswith("waited 0.8 s, 1 other request was open; any degree is in time")
    assert says.endswith("; took 1.2 s longer than planned") is False  # 6.2 s for 5: within a quarter
    assert why(one, late._replace(end_s=12.3), slo_s=20.0).endswith("; took 1.5 s longer than planned")
    assert why(one, ran(1, 5, 5.04), slo_s=20.0).startswith("any degree")  # a hand-off
    lost = (LostRange("denoise", 1, (0,), 5.5), LostRange("denoise", 3, (0, 1), 5.6))
    says = why(one, late, slo_s=20.0, lost=lost)
    assert says.startswith(
        "waited 0.8 s, 1 other request was open; 1 step of denoise lost; 3 steps of denoise lost"
    )
    assert why(ran(4, 10, 0.0, others=3), slo_s=20.0).endswith("; 3 other requests were open")
    assert why(one, late, slo_s=5.5).startswith(
        "waited 0.8 s, 1 other request was open; 0.3 s past its deadline; no degree"
    )
    assert "past" not in why(one, late, ran(1, 1, 12.0), slo_s=5.5)  # said once, where it passed


def test_a_degree_that_is_slower_than_a_narrower_one_is_never_called_for() -> None:
    small = PlannedWith(0.0, {1: 0.1, 2: 0.2}, 0.0)
    (one,) = explain([Execution("denoise", 10, (0,), 0.0, 1.0)], small, 10, 1.5)
    assert one.why == "degree 1 is in time and costs the fewest GPU-seconds"
    (one,) = explain([Execution("denoise", 10, (0,), 0.0, 1.0)], PlannedWith(0.0, {1: 0.1}, 0.0), 10, 1.5)
    assert one.why == "the only degree"
    (one,) = explain([Execution("denoise", 10, (0, 1, 2, 3), 0.0, 1.0)], small, 10, 1.5)
    assert one.why == "degree 4 is none that was planned with" and one.spare_s is None


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[int, int], int, int, int, list[tuple[int, int, int]]]:
    """In whole milliseconds: steps by degree, decode, deadline, steps, and ranges (degree, steps, pause before)."""
    degrees = draw(st.sets(st.sampled_from([1, 2, 4, 8]), min_size=1))
    step_ms = {degree: draw(st.integers(1, 500)) for degree in degrees}
    parts = st.tuples(st.sampled_from(sorted(degrees)), st.integers(1, 9), st.sampled_from([0, 0, 7, 300]))
    ranges = draw(st.lists(parts, min_size=1, max_size=8))
    steps = sum(part[1] for part in ranges) + draw(st.integers(0, 2))
    return step_ms, draw(st.integers(0, 200)), draw(st.integers(1, 10_000)), steps, ranges


def played(step_ms: dict[int, int], ranges: list[tuple[int, int, int]]) -> list[Execution]:
    """The ranges as planned, with their pauses."""
    schedule, now_ms = [], 0
    for degree, steps, pause_ms in ranges:
        start_ms = now_ms + pause_ms
        now_ms = start_ms + steps * step_ms[degree]
        schedule.append(
            Execution("denoise", steps, tuple(range(degree)), start_ms / 1000, now_ms / 1000, steps % 2)
        )
    return schedule


@given(cases())
def test_the_verdict_is_what_whole_milliseconds_say(
    case: tuple[dict[int, int], int, int, int, list[tuple[int, int, int]]],
) -> None:
    step_ms, decode_ms, slo_ms, left, ranges = case
    planned = PlannedWith(0.0, {d: ms / 1000 for d, ms in step_ms.items()}, decode_ms / 1000)
    rows = explain(played(step_ms, ranges), planned, left, slo_ms / 1000)
    assert len(rows) == len(ranges)
    now_ms = 0
    for row, (degree, steps, pause_ms) in zip(rows, ranges, strict=True):
        now_ms += pause_ms
        in_time = {d for d, ms in step_ms.items() if now_ms + left * ms + decode_ms <= slo_ms}
        cheaper = {d for d, ms in step_ms.items() if d * ms < degree * step_ms[degree]}
        if not in_time:
            expected = "late"
        elif degree not in in_time:
            expected = "less"
        elif cheaper & in_time:
            expected = "more"
        elif cheaper:
            expected = "needed"
        else:
            expected = "only" if len(step_ms) == 1 else "cheapest"
        assert row.verdict == expected
        end_ms = now_ms + left * step_ms[degree] + decode_ms
        assert row.end_s == pytest.approx(end_ms / 1000)
        assert row.spare_s == pytest.approx((slo_ms - end_ms) / 1000, abs=1e-9)
        assert row.before.startswith("waited") == (pause_ms >= 50)
        assert "longer than planned" not in row.why
        now_ms += steps * step_ms[degree]
        left -= steps


@given(cases())
def test_merged_rows_are_the_same_steps_in_the_same_order(
    case: tuple[dict[int, int], int, int, int, list[tuple[int, int, int]]],
) -> None:
    step_ms, decode_ms, slo_ms, steps, ranges = case
    planned = PlannedWith(0.0, {d: ms / 1000 for d, ms in step_ms.items()}, decode_ms / 1000)
    rows = explain(played(step_ms, ranges), planned, steps, slo_ms / 1000)
    short = merged(rows)
    assert sum(row.steps for row in short) == sum(row.steps for row in rows)
    assert [row.start_s for row in short] == sorted(row.start_s for row in short)
    kinds = [(row.gpus, row.verdict, row.alone) for row in rows]
    changes = [
        b.before != "" or x != y for (x, y), b in zip(itertools.pairwise(kinds), rows[1:], strict=True)
    ]
    assert len(short) == 1 + sum(changes)
    firsts = {row.start_s: row for row in rows}
    assert all(
        (row.reason, row.end_s) == (firsts[row.start_s].reason, firsts[row.start_s].end_s) for row in short
    )
    assert len(table(rows, slo_ms / 1000, None)) == 2 + len(short)
    assert merged(short) == short


@given(st.sampled_from([1, 2, 4]), st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_what_runs_on_as_planned_ends_as_expected(degree: int, parts: list[int]) -> None:
    schedule, now_s = [Execution("encode", 1, (0,), 50.0, 50.1)], 50.1
    for steps in parts:
        schedule.append(ran(degree, steps, now_s))
        now_s = schedule[-1].end_s
    schedule.append(Execution("decode", 1, (0,), now_s, now_s + 0.2))
    encode, *rest = explain(schedule, PLANNED, sum(parts), 100.0, arrival_s=50.0)
    assert encode.end_s is None
    assert [row.end_s for row in rest] == pytest.approx([now_s + 0.2 - 50.0] * len(rest))
    assert not any(row.before for row in rest)


def test_metrics_of_an_answer_say_what_the_scheduler_said() -> None:
    schedule = (
        Execution("encode", 1, (0,), 100.2, 100.3, 1),
        ran(2, 6, 100.3, others=1),
        ran(1, 4, 103.9, others=0),
        Execution("decode", 1, (1,), 107.9, 108.1, 0),
    )
    lost = (LostRange("denoise", 2, (0, 1), 100.25),)
    planned = replace(PLANNED, step_s={1: 1.0, 2: 0.6})
    metrics = Metrics(
        0.2, 0.1, 7.6, 0.2, 8.15, 7.9, 9.0, True, (), schedule, 3, 100.0, planned, lost=lost, predicted_s=8.0
    )
    rows = explain(schedule, planned, 10, 9.0, arrival_s=100.0, lost=lost)
    assert [row.verdict for row in rows] == ["encode", "needed", "cheapest", "decode"]
    assert "2 steps of denoise lost" in rows[1].why and rows[0].why.startswith("waited 0.2 s, 1 other")
    body = json.loads(json.dumps(metrics_body(metrics)))
    assert of_metrics(body) == table(rows, 9.0, 8.15, 8.0)
    assert of_metrics(body)[-1] == (
        "  done after 8.150 s, 0.85 s before the deadline; the first plan had it done after 8.000 s"
    )


def test_a_table_without_a_deadline() -> None:
    rows = explain([ran(1, 10, 0.0)], PLANNED, 10, None)
    assert isinstance(rows[0], Explained)
    _, row, end = table(rows, None, 10.2)
    assert row.split()[:7] == ["0.000", "10.000", "10", "1", "0", "10.200", "-"]
    assert end == "  done after 10.200 s"
