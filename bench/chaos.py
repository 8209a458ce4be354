"""A live server under open-loop load while its processes are killed and stopped.

    python bench/chaos.py [--requests 200] [--faults 20] [--gpus 2] [--seed 0] [--rate 30] [--kinds replica-kill ...]

Plays a mixed 256/512/1024 trace with deadlines fault-free, then once more on the same server, same prompts and
seeds, with faults at seeded times: SIGKILL and SIGSTOP of GPU replicas and of the scheduler actor, SIGKILL of the
ingress replica. The victim is drawn among the processes of its kind that live at that moment, replacements that are
still loading included; where there is none, the fault waits for one.

Every request carries an `Idempotency-Key`. A client whose connection breaks, or who gets an error that Ray Serve's
proxy made or a 503 with Retry-After, sends it again under the same key. It counts as lost when another error comes or
no picture within --patience seconds. Latency, and so SLO attainment, runs from the trace's arrival to the picture.

How recovery is measured. Faults are timed here, a death by looking at /proc every 20 ms; replicas time the ranges of
`metrics.schedule`, the scheduler those of `metrics.lost` (ranges sent out that did not count). All are Unix time of
one host. Recovery runs from the death, of a stopped GPU replica from the stop, of any other stopped process from when
the watchdog ends it, to

- GPU replica: the end of the next committed range of a request that lost a range to it, once for the first such
  request and once for each of them. A loss belongs to the death of a replica that was shortly before, else to a stop
  whose process had not died yet. A replica that was hit with nothing in flight has no such request, nor has one whose
  requests soon went to another cell: such faults are not measured.
- scheduler: the end of the next committed range of any request, all of which it held.
- ingress: the next answer.

The configuration is cluster_configs/cpu_local.yaml but for `step_timeout_floor_s`, after which the watchdog ends a
replica that answers no calls: 5 instead of 30 s; for `load_timeout_s`, after which it ends one that was stopped while
it loaded: 60 instead of 900 s; and for `max_losses`, so high that no GPU is left out however often it is hit.
Writes `chaos.json` and `chaos.md` to --out.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import shlex
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from server import MIX, RunningServer, Setup, local_setup, running_server
from tqdm import tqdm

from tetriserve.simulation.trace import TraceRequest

ROLES = {
    "replica": "ray::GPUReplica",
    "scheduler": "ray::Scheduler",
    "ingress": "ray::ServeReplica:tetriserve:Ingress",
    "cell": "ray::ServeReplica:tetriserve:Cell",
}
"""What a process of the server has in its command line."""

KINDS = {"replica-kill": 8, "replica-stop": 5, "scheduler-kill": 3, "scheduler-stop": 1, "ingress-kill": 3}
"""Kinds of faults and how often they come relative to each other."""

WATCHDOG_FLOOR_S = 5.0
DEATH_SEEN_S = 0.5
"""So much later than the scheduler we may see a death, on busy cores."""
LOSS_SEEN_S = 7.0
"""So much later than a death the scheduler may give up its ranges: it asks their other members, who have 5 s."""
LOAD_TIMEOUT_S = 60.0
PROMPTS = (
    "a small red circle above a large blue square",
    "a green star",
    "two yellow triangles on a grey ground",
)
CONNECT_TIMEOUT_S = 10.0
RESEND_PAUSE_S = 1.0
SETTLE_S = 300.0
"""How long the server may take to have all GPUs back and nothing open after a run."""


@dataclass(frozen=True)
class Fault:
    """A planned fault; `draw` in [0, 1) chooses among the processes that live then."""

    at_s: float
    kind: str
    draw: float


@dataclass
class Struck:
    """A fault as it happened, Unix seconds; `died_s` is None for a process that outlived the run."""

    kind: str
    pid: int
    struck_s: float
    died_s: float | None = None


@dataclass
class Answer:
    """What one request came to, Unix seconds; `sends` counts its POSTs, `again` says why there were more than one."""

    request: TraceRequest
    arrival_s: float
    finish_s: float | None = None
    sends: int = 0
    again: list[str] = field(default_factory=list)
    error: str = ""
    picture: np.ndarray | None = None
    schedule: list[dict[str, Any]] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)

    @property
    def met(self) -> bool:
        assert self.request.slo_s is not None
        return self.finish_s is not None and self.finish_s - self.arrival_s <= self.request.slo_s


@dataclass(frozen=True)
class Gauges:
    """The server at rest: private memory (resident minus shared) of its processes in MiB by role, and its cell."""

    memory_mib: dict[str, float]
    processes: dict[str, int]
    gpus_ready: int
    open_requests: int
    running: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=30.0, metavar="PER_MINUTE")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--shapes", default=MIX, help="with weights")
    parser.add_argument("--slo", default="3x", help="deadline, times the best time alone")
    parser.add_argument("--patience", type=float, default=300.0, metavar="S", help="for one picture")
    parser.add_argument("--gpus", type=int, default=2, help="replicas")
    parser.add_argument("--profile", type=Path, help="step times; default: measured first")
    parser.add_argument("--out", type=Path, default=Path("bench/results/chaos"))
    options = parser.parse_args()

    cell = {
        "step_timeout_floor_s": WATCHDOG_FLOOR_S,
        "load_timeout_s": LOAD_TIMEOUT_S,
        "max_losses": 10 * options.faults,
        "gpus": options.gpus,
    }
    with local_setup(options.profile, **cell) as setup:
        trace = make_trace(options, setup)
        faults = make_faults(options, trace)
        with running_server(setup.config, setup.args["scheduler"]["policy"]) as server:
            fresh = asyncio.run(settled(server))
            calm, _ = asyncio.run(play(server, trace, (), "calm", options.patience))
            before = asyncio.run(settled(server))
            rough, struck = asyncio.run(play(server, trace, faults, "rough", options.patience))
            after = asyncio.run(settled(server))
    result = {
        "command": "python bench/chaos.py " + shlex.join(sys.argv[1:]),
        "gauges": {"fresh": asdict(fresh), "before the faults": asdict(before), "after them": asdict(after)},
        **evaluate(calm, rough, struck),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "chaos.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "chaos.md").write_text(report(result))
    print(report(result))


def make_trace(options: argparse.Namespace, setup: Setup) -> list[TraceRequest]:
    """The trace, every request with a prompt and a seed of its own."""
    trace = setup.mixed_trace(
        options.rate,
        options.requests,
        shapes=options.shapes,
        slo=options.slo,
        steps=options.steps,
        seed=options.seed,
    )
    return [
        replace(request, prompt=PROMPTS[number % len(PROMPTS)], seed=number)
        for number, request in enumerate(trace)
    ]


def make_faults(options: argparse.Namespace, trace: Sequence[TraceRequest]) -> list[Fault]:
    """Uniform over the time of the arrivals; the kinds in their proportion, at least one of each if they fit."""
    rng = np.random.default_rng((options.seed, 1))
    kinds: list[str] = []
    while len(kinds) < options.faults:
        # the kind that is furthest behind its share
        kinds.append(min(options.kinds, key=lambda kind: (kinds.count(kind) + 0.5) / KINDS[kind]))
    times_s = np.sort(rng.uniform(trace[0].arrival_s, trace[-1].arrival_s, options.faults))
    return [
        Fault(float(at_s), kinds[index], float(rng.random()))
        for at_s, index in zip(times_s, rng.permutation(options.faults), strict=True)
    ]


async def play(
    server: RunningServer,
    trace: Sequence[TraceRequest],
    faults: Sequence[Fault],
    name: str,
    patience_s: float,
) -> tuple[list[Answer], list[Struck]]:
    """Send the trace and strike, each at its time, and wait for all answers; `name` keeps the runs' keys apart."""
    limits = httpx.Limits(max_connections=None)
    timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=timeout) as client:
        bar = tqdm(total=len(trace), desc=name, unit="request")
        start_s = time.time()
        struck: list[Struck] = []
        strikes = [asyncio.create_task(strike(server, fault, start_s, struck)) for fault in faults]

        async def one(request: TraceRequest) -> Answer:
            answer = Answer(request, start_s + request.arrival_s)
            await asyncio.sleep(answer.arrival_s - time.time())
            try:
                await asyncio.wait_for(ask(client, answer, f"{name}-{start_s}-{request.id}"), patience_s)
            except asyncio.TimeoutError:
                answer.error = (
                    f"no picture within {patience_s:g} s, last: {(answer.again or ['silence'])[-1]}"
                )
            bar.update()
            return answer

        answers = await asyncio.gather(*(one(request) for request in trace))
        bar.close()
        # whoever still stands: an idle replica is not watched, there is nothing it holds up
        for one_struck in struck:
            if one_struck.died_s is None and psutil.pid_exists(one_struck.pid):
                psutil.Process(one_struck.pid).resume()
        for task in strikes:
            task.cancel()
        for outcome in await asyncio.gather(*strikes, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        return list(answers), struck


async def ask(client: httpx.AsyncClient, answer: Answer, key: str) -> None:
    """POST until there is a picture or an error that sending again does not mend."""
    request = answer.request
    body = {
        "prompt": request.prompt,
        "size": f"{request.width}x{request.height}",
        "num_inference_steps": request.num_inference_steps,
        "seed": request.seed,
        "slo_ms": 1000 * request.slo_s if request.slo_s is not None else None,
    }
    while True:
        answer.sends += 1
        pause_s = RESEND_PAUSE_S
        try:
            response = await client.post(
                "/v1/images/generations", json=body, headers={"Idempotency-Key": key}
            )
        except httpx.HTTPError as error:
            answer.again.append(f"{type(error).__name__}: {error}")
        else:
            if response.status_code == 200:
                answer.finish_s = time.time()
                [item] = response.json()["data"]
                answer.picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))
                answer.schedule, answer.lost = item["metrics"]["schedule"], item["metrics"]["lost"]
                return
            ours = response.headers["content-type"].startswith("application/json")
            said = response.json()["error"] if ours else {"code": "proxy", "message": response.text[:100]}
            reason = f"{response.status_code} {said['code']}: {said['message']}"
            if ours and "retry-after" not in response.headers:
                answer.error = reason
                return
            answer.again.append(reason)
            pause_s = float(response.headers.get("retry-after", RESEND_PAUSE_S))
        await asyncio.sleep(pause_s)


