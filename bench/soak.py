"""A live server under steady load for long: does anything grow?

    python bench/soak.py [--minutes 20] [--warm-up 12] [--load 0.8] [--every 10]

Measures this machine's profile, then plays a mixed 256/512/1024 trace, open loop, that would keep the GPUs busy for
--load of the time if all ran at SP 1 (wider steps make it more), and looks every --every seconds at the private
memory (resident minus shared) and the open files of every process of the server, at its open requests and at Ray's
object store. What comes before --warm-up minutes, in which the board's ten minutes fill, does not count. A quantity
grows when its slope over the rest is above zero by more than twice its standard error, and what that adds in an hour
is more than `NOTHING` of its mean. Writes `soak.json` and `soak.md` to --out.
"""

from __future__ import annotations

import argparse
import re
import statistics
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from policy_report import markdown_table
from server import MIX, RunningServer, local_setup, running_server
from tqdm import tqdm

from tetriserve.simulation.replay import replay
from tetriserve.simulation.result import result_of, write_json
from tetriserve.simulation.trace import TraceRequest

NOTHING = 0.05
"""Growth in an hour, as a share of the mean, that is not worth a word."""


class Watch(threading.Thread):
    """Takes a sample of the server every so often until it is told to stop."""

    def __init__(self, server: RunningServer, every_s: float) -> None:
        super().__init__(daemon=True)
        self._server, self._every_s = server, every_s
        self._over = threading.Event()
        self.samples: list[dict[str, float]] = []

    def run(self) -> None:
        start_s = time.monotonic()
        while not self._over.wait(self._every_s):
            self.samples.append({"at_s": time.monotonic() - start_s, **sample(self._server)})

    def stop(self) -> None:
        self._over.set()
        self.join()


def sample(server: RunningServer) -> dict[str, float]:
    """Quantities by name, those of processes with their title; several of one title are summed."""
    found: defaultdict[str, float] = defaultdict(float)
    family = psutil.Process(server.pid)
    for process in [family, *family.children(recursive=True)]:
        try:
            title = title_of(process)
            memory, files = process.memory_info(), process.num_fds()
        except psutil.NoSuchProcess:
            continue
        found[f"{title}: private MiB"] += (memory.rss - memory.shared) / 2**20
        found[f"{title}: open files"] += files
        if title == "raylet":
            found["object store MiB"] += stored_bytes(process) / 2**20
    health = httpx.get(f"{server.url}/health", timeout=10).json()
    found["open requests"] = sum(cell["open_requests"] for cell in health["cells"])
    return dict(found)


def stored_bytes(raylet: psutil.Process) -> float:
    """What its object store holds, by the state that it writes down every ten seconds."""
    (logs,) = [word.removeprefix("--log_dir=") for word in raylet.cmdline() if word.startswith("--log_dir=")]
    state = (Path(logs) / "debug_state.txt").read_text()
    total, free = re.findall(r"object_store_memory: \[(\d+)\]", state)[:2]
    return (int(total) - int(free)) / 1e4  # Ray counts resources in parts of ten thousand


def title_of(process: psutil.Process) -> str:
    """What a process is, without what changes while it lives."""
    line = process.cmdline()
    if line and line[0].startswith("ray::"):
        return line[0].split(".")[0].split(" ")[0]
    return process.name()


def trend(at_s: list[float], values: list[float]) -> dict[str, Any]:
    """Medians of the quarters, and the slope with its standard error, an hour."""
    quarters = np.array_split(np.array(values), 4)
    (slope, _), covariance = np.polyfit(np.array(at_s) / 3600, values, 1, cov=True)
    error = float(np.sqrt(covariance[0, 0]))
    return {
        "quarters": [float(np.median(quarter)) for quarter in quarters],
        "slope_per_h": float(slope),
        "error_per_h": error,
        "grows": bool(slope > 2 * error and slope > NOTHING * np.mean(values)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--warm-up", type=float, default=12.0, metavar="MINUTES")
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--every", type=float, default=10.0, metavar="S")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--shapes", default=MIX, help="with weights")
    parser.add_argument("--out", type=Path, default=Path("bench/results/soak"))
    options = parser.parse_args()

    with local_setup() as setup:
        n_gpus = setup.n_gpus

        def trace(per_min: float, requests: int) -> list[TraceRequest]:
            return setup.mixed_trace(per_min, requests, shapes=options.shapes, slo="3x", steps=options.steps)

        chains = [request.chain(setup.profile, n_gpus) for request in trace(60.0, 400)]
        gpu_s = statistics.fmean(sum(p.steps * p.step_s[1] for p in chain) for chain in chains)
        per_min = 60 * options.load * n_gpus / gpu_s
        requests = trace(per_min, round(per_min * (options.warm_up + options.minutes)))
        policy = setup.args["scheduler"]["policy"]
        with running_server(setup.config, policy) as server:
            watch = Watch(server, options.every)
            watch.start()
            with tqdm(total=len(requests), unit="request") as bar:
                done = replay(server.url, requests, bar.update)
            watch.stop()
    samples = [one for one in watch.samples if one["at_s"] > 60 * options.warm_up]
    names = sorted({name for one in samples for name in one if name != "at_s"})
    at_s = [one["at_s"] for one in samples]
    trends = {name: trend(at_s, [one.get(name, 0.0) for one in samples]) for name in names}
    summary = result_of(policy, n_gpus, done.outcomes, done.schedule, done.plan_ms)["summary"]
    result = {"rate_per_min": per_min, "errors": done.errors, "summary": summary, "trends": trends}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "soak.json", result)
    (options.out / "soak.md").write_text(report(result, options))
    print(report(result, options))


def report(result: dict[str, Any], options: argparse.Namespace) -> str:
    """`soak.md`."""
    summary = result["summary"]
    head = ["", "1st quarter", "2nd", "3rd", "4th", "slope an hour", "grows"]
    body = [
        [
            name,
            *(f"{value:.1f}" for value in found["quarters"]),
            f"{found['slope_per_h']:+.1f} ± {found['error_per_h']:.1f}",
            "yes" if found["grows"] else "no",
        ]
        for name, found in result["trends"].items()
    ]
    asked = f"--minutes {options.minutes:g} --warm-up {options.warm_up:g} --load {options.load:g}"
    return (
        f"`python bench/soak.py {asked}`: {result['rate_per_min']:.1f} requests a minute, GPUs busy "
        f"{100 * summary['gpu_utilisation']:.0f} %, SLO attainment {summary['slo_attainment']:.3f}, errors "
        f"{len(result['errors'])}. Medians of each quarter of the run after its warm-up.\n\n"
        f"{markdown_table(head, body)}\n"
    )


if __name__ == "__main__":
    main()
