"""CPU time of shared steps against the same steps one by one, for mixes of shapes, and how well the batch law fits.

    python bench/batches.py [--model embedded] [--repeats 5] [--out bench/results/batches]

One process, one thread. Ways are interleaved and the medians of `process_time` count, since wall time here says what
else the machine does. The law (`tetriserve/batch_law.py`) is fitted to batches of 2 and 4 of each shape and held
against the mixes, which it has not seen. Writes `steps.md` and `steps.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deployments.config import AppArgs
from solver.problem import shared_step_s
from tetriserve.batch_law import BATCHES, SharedTimes, law_of
from tetriserve.engine.adapter import ModelAdapter, ModelLimits, RequestState
from tetriserve.engine.kernels import attention_kernel
from tetriserve.models.load import load_model
from tetriserve.profile import Profile
from tetriserve.request import GenerateRequest, Shape

HERE = Path(__file__).parent
MIXES = (
    (128,) * 2,
    (128,) * 4,
    (128,) * 8,
    (256,) * 2,
    (256,) * 4,
    (512,) * 2,
    (128, 256),
    (128, 128, 256, 256),
    (128, 256, 512),
)
CPU = torch.device("cpu")
TEXT_TOKENS = 64
"""As in cluster_configs/cpu_local.yaml."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a model; default: the embedded one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "batches")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    path = options.model or AppArgs.parse({}).model.path
    adapter = load_model(
        path, ModelLimits("m", TEXT_TOKENS), attention_kernel("auto", CPU), dtype=torch.float32, device=CPU
    )
    rows = measured(adapter, options.repeats)
    (options.out / "steps.json").write_text(json.dumps(rows, indent=1) + "\n")
    text = table(rows)
    (options.out / "steps.md").write_text(f"`python bench/batches.py`\n\n{text}\n")
    print(text)


@torch.inference_mode()
def measured(adapter: ModelAdapter, repeats: int) -> list[dict[str, Any]]:
    """A row a mix: milliseconds of CPU time together and one by one, what the law says, the largest difference."""
    sides = sorted({side for mix in MIXES for side in mix})
    ways: dict[str, Callable[[], object]] = {}
    for mix in {*MIXES, *((side,) * n for side in sides for n in (1, *BATCHES))}:
        together = [begun(adapter, side, i) for i, side in enumerate(mix)]
        ways[f"together {mix}"] = partial(adapter.predict, together)
        if mix in MIXES:
            ways[f"alone {mix}"] = partial(one_by_one, adapter, together)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, call in ways.items():
            began_s = time.process_time()
            call()
            if repeat:  # the first one loads
                times[way].append(time.process_time() - began_s)
    median = {way: statistics.median(seconds) for way, seconds in times.items()}
    profile = fitted(median, sides)
    rows = []
    for mix in MIXES:
        states = [begun(adapter, side, i) for i, side in enumerate(mix)]
        alone = [adapter.predict([state])[0] for state in states]
        shared = adapter.predict(states)
        difference = max(
            float((a - b).abs().max() / a.abs().max()) for a, b in zip(alone, shared, strict=True)
        )
        terms = [profile.shared(Shape(side, side)).get(1) for side in mix]
        known = [one for one in terms if one is not None]
        rows.append(
            {
                "mix": " + ".join(map(str, mix)),
                "together_ms": 1000 * median[f"together {mix}"],
                "alone_ms": 1000 * median[f"alone {mix}"],
                "law_ms": 1000 * shared_step_s(known) if len(known) == len(mix) else None,
                "difference": difference,
            }
        )
    return rows


def one_by_one(adapter: ModelAdapter, states: list[RequestState]) -> None:
    for state in states:
        adapter.predict([state])


def begun(adapter: ModelAdapter, side: int, seed: int) -> RequestState:
    request = adapter.resolve(
        GenerateRequest("a small red circle", side, side, num_inference_steps=8, seed=seed)
    )
    return adapter.begin(request, adapter.encode(request))


def fitted(median: dict[str, float], sides: list[int]) -> Profile:
    """The profile that these times make."""
    alone = {side: median[f"together {(side,)}"] for side in sides}
    times = [
        SharedTimes(Shape(side, side), alone[side], {n: median[f"together {(side,) * n}"] for n in BATCHES})
        for side in sides
    ]
    steps = {Shape(side, side): {1: alone[side]} for side in sides}
    return Profile("m", "CPU", "measured", (1,), steps, **law_of({1: times}))


def table(rows: list[dict[str, Any]]) -> str:
    head = "| mix | one by one, ms | together, ms | gain | by the law, ms | off by | latents differ by |"
    lines = [head, "|---" * 7 + "|"]
    for row in rows:
        law, together = row["law_ms"], row["together_ms"]
        says = "- | -" if law is None else f"{law:.0f} | {100 * (law / together - 1):+.0f} %"
        lines.append(
            f"| {row['mix']} | {row['alone_ms']:.0f} | {together:.0f} | {row['alone_ms'] / together:.2f} | "
            f"{says} | {row['difference']:.0e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
