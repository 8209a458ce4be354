"""Why a request ran at which degree: each of its step ranges beside what else it could have had at that moment.

Nothing asks the planner. The reasons follow from what ran, from the step times that the plans reckoned with and from
the deadline, so they hold for any policy; they say what a degree was good for, not what went on in a solver.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tetriserve.request import MET_SLACK_S, Execution, LostRange, PlannedWith

WAIT_S = 0.05
"""A shorter gap before a range is the hand-off, not waiting; a range that much slower than planned is slow ..."""
SLOW = 1.25
"""... when it also takes so many times what was planned."""


@dataclass(frozen=True)
class Choice:
    """All denoising steps that are left, at one degree.

    Attributes:
        end_s: when the request would be done, decode included; from arrival.
        gpu_seconds: of the steps.
    """

    degree: int
    end_s: float
    gpu_seconds: float


@dataclass(frozen=True)
class Explained:
    """A step range and why it ran so.

    Attributes:
        start_s: from arrival.
        planned_s: what its steps were planned with.
        end_s: when the request would be done if it went on so, from arrival; None for encode.
        spare_s: from `end_s` to the deadline, negative when late; infinite without a deadline.
        alone: no other request was open when it was planned.
        before: what kept it waiting, how long its deadline had passed, or what was lost before it; may be empty.
        verdict: one word for the reason ...
        reason: ... and the reason in words.
        shared_with: how many others ran in the same steps.
    """

    kind: str
    steps: int
    gpus: tuple[int, ...]
    start_s: float
    seconds: float
    planned_s: float
    end_s: float | None
    spare_s: float | None
    alone: bool
    before: str
    verdict: str
    reason: str
    shared_with: int = 0

    @property
    def why(self) -> str:
        """All there is to say of it."""
        slow_s = self.seconds - self.planned_s
        is_slow = self.seconds > SLOW * self.planned_s and slow_s >= WAIT_S
        slow = f"took {_s(slow_s)} s longer than planned" if is_slow else ""
        if self.shared_with:
            others = "another request" if self.shared_with == 1 else f"{self.shared_with} other requests"
            slow = f"steps shared with {others}"  # alone they would have been faster
        return "; ".join(filter(None, (self.before, self.reason, slow)))


def choices(planned: PlannedWith, steps: int, start_s: float) -> dict[int, Choice]:
    """By degree: what is left when `steps` steps start at `start_s`, from arrival."""
    return {
        degree: Choice(degree, start_s + steps * step_s + planned.decode_s, degree * steps * step_s)
        for degree, step_s in sorted(planned.step_s.items())
    }


def explain(
    schedule: Sequence[Execution],
    planned: PlannedWith,
    steps: int,
    slo_s: float | None,
    *,
    arrival_s: float = 0.0,
    lost: Sequence[LostRange] = (),
) -> list[Explained]:
    """Every range of a request.

    Args:
        schedule: in order of start, on the clock of `arrival_s`.
        planned: with the degrees that the request could run at.
        steps: denoising steps that the request asks for, whether or not all of them ran.
        slo_s: from arrival; None without a deadline.
        lost: ranges that had to be run again, on the same clock.
    """
    limit_s = math.inf if slo_s is None else slo_s
    one_gpu_s = {
        "encode": planned.encode_s,
        "encode_image": planned.encode_image_s,
        "decode": planned.decode_s,
    }
    explained = []
    left, free_s, untold = steps, 0.0, sorted(lost, key=lambda one: one.noticed_s)
    passed = next((ran for ran in schedule if ran.start_s - arrival_s > limit_s), None)
    for index, ran in enumerate(schedule):
        start_s, seconds, degree = ran.start_s - arrival_s, ran.end_s - ran.start_s, len(ran.gpus)
        before = []
        besides = f"; {_others(ran.others)}"
        if start_s - free_s >= WAIT_S:
            before.append(f"waited {_s(start_s - free_s)} s, {_others(ran.others)}")
            besides = ""
        while untold and untold[0].noticed_s <= ran.start_s:
            again = untold.pop(0)
            before.append(f"{again.steps} {'step' if again.steps == 1 else 'steps'} of {again.kind} lost")
        if ran is passed:
            before.append(f"{_s(start_s - limit_s)} s past its deadline")
        end_s: float | None = None
        if ran.kind == "denoise":
            options = choices(planned, left, start_s)
            if any(len(later.gpus) > degree for later in schedule[index + 1 :]):
                besides = "; a wider range follows"
            verdict, reason = _reason(options, degree, limit_s, besides)
            planned_s = ran.steps * planned.step_s.get(degree, math.inf)
            end_s = options[degree].end_s if degree in options else None
            left -= ran.steps
        else:
            verdict, reason = ran.kind, f"{ran.kind} runs on one GPU"
            planned_s = one_gpu_s[ran.kind]
            if ran.kind == "decode":
                end_s = start_s + planned_s
        explained.append(
            Explained(
                ran.kind,
                ran.steps,
                ran.gpus,
                start_s,
                seconds,
                planned_s,
                end_s,
                None if end_s is None else limit_s - end_s,
                ran.others == 0,
                "; ".join(before),
                verdict,
                reason,
                ran.shared_with,
            )
        )
        free_s = start_s + seconds
    return explained


def merged(explained: Sequence[Explained]) -> list[Explained]:
    """Neighbours on the same GPUs, for the same reason and without a pause between them, in one; its reason and what
    it expects are those of the first."""
    rows: list[Explained] = []
    for one in explained:
        last = rows[-1] if rows else None
        if last is None or one.before or _sort(one) != _sort(last):
            rows.append(one)
            continue
        rows[-1] = replace(
            last,
            steps=last.steps + one.steps,
            seconds=one.start_s + one.seconds - last.start_s,
            planned_s=last.planned_s + one.planned_s,
        )
    return rows


def _sort(one: Explained) -> tuple[Any, ...]:
    return one.kind, one.gpus, one.verdict, one.alone, one.shared_with


def _reason(options: Mapping[int, Choice], degree: int, limit_s: float, besides: str) -> tuple[str, str]:
    """Verdict and reason of a denoising range.

    `besides` is what else was the case, said where the times alone do not explain it.
    """
    if degree not in options:
        return "unknown", f"degree {degree} is none that was planned with"
    chosen = options[degree]
    on_time = [one for one in options.values() if one.end_s <= limit_s + MET_SLACK_S]
    if not on_time:
        best = min(options.values(), key=lambda one: one.end_s)
        late = f"{best.degree} would be {_s(best.end_s - limit_s)} s late"
        return "late", f"no degree is in time, {late}: best effort"
    need = min(on_time, key=lambda one: (one.gpu_seconds, one.degree))
    if chosen not in on_time:
        late = f"to the end at {degree} would be {_s(chosen.end_s - limit_s)} s late"
        return "less", f"{late}, at {need.degree} in time{besides}"
    if chosen.gpu_seconds > need.gpu_seconds * (1 + 1e-9):
        saved = f"{_s(chosen.gpu_seconds - need.gpu_seconds)} GPU-seconds less"
        if math.isinf(limit_s):
            return "more", f"no deadline, {need.degree} would cost {saved}{besides}"
        word = "wider" if degree > need.degree else "narrower"
        return "more", f"{word} than needed, {need.degree} would be in time for {saved}{besides}"
    cheaper = [one for one in options.values() if one.gpu_seconds < chosen.gpu_seconds * (1 - 1e-9)]
    if cheaper:
        near = min(cheaper, key=lambda one: one.end_s)
        late = f"degree {near.degree} would end {_s(near.end_s - limit_s)} s late"
        return "needed", f"{late}, {degree} is the cheapest in time"
    if len(options) == 1:
        return "only", "the only degree"
    if math.isinf(limit_s):
        return "cheapest", f"no deadline, {degree} costs the fewest GPU-seconds"
    if len(on_time) == len(options):
        return "cheapest", f"any degree is in time, {degree} costs the fewest GPU-seconds"
    return "cheapest", f"degree {degree} is in time and costs the fewest GPU-seconds"


def table(
    explained: Sequence[Explained],
    slo_s: float | None,
    finish_s: float | None,
    predicted_s: float | None = None,
) -> list[str]:
    """Lines for people.

    Args:
        slo_s, finish_s: from arrival; None without a deadline, and when the request was given up.
        predicted_s: the end as the first plan had it, where that is known.
    """
    rows = [("start s", "seconds", "steps", "degree", "GPUs", "end s", "spare s", "why")]
    rows += [
        (
            f"{one.start_s:.3f}",
            f"{one.seconds:.3f}",
            str(one.steps) if one.kind == "denoise" else one.kind,
            str(len(one.gpus)),
            ",".join(map(str, one.gpus)),
            "-" if one.end_s is None else f"{one.end_s:.3f}",
            "-" if one.spare_s is None or math.isinf(one.spare_s) else f"{round(one.spare_s, 3) + 0.0:+.3f}",
            one.why,
        )
        for one in merged(explained)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    return [*(f"  {line}" for line in lines), f"  {_end(slo_s, finish_s, predicted_s)}"]


def of_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """The table for the `metrics` of a server's answer. Raises KeyError where they lack something."""
    told = metrics["planned_with"]
    step_s = {int(degree): seconds for degree, seconds in told["step_s"].items()}
    schedule = [_execution(ran, ran["others"], ran.get("shared_with", 0)) for ran in metrics["schedule"]]
    lost = [
        LostRange(one["kind"], one["steps"], tuple(one["gpus"]), one["noticed_s"]) for one in metrics["lost"]
    ]
    rows = explain(
        schedule,
        PlannedWith(told["encode_s"], step_s, told["decode_s"], told.get("encode_image_s", 0.0)),
        sum(ran.steps for ran in schedule if ran.kind == "denoise"),
        metrics["slo_s"],
        arrival_s=metrics["arrival_s"],
        lost=lost,
    )
    return table(rows, metrics["slo_s"], metrics["stage_durations"]["total"], metrics["predicted_s"])