async def strike(server: RunningServer, fault: Fault, start_s: float, struck: list[Struck]) -> None:
    """Kill or stop a process at its time and write down when it died."""
    await asyncio.sleep(start_s + fault.at_s - time.time())
    role, blow = fault.kind.split("-")
    while True:
        alive = [p for p in await asyncio.to_thread(processes, server, role) if is_up(p)]
        if alive:
            victim = sorted(alive, key=lambda process: process.pid)[int(fault.draw * len(alive))]
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL if blow == "kill" else signal.SIGSTOP)
                break
        await asyncio.sleep(0.1)
    done = Struck(fault.kind, victim.pid, time.time())
    struck.append(done)
    while is_alive(victim):
        await asyncio.sleep(0.02)
    done.died_s = time.time()


def processes(server: RunningServer, role: str) -> list[psutil.Process]:
    """Those of a role, dead ones that were not looked after yet included."""
    found = []
    for process in psutil.Process(server.pid).children(recursive=True):
        try:
            if ROLES[role] in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def is_alive(process: psutil.Process) -> bool:
    return status(process) not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def is_up(process: psutil.Process) -> bool:
    """Alive and not stopped by an earlier fault."""
    return is_alive(process) and status(process) != psutil.STATUS_STOPPED


def status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_DEAD)


