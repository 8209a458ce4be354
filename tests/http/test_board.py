"""The live board and the live timeline: what is on them, who sees what, and that they stay small."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

import pytest
from http_app import NOW_S, Cell, ask, check_error

from deployments.cell.scheduler import Scheduler
from deployments.config import AppArgs, HTTPArgs
from deployments.http.keys import Keys
from solver.problem import Entry as Packed
from solver.problem import Job, Packing, Snapshot
from tetriserve.model_info import ModelInfo
from tetriserve.profile import Profile
from tetriserve.request import Execution, GenerateRequest, Shape
from tetriserve.scheduler.history import KEPT_S, MAX_RUNS, History, Plan, Run
from tetriserve.scheduler.live_profile import LiveProfile
from tetriserve.scheduler.rounds import RoundScheduler
from tetriserve.simulation.timeline import timeline

SMALL = Shape(256, 256)
INFO = ModelInfo("m", "flux", 16, 16, 64, 4, "true_cfg_scale", 4096, 1 << 20, 2048, 8, 200, 3.5, 100)
KEYS = ("first-key-0123456789", "second-key-0123456789")


def arrive(history: History, name: str, slo_s: float | None = 5.0, client: str | None = None) -> None:
    deadline_s = None if slo_s is None else NOW_S - 8 + slo_s
    history.arrived(name, name, client, SMALL, 8, NOW_S - 8, deadline_s)


def run(history: History, name: str, start_s: float, end_s: float, *gpus: int, kind: str = "denoise") -> None:
    """Times from `NOW_S`."""
    history.ran(name, Execution(kind, 2, gpus, NOW_S + start_s, NOW_S + end_s))


def busy_minute() -> History:
    """Of two clients on two GPUs: `a` changes its degree and is late, `b` is on time, `c` is open."""
    history = History(2, NOW_S - 60)
    for name, client in (("a", "anna"), ("b", "bert"), ("c", "anna")):
        arrive(history, name, client=client)
    run(history, "a", -7.5, -7.0, 0, kind="encode")
    run(history, "a", -7.0, -6.0, 0)
    run(history, "a", -5.995, -5.0, 0)
    run(history, "b", -7.0, -5.0, 1)
    run(history, "a", -5.0, -2.0, 0, 1)
    history.ended("b", "met", NOW_S - 4)
    history.ended("a", "late", NOW_S - 2)
    history.planned(Plan(NOW_S - 7.5, 0.004, False, NOW_S - 5.0))
    history.planned(Plan(NOW_S - 5.0, 0.050, True, NOW_S - 2.0))
    return history


def show(history: History, owner: str | None = None, ahead: tuple[Run, ...] = ()) -> Any:
    board = history.board(NOW_S, 30, owner, ahead, ("ready", "lost"))
    return json.loads(json.dumps(board))


def test_the_board_shows_ranges_degrees_deadlines_and_rounds() -> None:
    ahead = (
        Run("c", Execution("denoise", 3, (0,), NOW_S - 0.5, NOW_S + 1)),
        Run("c", Execution("denoise", 3, (0, 1), NOW_S + 1, NOW_S + 2)),
    )
    board = show(busy_minute(), ahead=ahead)
    a, b, c = ({row["request"]: row for row in board["requests"]}[label] for label in labels(board))
    rows = [
        (row["request"], row["kind"], row["steps"], row["gpus"], row["start_s"], row["end_s"], row["state"])
        for row in board["ranges"]
    ]
    assert rows == [
        (a["request"], "encode", 2, [[0, 1]], -7.5, -7.0, "done"),
        (a["request"], "denoise", 2, [[0, 1]], -7.0, -6.0, "done"),
        (b["request"], "denoise", 2, [[1, 1]], -7.0, -5.0, "done"),
        (a["request"], "denoise", 2, [[0, 1]], -5.995, -5.0, "done"),  # 5 ms behind the one before
        (a["request"], "denoise", 2, [[0, 2]], -5.0, -2.0, "done"),
        (c["request"], "denoise", 3, [[0, 1]], -0.5, 1.0, "running"),
        (c["request"], "denoise", 3, [[0, 2]], 1.0, 2.0, "planned"),
    ]
    assert [row["late"] for row in (a, b, c)] == [True, False, True]  # c is open behind its deadline
    assert all(row["late"] == (row["request"] != b["request"]) for row in board["ranges"])
    assert (c["outcome"], c["deadline_s"], c["steps"], a["steps_done"]) == ("open", -3.0, 8, 6)
    assert len({row["colour"] for row in (a, b, c)}) == 3
    assert board["from_s"] == -30
    assert (board["gpus"], board["rounds_s"]) == (["ready", "lost"], [-5.0, -2.0])
    assert (board["open_requests"], board["waiting_requests"]) == (1, 0)
    minute = board["rates"][0]
    assert (minute["seconds"], minute["met"], minute["missed"], minute["slo_attainment"]) == (60, 1, 1, 0.5)
    # a: 2.495 s on one GPU and 3 s on two, b: 2 s, c: 0.5 s
    assert minute["gpu_use"] == pytest.approx((2.495 + 6 + 2 + 0.5) / 120, abs=1e-4)


def test_ranges_too_narrow_to_be_told_apart_are_one_that_says_so() -> None:
    history = History(1, NOW_S - 300)
    arrive(history, "a")
    for number in range(50):
        run(history, "a", -5 + number / 50, -5 + (number + 1) / 50, 0)
    run(history, "a", -4, -3, 0)
    rows = [(row["ranges"], row["start_s"], row["end_s"]) for row in show(history)["ranges"]]
    assert rows == [(51, -5.0, -3.0)]  # the last one joins a narrow one
    for number in range(5):
        run(history, "a", -2 + number / 5, -2 + (number + 1) / 5, 0)
    assert [row["ranges"] for row in show(history)["ranges"]] == [51] + [1] * 5


def test_those_who_share_a_range_have_a_strip_of_it_each() -> None:
    """And together they keep its GPU busy once."""
    history = History(1, NOW_S - 10)
    for name, client in (("a", "anna"), ("b", "anna"), ("c", "bert")):
        arrive(history, name, client=client)
        history.ran(name, Execution("denoise", 2, (0,), NOW_S - 4, NOW_S - 2, 0, 2))
    ahead = tuple(Run(name, Execution("denoise", 1, (0,), NOW_S - 2, NOW_S, 0, 1)) for name in "ab")
    board = show(history, ahead=ahead)
    assert [row["share"] for row in board["ranges"]] == [[0, 3], [1, 3], [2, 3], [0, 2], [1, 2]]
    assert len({row["request"] for row in board["ranges"]}) == 3
    assert board["rates"][0]["gpu_use"] == pytest.approx(0.4)
    mine = show(history, "anna")["ranges"]
    assert [row["share"] for row in mine] == [[0, 3], [1, 3], [2, 3]]
    assert mine[2]["request"] is None and mine[2]["kind"] == "busy"
    (row,) = history.record(NOW_S, 30, None)["schedule"]
    assert len(row["request_ids"]) == 3
    own, busy = history.record(NOW_S, 30, "anna")["schedule"]
    assert len(own["request_ids"]) == 2 and busy["request_ids"] == ["busy"]


def labels(board: Any) -> list[str]:
    """Of a, b and c: the open one is listed first."""
    c, a, b = (row["request"] for row in board["requests"])
    return [a, b, c]


def test_outcomes_that_say_nothing_about_deadlines_do_not_count() -> None:
    history = History(1, NOW_S - 300)
    for name, outcome in (("a", "cancelled"), ("b", "deadline_infeasible"), ("c", "out_of_memory")):
        arrive(history, name)
        history.ended(name, outcome, NOW_S - 100)
    arrive(history, "d", slo_s=None)
    history.ended("d", "no_deadline", NOW_S)
    minute, minutes = show(history)["rates"]
    assert (minute["missed"], minute["slo_attainment"]) == (0, None)
    assert (minutes["missed"], minutes["slo_attainment"]) == (2, 0.0)


def test_a_client_sees_of_others_only_that_gpus_are_busy() -> None:
    history = busy_minute()
    ahead = (Run("c", Execution("denoise", 3, (0,), NOW_S - 0.5, NOW_S + 1)),)
    everything, board = show(history, ahead=ahead), show(history, "bert", ahead)
    (mine,) = board["requests"]
    others = [row for row in board["ranges"] if row["request"] != mine["request"]]
    assert {row["gpus"][0][1] for row in others} == {1, 2}
    for row in others:
        anonymous = (row["request"], row["colour"], row["late"], row["kind"], row["steps"])
        assert anonymous == (None, None, False, "busy", 0)
    # what ran on the same GPUs one behind the other cannot be told apart
    assert (others[0]["start_s"], others[0]["end_s"]) == (-7.5, -5.0)
    a, _, c = labels(everything)
    assert a not in json.dumps(board) and c not in json.dumps(board)
    assert show(history, "nobody")["requests"] == []

    record = json.dumps(timeline({0: history.record(NOW_S, 60, "bert")}))
    assert a not in record and mine["request"] in record and '"busy"' in record
    assert "hand-off" not in record


def test_nothing_that_a_request_said_is_kept() -> None:
    history = History(1, NOW_S)
    history.arrived("img_secret#1", "img_secret", "anna", SMALL, 8, NOW_S - 1, None)
    run(history, "img_secret#1", -1, 0, 0)
    text = json.dumps([show(history, "anna"), history.record(NOW_S, 60, "anna")])
    assert "secret" not in text and "anna" not in text


def test_a_full_board_is_small_and_says_what_it_leaves_out() -> None:
    history = History(64, NOW_S - 1000)
    for number in range(3000):
        arrive(history, f"r{number}", slo_s=number % 9 + 0.123)
        for step in range(4):
            start_s = -30 + number / 100 + step / 7
            first = number % 32 * 2
            run(history, f"r{number}", start_s, start_s + 0.1, *range(first, first + 1 + step % 2))
        run(history, f"r{number}", -1, -0.995, 0)
        if number < 2500:
            history.ended(f"r{number}", "late", NOW_S - 1)
        history.planned(Plan(NOW_S - number / 100, 0.01, False, NOW_S - number / 100))
    board = history.board(NOW_S, 30, None, (), ["ready"] * 64)
    assert len(json.dumps(board, separators=(",", ":"))) < 200_000
    assert board["open_requests"] == 500
    assert len(board["ranges"]) + board["left_out"]["ranges"] == 15_000
    assert sum(row["outcome"] == "open" for row in board["requests"]) == 500
    assert board["left_out"]["rounds"] > 0
    assert -30 < board["from_s"] == board["ranges"][0]["start_s"]
    newest_s = max(row["start_s"] for row in board["ranges"])
    assert newest_s == pytest.approx(-30 + 29.99 + 3 / 7, abs=0.01)


def test_what_is_old_or_too_much_is_forgotten() -> None:
    history = History(1, NOW_S - 2 * KEPT_S)
    arrive(history, "open")
    for number in range(MAX_RUNS + 10):
        arrive(history, f"r{number}")
        run(history, f"r{number}", -KEPT_S - 100, -KEPT_S - 99, 0)
        history.ended(f"r{number}", "met", NOW_S - KEPT_S - 99)
    assert len(history.record(NOW_S, 2 * KEPT_S, None)["requests"]) <= MAX_RUNS
    arrive(history, "new")
    run(history, "new", -2, -1, 0)
    history.ended("new", "met", NOW_S - 1)
    record = history.record(NOW_S, 2 * KEPT_S, None)
    assert len(record["schedule"]) == 1 and len(record["requests"]) == 2


def test_the_live_timeline_has_plans_hand_offs_and_a_process_for_each_cell() -> None:
    record = busy_minute().record(NOW_S, 60, None)
    events = json.loads(json.dumps(timeline({0: record, 3: record})))["traceEvents"]
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert set(processes) == {0, 1, 6, 7} and processes[6] == "cell 3: GPUs"
    tracks = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert tracks == ["GPU 0", "GPU 1", "planner"] * 2
    first = [event for event in events if event["pid"] in (0, 1)]
    plans = [(event["name"], event["dur"]) for event in first if event.get("cat") == "plan"]
    assert plans == [("plan", pytest.approx(4000)), ("plan (fallback)", pytest.approx(50_000))]
    assert sum(event["name"] == "round" for event in first) == 2
    leaves, arrives = (event for event in first if event["name"] == "hand-off")
    assert leaves["ph"] == "s" and arrives["ph"] == "f" and leaves["id"] == arrives["id"]
    slices = [event for event in first if event["ph"] == "X" and event["tid"] == leaves["tid"]]
    around = [s for s in slices if s["ts"] <= leaves["ts"] < s["ts"] + s["dur"]]
    assert [s["args"]["degree"] for s in around] == [1]
    assert arrives["ts"] == pytest.approx(1e6 * (NOW_S - 5))
    spans = [event["ph"] for event in first if event.get("cat") == "request"]
    assert spans == ["b", "e"] * 2


class Wide:
    """Gives every open request both GPUs."""

    name = "wide"
    round_steps = 1.0
    replans_on_arrival = True

    def __call__(self, snapshot: Snapshot) -> Packing:
        def entry(job: Job) -> Packed:
            phase = job.phases[0]
            gpus = (0,) if phase.kind != "denoise" else (0, 1)
            end_s = snapshot.now_s + phase.steps * phase.step_s[len(gpus)]
            return Packed((job.id,), phase.kind, gpus, phase.steps, snapshot.now_s, end_s)

        return Packing(tuple(entry(job) for job in snapshot.jobs))


def test_use_of_the_gpus_is_that_of_the_window() -> None:
    history = History(2, NOW_S - 1000)
    run(history, "a", -90, -30.25, 0)  # half of it before the minute
    run(history, "b", -400, -299.5, 0, 1)
    arrive(history, "a")
    minute, minutes = show(history, ahead=(Run("a", Execution("denoise", 1, (1,), NOW_S - 5, NOW_S + 5)),))[
        "rates"
    ]
    assert minute["gpu_use"] == pytest.approx((29.75 + 5) / 120, abs=1e-3)
    assert minutes["gpu_use"] == pytest.approx((59.75 + 1 + 5) / 600, abs=1e-3)


def test_the_scheduler_says_what_it_committed_and_how_its_gpus_are() -> None:
    async def check() -> None:
        scheduler = Scheduler(AppArgs.parse({"cell": {"gpus": 2, "device": "cpu"}}), None)  # type: ignore[arg-type]
        starting = await scheduler.board(10, None)
        assert starting["gpus"] == ["lost", "lost"] and starting["ranges"] == []
        scheduler._state.failure, scheduler._state.info = "", INFO
        scheduler._state.profile = LiveProfile(
            Profile("m", "d", "made up", (1, 2), {SMALL: {1: 0.5, 2: 0.3}})
        )
        scheduler._state.rounds = RoundScheduler(Wide(), 2)
        scheduler._state.lost = {1}
        request = GenerateRequest("a cat", 256, 256, 4, seed=0, request_id="r", slo_s=60.0)
        scheduler._requests.join(request, "call")
        scheduler._state.rounds.plan(time.monotonic())
        board = await scheduler.board(30, None)
        assert board["gpus"] == ["ready", "lost"]
        (row,) = board["requests"]
        assert row["deadline_s"] == pytest.approx(60, abs=5) and row["outcome"] == "open"
        (encode,) = board["ranges"]
        assert (encode["request"], encode["kind"], encode["gpus"]) == (row["request"], "encode", [(0, 1)])
        assert board["open_requests"] == 1 and board["waiting_requests"] == 0
        await scheduler.cancel("r", "call")
        assert (await scheduler.board(60, None))["open_requests"] == 0
        (gone,) = (await scheduler.record(30, None))["requests"]
        assert gone["finish_s"] is not None and not gone["met"]

    asyncio.run(check())


def test_over_http_each_key_sees_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOARD_KEYS", ",".join(KEYS))
    limits = {"api_keys_env": "BOARD_KEYS"}
    cell = Cell()
    known = Keys(HTTPArgs(**limits))
    owners = [known.owner(f"Bearer {key}") for key in KEYS]
    for name, owner in zip("ab", owners, strict=True):
        arrive(cell.history, name, client=owner)
        run(cell.history, name, -3, -1, 0)
    for path in ("/v1/board", "/debug/timeline"):
        assert ask(cell, "GET", path, limits).status_code == 401
    seen = []
    for key in KEYS:
        headers = {"Authorization": f"Bearer {key}"}
        (board,) = ask(cell, "GET", "/v1/board", limits, headers=headers).json()["cells"]
        assert board["cell"] == 0 and [row["kind"] for row in board["ranges"]] != ["denoise"] * 2
        (request,) = board["requests"]
        seen.append(request["request"])
        trace = ask(cell, "GET", "/debug/timeline", limits, headers=headers).json()["traceEvents"]
        assert {event["name"] for event in trace if event["ph"] == "X"} == {request["request"], "busy"}
    assert seen[0] != seen[1]
    assert len(ask(cell, "GET", "/v1/board?seconds=300").json()["cells"][0]["requests"]) == 2


def test_wrong_seconds_are_named() -> None:
    for path, seconds in (("/v1/board", "301"), ("/v1/board", "soon"), ("/debug/timeline", "0")):
        check_error(ask(Cell(), "GET", f"{path}?seconds={seconds}"), 400, "invalid_value", "seconds")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/page/main.js", "javascript"),
        ("/page/style.css", "text/css"),
        ("/page/icon.svg", "svg"),
    ],
)
def test_the_page_is_served_whole_and_asked_for_again_cheaply(path: str, kind: str) -> None:
    first = ask(Cell(), "GET", path)
    assert first.status_code == 200 and kind in first.headers["content-type"]
    assert first.headers["cache-control"] == "no-cache"
    assert first.headers["content-security-policy"].startswith(
        "default-src 'self'; img-src 'self' data: blob:;"
    )
    again = ask(Cell(), "GET", path, headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    assert ask(Cell(), "HEAD", path).headers["content-length"] == str(len(first.content))


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = ask(Cell(), "GET", "/").text
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(links) == 3 and all(ask(Cell(), "GET", f"/{link}").status_code == 200 for link in links)
    assert "<style" not in html and " style=" not in html and "<script>" not in html


def test_only_files_of_the_page_are_served() -> None:
    for path in ("/page/none.js", "/page/../app.py", "/page/%2e%2e%2fapp.py", "/page/", "/nothing"):
        check_error(ask(Cell(), "GET", path), 404, "not_found")
    assert ask(Cell(), "POST", "/page/main.js").status_code == 405