def of_result(result: Mapping[str, Any], request_id: str, planned: PlannedWith, steps: int) -> list[str]:
    """The table for a request of a Result; `steps` are the denoising steps that it asks for.

    Of others that were given up the Result does not say when: they count as open until their deadline.
    """
    (asked,) = (row for row in result["requests"] if row["id"] == request_id)
    rest = [row for row in result["requests"] if row["id"] != request_id]
    ends_s = [row["arrival_s"] + row["slo_s"] if row["finish_s"] is None else row["finish_s"] for row in rest]

    def open_at(now_s: float) -> int:
        return sum(row["arrival_s"] <= now_s < until_s for row, until_s in zip(rest, ends_s, strict=True))

    schedule = [
        _execution(ran, open_at(ran["start_s"]), len(ran["request_ids"]) - 1)
        for ran in result["schedule"]
        if request_id in ran["request_ids"]
    ]
    arrival_s, finish_s, slo_s = asked["arrival_s"], asked["finish_s"], asked["slo_s"]
    rows = explain(schedule, planned, steps, slo_s, arrival_s=arrival_s)
    return table(rows, slo_s, None if finish_s is None else finish_s - arrival_s)


def _execution(ran: Mapping[str, Any], others: int, shared_with: int) -> Execution:
    gpus = tuple(ran["gpus"])
    return Execution(ran["kind"], ran["steps"], gpus, ran["start_s"], ran["end_s"], others, shared_with)


def _end(slo_s: float | None, finish_s: float | None, predicted_s: float | None) -> str:
    if finish_s is None:
        return "given up"
    says = f"done after {finish_s:.3f} s"
    if slo_s is not None:
        side = "before" if finish_s <= slo_s + MET_SLACK_S else "behind"
        says += f", {_s(abs(slo_s - finish_s))} s {side} the deadline"
    return says if predicted_s is None else f"{says}; the first plan had it done after {predicted_s:.3f} s"


def _s(seconds: float) -> str:
    """Two digits that say something."""
    return f"{seconds:.1f}" if seconds >= 9.95 else f"{seconds:.2g}"


def _others(count: int) -> str:
    return f"{count} other requests were open" if count > 1 else f"{count or 'no'} other request was open"
