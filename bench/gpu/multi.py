"""What only two and more GPUs can show: exchanges, memory of a communicator, a kill in the exchange, SP 1 to 8.

    python bench/gpu/multi.py --out DIR [--gpus 8] [--model FOLDER]

One process a GPU, joined by NCCL as the replicas of a cell are; without GPUs two processes over gloo, to try the
script. Rows go to `DIR/multi.jsonl` as they are known. `--model` is a diffusers folder (FLUX.1-dev for figures that
mean something), the embedded model by default.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from ranks import Ranks, Setting
from record import Rows

from tetriserve.request import GenerateRequest, Shape

WIDTH = 3072
"""Channels of FLUX's attention, 24 heads of 128."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found = torch.cuda.device_count()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=found or 2)
    parser.add_argument("--model", default="embedded")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[256, 512, 1024, 2048] if found else [128, 256]
    )
    parser.add_argument("--repeats", type=int, default=20 if found else 5)
    options = parser.parse_args()
    if options.gpus < 2 or (found and options.gpus > found):
        parser.error(f"--gpus {options.gpus}: at least 2 are needed, {found} are here")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out, "multi")
    setting = Setting(
        "cuda" if found else "cpu",
        "nccl" if found else "gloo",
        share=False,
        dtype="bfloat16" if found else "float32",
        model=options.model,
    )
    degrees = [degree for degree in (2, 4, 8) if degree <= options.gpus]
    with Ranks(options.gpus, setting) as ranks:
        exchanges(ranks, rows, degrees, options)
        steps(ranks, rows, degrees, options)
        kill(ranks, rows, 5.0 if found else None)
    print(f"wrote {options.out / 'multi.jsonl'}")


def exchanges(ranks: Ranks, rows: Rows, degrees: list[int], options: argparse.Namespace) -> None:
    """Milliseconds of one all-to-all of attention's width, by degree and picture; memory of each communicator."""
    seq = 0
    for degree in degrees:
        gpus = tuple(range(degree))
        free_mib = ranks.all((0,), "free_mib")[0]
        right = ranks.all(gpus, "exchange", gpus, seq := seq + 1)
        rows.add(degree=degree, exchange=right, communicator_mib=free_mib - ranks.all((0,), "free_mib")[0])
        for side in options.sides:
            tokens = (side // 16) ** 2 + 512
            took = ranks.all(gpus, "timed_exchange", gpus, seq := seq + 1, tokens, WIDTH, options.repeats)
            known = all(isinstance(one, float) for one in took)
            rows.add(degree=degree, side=side, exchange_ms=max(took) if known else str(took)[-300:])


def steps(ranks: Ranks, rows: Rows, degrees: list[int], options: argparse.Namespace) -> None:
    """Step times by degree and what of the ideal speed-up they reach."""
    seq = 1000
    for side in options.sides:
        alone_ms = 0.0
        for degree in (1, *degrees):
            gpus, name = tuple(range(degree)), f"steps-{side}-{degree}"
            seq += 1
            took = ranks.all(gpus, "call", "measure", name, Shape(side, side), gpus, seq, 2, options.repeats)
            if failed := [one for one in took if "denoise" not in one]:
                rows.add(side=side, degree=degree, error=str(failed[0])[-300:])
                ranks.all(gpus, "call", "abandon", name, gpus, seq)
                continue
            step_ms = 1e3 * max(one["denoise"] for one in took)
            alone_ms = alone_ms or step_ms
            rows.add(side=side, degree=degree, step_ms=step_ms, efficiency=alone_ms / step_ms / degree)


def kill(ranks: Ranks, rows: Rows, leave_after_s: float | None) -> None:
    """The last GPU is killed while all others stand in an exchange with it: do they live, and work together again?"""
    everyone = ranks.everyone
    *rest, victim = everyone
    rows.add(before=ranks.all(everyone, "exchange", everyone, 1999))
    for gpu in rest:
        ranks.send(gpu, "alone", everyone, 2000, leave_after_s)
    time.sleep(2)
    ranks.kill(victim)
    for gpu in rest:
        rows.add(gpu=gpu, member_killed=ranks.get(gpu, 90))
    if len(rest) > 1:
        rows.add(rest_anew=ranks.all(rest, "exchange", tuple(rest), 2001))
    ranks.start(victim)
    ranks.ready(victim)
    rows.add(all_anew=ranks.all(everyone, "exchange", everyone, 2002))
    request = GenerateRequest("a small red circle", 256, 256, 4, seed=1)
    rows.add(picture_after_it=str(ranks.all((victim,), "call", "encode", "after", request)[0])[:60])


if __name__ == "__main__":
    main()
