"""Schedules as trace events for ui.perfetto.dev and chrome://tracing: of simulated runs and of live cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tetriserve.scheduler.history import BUSY

PLANNER = 1_000_000
"""Number of the planner's track, behind those of the GPUs."""


def timeline(cells: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Trace events: a track per GPU with a slice per range, arrows where a request is handed to other GPUs, and
    requests as async spans.

    Each cell is two processes, its GPUs and its requests (arrival to finish). Times are microseconds.

    Args:
        cells: by number, each `requests` and `schedule` of the Result contract, in order of start; a live one's
            `plans` too.
    """
    events: list[dict[str, Any]] = []
    for cell, record in cells.items():
        events += _cell_events(cell, record)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _cell_events(cell: int, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    gpu_pid, request_pid = 2 * cell, 2 * cell + 1
    tracks = {gpu: f"GPU {gpu}" for gpu in sorted({g for entry in record["schedule"] for g in entry["gpus"]})}
    if "plans" in record:
        tracks[PLANNER] = "planner"
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": gpu_pid, "name": "process_name", "args": {"name": f"cell {cell}: GPUs"}},
        {"ph": "M", "pid": request_pid, "name": "process_name", "args": {"name": f"cell {cell}: requests"}},
    ]
    events += [
        {"ph": "M", "pid": gpu_pid, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in tracks.items()
    ]
    before: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(record["schedule"]):
        name = " + ".join(entry["request_ids"])
        args = {"steps": entry["steps"], "degree": len(entry["gpus"]), "gpus": entry["gpus"]}
        start_us, end_us = entry["start_s"] * 1e6, entry["end_s"] * 1e6
        events += [
            {"ph": "X", "pid": gpu_pid, "tid": gpu, "name": name, "cat": entry["kind"], "ts": start_us}
            | {"dur": end_us - start_us, "args": args}
            for gpu in entry["gpus"]
        ]
        for request_id in entry["request_ids"]:
            last = before.get(request_id)
            if last is not None and request_id != BUSY and set(last["gpus"]) != set(entry["gpus"]):
                # an arrow belongs to the slice around its time, so it leaves from within
                leaves_us = 1e6 * (last["start_s"] + last["end_s"]) / 2
                arrow = {"pid": gpu_pid, "cat": "hand-off", "name": "hand-off", "id": f"{cell}.{number}"}
                events.append({**arrow, "ph": "s", "tid": last["gpus"][0], "ts": leaves_us})
                events.append({**arrow, "ph": "f", "bp": "e", "tid": entry["gpus"][0], "ts": start_us})
            before[request_id] = entry
    for plan in record.get("plans", ()):
        planner = {"pid": gpu_pid, "tid": PLANNER, "ts": plan["start_s"] * 1e6}
        name = "plan (fallback)" if plan["fell_back"] else "plan"
        events.append({**planner, "ph": "X", "name": name, "cat": "plan", "dur": plan["seconds"] * 1e6})
    for boundary_s in sorted({plan["boundary_s"] for plan in record.get("plans", ())}):
        events.append(
            {"ph": "i", "s": "p", "pid": gpu_pid, "tid": PLANNER, "name": "round", "ts": boundary_s * 1e6}
        )
    for request in record["requests"]:
        if request["finish_s"] is None:
            continue
        common = {"pid": request_pid, "tid": 0, "cat": "request", "name": request["id"]}
        common["id"] = f"{cell}.{request['id']}"
        args = {"slo_s": request["slo_s"], "met": request["met"]}
        events.append({**common, "ph": "b", "ts": request["arrival_s"] * 1e6, "args": args})
        events.append({**common, "ph": "e", "ts": request["finish_s"] * 1e6})
    return events