async def settled(server: RunningServer) -> Gauges:
    """The gauges once every GPU is ready and nothing is open or running, or as they are after `SETTLE_S`."""
    end_s = time.monotonic() + SETTLE_S
    async with httpx.AsyncClient(base_url=server.url, timeout=CONNECT_TIMEOUT_S) as client:
        while True:
            try:
                cells = (await client.get("/health")).json()["cells"]
            except (httpx.HTTPError, ValueError):
                cells = []
            rest = [(c["gpus"] - c["gpus_ready"], c["open_requests"], c["running"]) for c in cells]
            if rest == [(0, 0, 0)] or time.monotonic() > end_s:
                break
            await asyncio.sleep(0.5)
    found = {role: [p for p in processes(server, role) if is_alive(p)] for role in ROLES}
    return Gauges(
        memory_mib={role: round(sum(map(private_mib, mine)), 1) for role, mine in found.items()},
        processes={role: len(mine) for role, mine in found.items()},
        gpus_ready=sum(cell["gpus_ready"] for cell in cells),
        open_requests=sum(cell["open_requests"] for cell in cells),
        running=sum(cell["running"] for cell in cells),
    )


def private_mib(process: psutil.Process) -> float:
    memory = process.memory_info()
    return float(memory.rss - memory.shared) / 2**20


