"""A range of steps on its way: sent to the replicas of its GPUs, and what they make of it.

Latents and pictures stay references: they go from replica to replica.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deployments.cell.entries import Entry
from deployments.cell.fleet import Fleet
from deployments.cell.replica import boxed
from tetriserve.scheduler.rounds import Assignment

RETURNS = {"encode": 3, "denoise": 2, "decode": 2}
"""By kind, how many references a leader gives: its report, then what it produced."""


@dataclass(frozen=True)
class SentRange:
    """A range that its replicas work on.

    Attributes:
        reports: a reference by GPU of the assignment, the leader's first.
        produced: references to the conditioning and the first latents, to the latents, or to the picture.
    """

    assignment: Assignment
    reports: tuple[Any, ...]
    produced: tuple[Any, ...]


def send(fleet: Fleet, entry: Entry, assignment: Assignment) -> SentRange:
    """Have a range run; replicas that hold the request's tensors already are not sent them."""
    reports: list[Any] = []
    produced: list[Any] = []
    for gpu in assignment.gpus:
        is_leader = gpu == assignment.gpus[0]
        results = (
            fleet[gpu]
            .run.options(num_returns=RETURNS[assignment.kind] if is_leader else 1)
            .remote(
                assignment,
                entry.request if assignment.kind == "encode" else None,
                boxed(None if gpu in entry.knows else entry.conditioning),
                boxed(None if gpu in entry.holders else entry.latents),
            )
        )
        if is_leader:
            report, *produced = results
            reports.append(report)
        else:
            reports.append(results)
    return SentRange(assignment, tuple(reports), tuple(produced))


async def settled(fleet: Fleet, sent: SentRange) -> tuple[list[Any], list[BaseException]]:
    """What the members of a range report, errors included, and the errors in the order in which they came."""
    gpus = sent.assignment.gpus
    return await fleet.settled(list(zip(gpus, sent.reports, strict=True)), gpus, sent.assignment.seq)
