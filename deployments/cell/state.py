"""What the parts of a scheduler actor share."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from deployments.cell.fleet import Fleet
from deployments.cell.meters import Meters
from deployments.config import AppArgs
from tetriserve.model_info import ModelInfo
from tetriserve.scheduler.history import History
from tetriserve.scheduler.live_profile import LiveProfile
from tetriserve.scheduler.rounds import RoundScheduler


@dataclass
class CellState:
    """One cell.

    Attributes:
        rounds: the board and the plans.
        wake: set when there may be something to plan.
        failure: why no request is let in; "" while the cell works.
        started_in_s: what the start took.
        refused: knobs that were asked for while it runs and not taken, and why.
        is_draining: no new request is let in, since the server is about to be stopped.
        lost: GPUs that are off the board, those that are cordoned included.
        info, profile: of the model, once it is loaded.
    """

    args: AppArgs
    fleet: Fleet
    rounds: RoundScheduler
    meters: Meters
    history: History
    wake: asyncio.Event
    failure: str = "starting"
    started_in_s: float = 0.0
    refused: str = ""
    is_draining: bool = False
    lost: set[int] = field(default_factory=set)
    info: ModelInfo = field(init=False)
    profile: LiveProfile = field(init=False)

    @classmethod
    def of(cls, args: AppArgs, fleet: Fleet, rounds: RoundScheduler) -> CellState:
        """Of a cell that is about to start."""
        history = History(args.cell.gpus, time.time())
        return cls(args, fleet, rounds, Meters(args.profile.all_shapes), history, asyncio.Event())