def evaluate(calm: Sequence[Answer], rough: Sequence[Answer], struck: Sequence[Struck]) -> dict[str, Any]:
    """All figures, ready for JSON."""
    compared = [
        int(np.abs(a.picture.astype(int) - b.picture.astype(int)).max())
        for a, b in zip(calm, rough, strict=True)
        if a.picture is not None and b.picture is not None
    ]
    faults = recoveries(rough, struck)
    return {
        "requests": len(rough),
        "lost": {"calm": [lost(a) for a in calm if a.error], "rough": [lost(a) for a in rough if a.error]},
        "pictures": {
            "compared": len(compared),
            "bit_equal": sum(difference == 0 for difference in compared),
            "different": sum(difference > 1 for difference in compared),
            "max_difference": max(compared, default=0),
        },
        "slo_attainment": {"calm": attainment(calm), "rough": attainment(rough)},
        "latency_s": {"calm": latency(calm), "rough": latency(rough)},
        "sent_again": {
            "requests": sum(answer.sends > 1 for answer in rough),
            "reasons": Counter(reason[:120] for answer in rough for reason in answer.again),
        },
        "ranges_lost": {"calm": ranges_lost(calm), "rough": ranges_lost(rough)},
        "faults": faults,
        "recovery_s": {
            kind: quantiles([fault["recovery_s"] for fault in faults if fault["kind"] == kind])
            for kind in dict.fromkeys(fault["kind"] for fault in faults)
        },
        "recovery_of_each_request_s": quantiles(
            [
                seconds
                for fault in faults
                if fault["kind"].startswith("replica")
                for seconds in fault["each_s"]
            ]
        ),
        "stopped_until_ended_s": quantiles(
            [fault["died_after_s"] for fault in faults if fault["kind"].endswith("stop")]
        ),
    }


def recoveries(answers: Sequence[Answer], struck: Sequence[Struck]) -> list[dict[str, Any]]:
    """Every fault with its recovery times (see the top of this file), in order of the blows."""
    start_s = min(answer.arrival_s for answer in answers)
    held: dict[int, list[float]] = {id(one): [] for one in struck}
    for answer in answers:
        causes = {id(one): one for part in answer.lost if (one := cause(struck, part["noticed_s"]))}
        for one in causes.values():
            since_s = hit_s(one)
            assert since_s is not None
            held[id(one)] += first_after(
                [part["end_s"] for part in answer.schedule if part["start_s"] > since_s], since_s
            )
    rows = []
    for fault in sorted(struck, key=lambda one: one.struck_s):
        each_s: list[float] = []
        if fault.kind.startswith("replica"):
            each_s = held[id(fault)]
        elif fault.died_s is not None and fault.kind.startswith("scheduler"):
            ends_s = [p["end_s"] for a in answers for p in a.schedule if p["start_s"] > fault.died_s]
            each_s = first_after(ends_s, fault.died_s)
        elif fault.died_s is not None:
            each_s = first_after([a.finish_s for a in answers if a.finish_s is not None], fault.died_s)
        rows.append(
            {
                "kind": fault.kind,
                "at_s": round(fault.struck_s - start_s, 3),
                "died_after_s": None if fault.died_s is None else round(fault.died_s - fault.struck_s, 3),
                "recovery_s": min(each_s, default=None),
                "each_s": sorted(each_s),
            }
        )
    return rows


def hit_s(fault: Struck) -> float | None:
    """From when on a replica fault did harm."""
    return fault.struck_s if fault.kind.endswith("stop") else fault.died_s


