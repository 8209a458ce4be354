"""What requests of different clients are worth to each other when not all of them can be on time.

A packer that counts requests on time would serve a client with many small requests and nobody else. So each client
has a right to its equal share of the GPUs: those of its requests that fit into it, the cheapest first, come before
all that exceed a share. The shares add up to the board, so what is within them can about be served together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence


def fair_weights(clients: Sequence[str | None], gpus: Sequence[float], n_gpus: int) -> list[float]:
    """The worth of each request: 1, or more than that of all others together within its client's share.

    Args:
        clients: whose each request is.
        gpus: GPUs that it keeps busy on average until its deadline.
    """
    mine: defaultdict[str | None, list[int]] = defaultdict(list)
    for i, client in enumerate(clients):
        mine[client].append(i)
    weights = [1.0] * len(clients)
    if len(mine) < 2:
        return weights
    share = n_gpus / len(mine)
    for requests in mine.values():
        used = 0.0
        for i in sorted(requests, key=lambda i: gpus[i]):
            used += gpus[i]
            if used > share:
                break
            weights[i] = float(len(clients))
    return weights
