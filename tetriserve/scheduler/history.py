"""What a cell did in the last minutes: the data of the live board and of the live timeline.

Times are Unix seconds where nothing else is said. Of a request nothing is kept that says what it asked for: no
prompt, no seed, and in place of its id a short label made from it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tetriserve.request import Execution, Shape

KEPT_S = 600.0

MAX_RUNS = 20_000
MAX_PLANS = 20_000
MAX_ENDED = 10_000
"""At most so many are kept, whatever their age."""

BOARD_RUNS = 3000
SHOWN_RANGES = 750
SHOWN_REQUESTS = 500
SHOWN_ROUNDS = 400
TIMELINE_RUNS = 5000
"""At most so many are in one answer, the newest; a full board is below 200 kB of JSON."""

FINEST = 1 / 2000
"""Share of a board's width: a range or a gap that is narrower cannot be seen."""
SEAM = 8
"""So many times that, about four pixels, a range must be wide to be drawn apart from its neighbour."""

RATE_WINDOWS_S = (60, 300)
RATES_AGE_S = 1.0
"""Rates sum over minutes, and boards are asked for many times a second."""

COLOURS = 12

BUSY = "busy"
"""All that is said of a range of somebody else's request."""

BLAMELESS = ("open", "no_deadline", "cancelled")
"""Outcomes that do not count as a deadline missed."""


class Run(NamedTuple):
    """A step range of a request, by the id that it arrived under."""

    request_id: str
    execution: Execution


class Plan(NamedTuple):
    """A decision; `fell_back` when the fallback made it, `boundary_s` is the end of its round."""

    start_s: float
    seconds: float
    fell_back: bool
    boundary_s: float


@dataclass(frozen=True)
class _Request:
    """`outcome` is "open", then "met", "late", "no_deadline" or the code of an error."""

    label: str
    colour: int
    client: str | None
    shape: Shape
    steps: int
    arrival_s: float
    deadline_s: float | None
    steps_done: int = 0
    finish_s: float | None = None
    outcome: str = "open"

    def is_late(self, now_s: float) -> bool:
        """Whether it missed its deadline, or is open behind it."""
        if self.outcome == "open":
            return self.deadline_s is not None and now_s > self.deadline_s
        return self.outcome in ("late", "deadline_infeasible")


