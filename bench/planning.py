"""Planning time of `ilp` on overloaded boards, for the two sizes that issue 3 sets a mark for.

    python bench/planning.py [--boards 60] [--repeats 5] [--limit-ms 15]

Every board is planned `repeats` times and counts with the median, so that the load of this machine weighs little.
Boards are seeded: FLUX on H100, uniform mix, requests in the middle of their steps, deadlines from barely possible
to comfortable, some late, some without deadline, half of the GPUs busy. Writes `planning.md` and `planning.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from solver.ilp import IlpPolicy
from solver.problem import Job, Phase, Snapshot
from tetriserve.profile import Profile
from tetriserve.request import Shape

HERE = Path(__file__).parent
SIDES = (256, 512, 1024, 2048)
N_STEPS = 28


@dataclass(frozen=True)
class Size:
    """How large a board is, the time limit to plan it with, and the mark for the p99 of its planning time."""

    n_gpus: int
    n_open: int
    limit_ms: float
    mark_ms: float


SIZES = (Size(8, 64, 15.0, 20.0), Size(64, 512, 80.0, 100.0))


def board(size: Size, seed: int, profile: Profile) -> Snapshot:
    """An overloaded board: far more work than fits until the deadlines, more or less so by seed."""
    rng = random.Random(seed)
    now_s = 1000.0
    ease = rng.uniform(1.0, 8.0)
    jobs = []
    tables = [dict(profile.step_seconds[Shape(side, side)]) for side in SIDES]
    for i in range(size.n_open):
        step_s = rng.choice(tables)
        steps = rng.choice((N_STEPS, rng.randint(1, N_STEPS)))
        least_s = steps * min(step_s.values())
        arrival_s = now_s - rng.uniform(0.0, 5.0)
        kind = rng.random()
        deadline_s = now_s + least_s * (rng.uniform(0.2, 1.0) if kind < 0.1 else rng.uniform(1.0, 1.0 + ease))
        if kind > 0.97:
            deadline_s = float("inf")
        first = rng.randrange(size.n_gpus)
        jobs.append(
            Job(
                id=f"r{i}",
                arrival_s=arrival_s,
                deadline_s=deadline_s,
                ready_s=arrival_s,
                phases=(Phase("denoise", steps, step_s), Phase("decode", 1, {1: 0.02})),
                gpus=(first,) if steps < N_STEPS else (),
                set_aside=rng.random() < 0.2,
                slo_s=deadline_s - arrival_s,
            )
        )
    round_s = max(job.phases[0].fastest_step_s for job in jobs)
    free_at_s = tuple(now_s + max(0.0, rng.uniform(-round_s, round_s)) for _ in range(size.n_gpus))
    return Snapshot(now_s, round_s, free_at_s, tuple(jobs))


def measure(size: Size, profile: Profile, n_boards: int, repeats: int, limit_ms: float) -> dict[str, float]:
    """Percentiles over boards of the median of repeats, in milliseconds."""
    policy = IlpPolicy(limit_ms / 1000)
    times_ms, ilps, completions, worst_ms = [], [], [], 0.0
    for seed in tqdm(range(n_boards), desc=f"{size.n_open} open on {size.n_gpus} GPUs", unit="board"):
        snapshot = board(size, seed, profile)
        runs_ms = []
        for _ in range(repeats):
            before = time.perf_counter()
            packing = policy(snapshot)
            runs_ms.append((time.perf_counter() - before) * 1000)
        times_ms.append(statistics.median(runs_ms))
        worst_ms = max(worst_ms, *runs_ms)
        ilps.append(packing.info["ilps"])
        completions.append(packing.info["completions"])
    times_ms.sort()
    return {
        "n_gpus": size.n_gpus,
        "n_open": size.n_open,
        "limit_ms": limit_ms,
        "p50_ms": statistics.median(times_ms),
        "p99_ms": times_ms[min(len(times_ms) - 1, int(0.99 * len(times_ms)))],
        "worst_single_ms": worst_ms,
        "mark_p99_ms": size.mark_ms,
        "ilps_per_decision": statistics.fmean(ilps),
        "completions_per_decision": statistics.fmean(completions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--boards", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit-ms", type=float, help="time limit instead of 15 and 80 ms")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "planning")
    options = parser.parse_args()

    profile = Profile.load(HERE / "profiles" / "flux_h100_derived.yaml")
    rows = [
        measure(size, profile, options.boards, options.repeats, options.limit_ms or size.limit_ms)
        for size in SIZES
    ]
    head = "| GPUs | open | limit ms | p50 ms | p99 ms | worst single run ms | mark (p99) ms | ILPs | completions |"
    lines = [head, "|" + "---|" * head.count(" | ") + "---|"]
    lines += ["| " + " | ".join(f"{value:.4g}" for value in row.values()) + " |" for row in rows]
    options.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    (options.out / "planning.md").write_text(
        f"# Planning time of `ilp`\n\n{options.boards} boards, median of {options.repeats} runs each, "
        f"{os.cpu_count()} cores.\n\n{text}"
    )
    (options.out / "planning.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
