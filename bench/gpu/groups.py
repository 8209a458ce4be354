"""Parts of the run about several ranks: equal pictures over gloo, NCCL's groups, torch's defaults."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from ranks import Ranks, Setting
from record import Place, Rows

from tetriserve.request import GenerateRequest

REQUEST = GenerateRequest("a small red circle", 208, 304, 8, seed=1)


def ranges(ranks: Ranks, gpus: tuple[int, ...], seq: int, request: GenerateRequest) -> dict[str, Any]:
    """A request from prompt to picture on `gpus`: its step milliseconds, latents by member, picture, or the error."""
    name = f"r{seq}"
    encoded = ranks.all(gpus[:1], "call", "encode", name, request)[0]
    if not isinstance(encoded, tuple):
        return {"error": str(encoded)}
    _, conditioning, latents = encoded
    reports = ranks.all(
        gpus, "call", "denoise", name, gpus, 0, request.num_inference_steps, conditioning, latents, seq
    )
    if failed := [str(report) for report in reports if isinstance(report, str | Exception)]:
        return {"error": failed[0]}
    packed = ranks.all(gpus, "call", "pack", name)
    (decoded,) = ranks.all(gpus[:1], "call", "decode", name)
    if not isinstance(decoded, tuple):
        return {"error": str(decoded)}
    ranks.all(gpus, "call", "release", name)
    assert request.num_inference_steps is not None
    took_s = max(report.ended_s - report.started_s - report.switch_s for report in reports)
    return {
        "step_ms": 1e3 * took_s / request.num_inference_steps,
        "latents": [one.tensor.array for one in packed],
        "picture": decoded[1].astype(int),
    }


def psnr_db(difference: np.ndarray) -> float:
    """Of two pictures; 99 for equal ones."""
    mean_square = float((difference.astype(float) ** 2).mean())
    return 99.0 if mean_square == 0 else min(99.0, 10 * np.log10(255**2 / mean_square))


def gloo(place: Place, rows: Rows) -> None:
    """Promise 1 where the kernels are CUDA's: members equal to the bit, and how far degrees are from SP 1."""
    n = 2 if place.small else 4
    sets = [(0,), (1,), (0, 1), (1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)]
    for dtype in ("float32",) if place.small else ("float32", "bfloat16"):
        with Ranks(n, Setting(place.device, "gloo", share=True, dtype=dtype)) as ranks:
            rows.add(dtype=dtype, exchange=ranks.all(ranks.everyone, "exchange", ranks.everyone, 1))
            alone: np.ndarray | None = None
            for seq, gpus in enumerate((gpus for gpus in sets if max(gpus) < n), 10):
                made = ranges(ranks, gpus, seq, REQUEST)
                if "error" in made:
                    rows.add(dtype=dtype, gpus=gpus, error=made["error"][-300:])
                    continue
                alone = made["picture"] if alone is None else alone
                difference = np.abs(made["picture"] - alone)
                rows.add(
                    dtype=dtype,
                    gpus=gpus,
                    step_ms=made["step_ms"],
                    members_equal=len({one.tobytes() for one in made["latents"]}) == 1,
                    max_of_255=int(difference.max()),
                    psnr_db=psnr_db(difference),
                )


def nccl(place: Place, rows: Rows) -> None:
    """Two ranks: exchange, hang and leave from a thread, a kill in the exchange, the group anew, memory.

    On one GPU NCCL goes over sockets, which it does not support there: what hangs here says nothing of NVLink.
    """
    pair, backend = (0, 1), "nccl" if place.on_cuda else "gloo"
    setting = Setting(place.device, backend, share=True)
    with Ranks(2, setting) as ranks:
        free_mib = ranks.all((0,), "free_mib")[0]
        rows.add(backend=backend, uneven_exchange=ranks.all(pair, "exchange", pair, 1))
        rows.add(communicator_mib=free_mib - ranks.all((0,), "free_mib")[0], of="both ranks")
        rows.add(listens_beyond_loopback=ranks.all(pair, "listens_on"))
        for gpus in ((0,), pair):
            made = ranges(ranks, gpus, 5 + len(gpus), REQUEST)
            rows.add(gpus=gpus, **{k: made[k] for k in ("step_ms", "error") if k in made})
        if backend == "nccl":  # gloo must be left from the thread that computes
            ranks.send(0, "alone", pair, 30, 3.0)
            rows.add(hang_then_leave=ranks.get(0))
            ranks.all((1,), "call", "abandon", "nothing", pair, 30)
        rows.add(group_anew=ranks.all(pair, "exchange", pair, 31))
        if place.on_cuda:
            ranks.all(pair, "call", "abandon", "nothing", pair, 40)
            rows.add(filled_to_mib=ranks.all((0,), "fill", 64))
            rows.add(no_memory_for_a_group=ranks.all(pair, "what_exchange_says", pair, 41))
            ranks.all(pair, "exchange", pair, 42)  # the group in which one is killed
        ranks.send(0, "alone", pair, 50, 5.0 if backend == "nccl" else None)
        time.sleep(2)
        ranks.kill(1)
        rows.add(member_killed_in_the_exchange=ranks.get(0, 90))
        ranks.start(1)
        ranks.ready(1)
        rows.add(group_with_the_new_member=ranks.all(pair, "exchange", pair, 60))
        rows.add(of="the survivor", device_works=ranks.all((0,), "device_works"))


def defaults(place: Place, rows: Rows) -> None:
    """What torch's own settings make of a killed member: does the survivor die a minute later?"""
    pair = (0, 1)
    with Ranks(2, Setting(place.device, "nccl", share=True, model=None, defaults=True)) as ranks:
        rows.add(exchange=ranks.all(pair, "exchange", pair, 1))
        ranks.send(0, "alone", pair, 2, 5.0)
        time.sleep(2)
        ranks.kill(1)
        rows.add(member_killed=ranks.get(0, 30))
        for waited_s in (0,) if place.small else (30, 60):
            time.sleep(min(waited_s, 30))
            rows.add(waited_s=waited_s, survivor_works=ranks.all((0,), "device_works"))