class History:
    """The last `KEPT_S` seconds of a cell, and its open requests.

    `owner` is the client that looks: it sees of the requests of others only that GPUs are busy. None sees everything.
    """

    def __init__(self, n_gpus: int, start_s: float) -> None:
        self._n_gpus = n_gpus
        self._start_s = start_s
        self._requests: dict[str, _Request] = {}
        self._ended: deque[str] = deque()
        self._runs: deque[Run] = deque(maxlen=MAX_RUNS)
        self._plans: deque[Plan] = deque(maxlen=MAX_PLANS)
        self._colours = itertools.cycle(range(COLOURS))
        self._busy_s: defaultdict[int, float] = defaultdict(float)
        self._rates: list[dict[str, Any]] = []
        self._rated_s = float("-inf")

    # ---- events -------------------------------------------------------------------------------------------

    def arrived(
        self,
        request_id: str,
        name: str,
        client: str | None,
        shape: Shape,
        steps: int,
        arrival_s: float,
        deadline_s: float | None,
    ) -> None:
        """A request was accepted. `request_id` is never used twice, `name` is what its client knows it by."""
        label = hashlib.blake2s(name.encode(), digest_size=4).hexdigest()
        colour = next(self._colours)
        self._requests[request_id] = _Request(label, colour, client, shape, steps, arrival_s, deadline_s)

    def ran(self, request_id: str, execution: Execution) -> None:
        """A step range was run and counts."""
        self._runs.append(Run(request_id, execution))
        for second in range(math.floor(execution.start_s), math.ceil(execution.end_s)):
            share_s = min(execution.end_s, second + 1) - max(execution.start_s, second)
            self._busy_s[second] += len(execution.gpus) * share_s / (1 + execution.shared_with)
        request = self._requests.get(request_id)
        if request is not None and execution.kind == "denoise":
            done = request.steps_done + execution.steps
            self._requests[request_id] = replace(request, steps_done=done)

    def ended(self, request_id: str, outcome: str, now_s: float) -> None:
        """Also the time to forget: nothing else can pile up without a request that ends."""
        self._requests[request_id] = replace(self._requests[request_id], finish_s=now_s, outcome=outcome)
        self._ended.append(request_id)
        while self._runs and self._runs[0].execution.end_s < now_s - KEPT_S:
            self._runs.popleft()
        while self._plans and self._plans[0].start_s < now_s - KEPT_S:
            self._plans.popleft()
        for second in [second for second in self._busy_s if second < now_s - KEPT_S]:
            del self._busy_s[second]
        while len(self._ended) > MAX_ENDED or self._finish_s(self._ended[0]) < now_s - KEPT_S:
            del self._requests[self._ended.popleft()]

    def planned(self, plan: Plan) -> None:
        self._plans.append(plan)

    def _finish_s(self, request_id: str) -> float:
        finish_s = self._requests[request_id].finish_s
        assert finish_s is not None
        return finish_s

    # ---- views --------------------------------------------------------------------------------------------

    def board(
        self, now_s: float, seconds: float, owner: str | None, ahead: Sequence[Run], states: Sequence[str]
    ) -> dict[str, Any]:
        """The live board, ready for JSON. Times in it are seconds from `now_s`, so the past is negative; nothing is
        left out after `from_s` but what is too narrow.

        Args:
            seconds: how far back.
            ahead: ranges that are committed and have not ended, with their predicted times.
            states: "ready", "lost" or "cordoned" for each GPU.
        """
        finest_s = seconds * FINEST
        # this runs where the plans are made, so its work is bounded too
        newest = itertools.islice(reversed(self._runs), BOARD_RUNS)
        past = [run for run in newest if run.execution.end_s > now_s - seconds]
        older = len(self._runs) - BOARD_RUNS if len(past) == BOARD_RUNS else 0
        merged = self._merged(_placed(reversed(past)), "done", finest_s, now_s, owner)
        wide = [row for row in merged if row["end_s"] - row["start_s"] >= finest_s]
        ranges = wide[-SHOWN_RANGES:]
        whole_from_s = max(-seconds, self._start_s - now_s)
        if older or len(ranges) < len(wide):
            whole_from_s = max(whole_from_s, ranges[0]["start_s"])
        for run, place in _placed(ahead):
            state = "running" if run.execution.start_s < now_s else "planned"
            ranges += self._merged([(run, place)], state, finest_s, now_s, owner)
        opened = {i: request for i, request in self._requests.items() if request.outcome == "open"}
        shown = [r for r in opened.values() if owner in (None, r.client)]
        labels = {row["request"] for row in ranges} - {r.label for r in shown}
        shown += [r for r in self._requests.values() if r.label in labels and owner in (None, r.client)]
        rounds_s = [plan.boundary_s - now_s for plan in self._plans if plan.boundary_s > now_s - seconds]
        rounds_s = sorted({round(boundary_s, 3) for boundary_s in rounds_s})
        return {
            "now_s": now_s,
            "from_s": round(whole_from_s, 3),
            "gpus": list(states),
            "ranges": ranges,
            "requests": [_request_row(request, now_s) for request in shown[:SHOWN_REQUESTS]],
            "rounds_s": rounds_s[-SHOWN_ROUNDS:],
            "open_requests": len(opened),
            "waiting_requests": len(opened.keys() - {run.request_id for run in ahead}),
            "rates": self._rates_at(now_s, ahead),
            "left_out": {
                "ranges": len(merged) + len(ahead) - len(ranges) + older,
                "requests": max(0, len(shown) - SHOWN_REQUESTS),
                "rounds": max(0, len(rounds_s) - SHOWN_ROUNDS),
            },
        }

    def record(self, now_s: float, seconds: float, owner: str | None) -> dict[str, Any]:
        """`requests` and `schedule` of the Result contract, `plans` beside them: what `timeline` reads."""
        runs = [run for run in self._runs if run.execution.end_s > now_s - seconds][-TIMELINE_RUNS:]
        schedule: list[dict[str, Any]] = []
        shared: dict[tuple[object, ...], dict[str, Any]] = {}
        for request_id, execution in runs:
            request = self._seen(request_id, owner)
            label = request.label if request else BUSY
            key = (execution.gpus, execution.start_s, execution.end_s, request is None)
            if execution.shared_with and key in shared:
                shared[key]["request_ids"].append(label)
                continue
            shared[key] = (
                execution._asdict()
                | {"request_ids": [label]}
                | ({} if request else {"kind": BUSY, "steps": 0})
            )
            schedule.append(shared[key])
        return {
            "requests": [
                {
                    "id": request.label,
                    "arrival_s": request.arrival_s,
                    "finish_s": request.finish_s,
                    "slo_s": None if request.deadline_s is None else request.deadline_s - request.arrival_s,
                    "met": request.outcome == "met",
                }
                for request in self._requests.values()
                if owner in (None, request.client) and (request.finish_s or now_s) > now_s - seconds
            ],
            "schedule": schedule,
            "plans": [plan._asdict() for plan in self._plans if plan.start_s > now_s - seconds],
        }

    def _seen(self, request_id: str, owner: str | None) -> _Request | None:
        request = self._requests.get(request_id)
        return request if request is not None and owner in (None, request.client) else None

    def _merged(
        self,
        runs: Iterable[tuple[Run, tuple[int, int]]],
        state: str,
        finest_s: float,
        now_s: float,
        owner: str | None,
    ) -> list[dict[str, Any]]:
        """Rows of the board in order of their start, each with how many ranges it stands for.

        Neighbours of one request on the same GPUs are one row where either is narrow, as narrow as it takes for the
        rows to find room; those of a request that is not shown are so always.
        """
        seen = []
        last: dict[tuple[object, ...], tuple[float, float]] = {}
        for (request_id, execution), place in sorted(runs, key=lambda one: one[0].execution.start_s):
            request = self._seen(request_id, owner)
            kind = execution.kind if request else BUSY
            start_s, end_s = round(execution.start_s - now_s, 3), round(execution.end_s - now_s, 3)
            key = (request_id if request else None, kind, execution.gpus, place)
            before_s, before_width_s = last.get(key, (-math.inf, 0.0))
            last[key] = max(before_s, end_s), end_s - start_s
            seam_s = math.inf  # joined to the one before where less than this is narrow
            if start_s - before_s <= finest_s:
                seam_s = min(end_s - start_s, before_width_s) if request else 0.0
            seen.append((execution, request, key, start_s, end_s, seam_s))
        fits = (
            narrow_s
            for narrow_s in (SEAM * finest_s, 8 * SEAM * finest_s)
            if sum(seam_s >= narrow_s for *_, seam_s in seen) <= SHOWN_RANGES
        )
        narrow_s = next(fits, math.inf)
        rows: list[dict[str, Any]] = []
        open_rows: dict[tuple[object, ...], dict[str, Any]] = {}
        for execution, request, key, start_s, end_s, seam_s in seen:
            if seam_s < narrow_s:
                row = open_rows[key]
                row["end_s"] = max(row["end_s"], end_s)
                row["steps"] += execution.steps if request else 0
                row["ranges"] += 1 if request else 0
                continue
            open_rows[key] = row = {
                "request": request.label if request else None,
                "colour": request.colour if request else None,
                "late": request is not None and request.is_late(now_s),
                "kind": key[1],
                "steps": execution.steps if request else 0,
                "ranges": 1 if request else 0,
                "gpus": runs_of(execution.gpus),
                "share": key[3],
                "start_s": start_s,
                "end_s": end_s,
                "state": state,
            }
            rows.append(row)
        return rows

    def _rates_at(self, now_s: float, ahead: Sequence[Run]) -> list[dict[str, Any]]:
        """SLO attainment and use of the GPUs, over all clients."""
        if now_s - self._rated_s >= RATES_AGE_S:
            self._rated_s = now_s
            self._rates = [self._rate(now_s, window_s, ahead) for window_s in RATE_WINDOWS_S]
        return self._rates

    def _rate(self, now_s: float, window_s: float, ahead: Sequence[Run]) -> dict[str, Any]:
        from_s = max(now_s - window_s, self._start_s)
        first = math.floor(from_s)
        busy_s = self._busy_s.get(first, 0.0) * (first + 1 - from_s)
        busy_s += sum(seconds for second, seconds in self._busy_s.items() if second > first)
        for _, execution in ahead:
            seconds = min(execution.end_s, now_s) - max(execution.start_s, from_s)
            busy_s += len(execution.gpus) * max(0.0, seconds) / (1 + execution.shared_with)
        after = itertools.takewhile(lambda i: self._finish_s(i) > now_s - window_s, reversed(self._ended))
        recent = [self._requests[request_id] for request_id in after]
        due = [r for r in recent if r.deadline_s is not None and r.outcome not in BLAMELESS]
        met = sum(request.outcome == "met" for request in due)
        return {
            "seconds": window_s,
            "met": met,
            "missed": len(due) - met,
            "slo_attainment": round(met / len(due), 4) if due else None,
            "gpu_use": round(min(1.0, busy_s / (self._n_gpus * max(now_s - from_s, 1e-3))), 4),
        }


def _placed(runs: Iterable[Run]) -> list[tuple[Run, tuple[int, int]]]:
    """Each with (which, of how many) it is of those who shared its steps: what was shared ran at the same time."""
    seen: defaultdict[tuple[object, ...], int] = defaultdict(int)
    placed = []
    for run in runs:
        execution = run.execution
        key = (execution.kind, execution.gpus, execution.start_s, execution.end_s)
        placed.append((run, (min(seen[key], execution.shared_with), execution.shared_with + 1)))
        seen[key] += 1
    return placed


def runs_of(gpus: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive GPUs as (first, count)."""
    runs: list[tuple[int, int]] = []
    for gpu in sorted(gpus):
        if runs and gpu == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((gpu, 1))
    return runs


def _request_row(request: _Request, now_s: float) -> dict[str, Any]:
    def from_now(at_s: float | None) -> float | None:
        return None if at_s is None else round(at_s - now_s, 3)

    return {
        "request": request.label,
        "colour": request.colour,
        "shape": str(request.shape),
        "steps": request.steps,
        "steps_done": request.steps_done,
        "arrival_s": from_now(request.arrival_s),
        "deadline_s": from_now(request.deadline_s),
        "outcome": request.outcome,
        "late": request.is_late(now_s),
    }