def cause(struck: Sequence[Struck], noticed_s: float) -> Struck | None:
    """The replica fault behind a loss."""
    replicas = sorted((one for one in struck if one.kind.startswith("replica")), key=lambda one: one.struck_s)
    deaths = [
        one
        for one in replicas
        if one.kind.endswith("kill")
        and one.died_s is not None
        and one.died_s - DEATH_SEEN_S <= noticed_s <= one.died_s + LOSS_SEEN_S
    ]
    stops = [
        one
        for one in replicas
        if one.kind.endswith("stop")
        and one.struck_s <= noticed_s
        and (one.died_s is None or noticed_s <= one.died_s + LOSS_SEEN_S)
    ]
    return next(reversed(deaths or stops), None)


def first_after(times_s: Sequence[float], since_s: float) -> list[float]:
    """Seconds from `since_s` to the next of the times, as a list of one or none."""
    later = [time_s - since_s for time_s in times_s if time_s > since_s]
    return [round(min(later), 3)] if later else []


def lost(answer: Answer) -> str:
    return f"{answer.request.id}: {answer.error}"


def ranges_lost(answers: Sequence[Answer]) -> int:
    return sum(len(answer.lost) for answer in answers)


def attainment(answers: Sequence[Answer]) -> float:
    return sum(answer.met for answer in answers) / len(answers)


def latency(answers: Sequence[Answer]) -> dict[str, Any]:
    return quantiles([a.finish_s - a.arrival_s for a in answers if a.finish_s is not None])


def quantiles(seconds: Sequence[float | None]) -> dict[str, Any]:
    """Median and maximum of those that were measured, and how many were."""
    known = [s for s in seconds if s is not None]
    return {
        "of": len(seconds),
        "measured": len(known),
        "p50": round(statistics.median(known), 3) if known else None,
        "max": round(max(known), 3) if known else None,
    }


def report(result: dict[str, Any]) -> str:
    """`chaos.md`."""
    pictures, lost_in, slo = result["pictures"], result["lost"], result["slo_attainment"]
    latencies = result["latency_s"]
    again = result["sent_again"]
    lines = [
        f"`{result['command']}`",
        "",
        f"| {result['requests']} requests | fault-free | {len(result['faults'])} faults |",
        "|---|---|---|",
        f"| lost | {len(lost_in['calm'])} | {len(lost_in['rough'])} |",
        f"| SLO attainment | {slo['calm']:.3f} | {slo['rough']:.3f} |",
        f"| step ranges run again | {result['ranges_lost']['calm']} | {result['ranges_lost']['rough']} |",
        *(
            f"| latency {key} s | {latencies['calm'][key]} | {latencies['rough'][key]} |"
            for key in ("p50", "max")
        ),
        "",
        f"Pictures compared: {pictures['compared']}; off by more than 1 of 255: {pictures['different']}; bit-equal: "
        f"{pictures['bit_equal']}; largest difference: {pictures['max_difference']}.",
        f"Sent again by the client under its key: {again['requests']} requests.",
        "",
        "| recovery s after | faults | measured | p50 | max |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {row['of']} | {row['measured']} | {row['p50']} | {row['max']} |"
            for name, row in (
                *result["recovery_s"].items(),
                ("replica faults, each request that lost a range", result["recovery_of_each_request_s"]),
                ("a stop, until the process was ended", result["stopped_until_ended_s"]),
            )
        ),
        "",
        f"| at rest | {' | '.join(result['gauges'])} |",
        "|---|---|---|---|",
        *(
            f"| {name} | {' | '.join(str(read(gauges)) for gauges in result['gauges'].values())} |"
            for name, read in GAUGES.items()
        ),
        "",
        *(f"- lost, fault-free: {one}" for one in lost_in["calm"]),
        *(f"- lost: {one}" for one in lost_in["rough"]),
        *(f"- sent again, {count} times: {reason}" for reason, count in again["reasons"].items()),
    ]
    return "\n".join(lines) + "\n"


GAUGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "GPUs ready": lambda gauges: gauges["gpus_ready"],
    "open requests": lambda gauges: gauges["open_requests"],
    "ranges running": lambda gauges: gauges["running"],
    **{
        f"{role}: processes, private MiB": lambda gauges, role=role: (  # type: ignore[misc]
            f"{gauges['processes'][role]}, {gauges['memory_mib'][role]:.0f}"
        )
        for role in ROLES
    },
}


if __name__ == "__main__":
    main()
