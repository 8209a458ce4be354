"""Asks a policy for packings, within a limit on the clock: the board never waits for the brain."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from deployments.logs import logger
from solver.policies import make_policy
from solver.problem import Job, Packing, Policy, Snapshot
from tetriserve.scheduler.promises import earliest_deadline_s

FALLBACK_POLICY = "edf"
"""A plain list schedule: no solver, done in milliseconds."""
MAX_OFFERS = 4
"""So many refused requests may wait for the deadline that they could have had; in a burst of them the plans of the
accepted ones need the processor."""


class Planner:
    """Runs `policy` in a thread of its own; what it does not answer in time, the fallback does.

    Args:
        limit_s: how long a packing may take.

    Attributes:
        fallbacks: packings that the fallback made.
    """

    def __init__(self, policy: Policy, *, limit_s: float) -> None:
        self.fallbacks = 0
        self.turn(policy, limit_s=limit_s)
        self._fallback = make_policy(FALLBACK_POLICY)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planner")
        self._planning: asyncio.Future[Packing] | None = None
        self._offers_thread = ThreadPoolExecutor(1, thread_name_prefix="offers")
        self._offers = 0

    def turn(self, policy: Policy, *, limit_s: float) -> None:
        """Ask another policy from now on."""
        self.policy = policy
        self._limit_s = limit_s

    async def pack(self, snapshot: Snapshot) -> tuple[Packing, bool]:
        """The packing, and whether it is the fallback's.

        It is past the limit, after a failure, and while the policy still hangs on an earlier snapshot.
        """
        if self._planning is None or self._planning.done():
            self._planning = asyncio.get_running_loop().run_in_executor(self._thread, self.policy, snapshot)
            try:
                return await asyncio.wait_for(asyncio.shield(self._planning), self._limit_s), False
            except asyncio.TimeoutError:
                logger.warning("the %s policy took over %.3f s", self.policy.name, self._limit_s)
            except Exception:
                logger.exception("the %s policy failed", self.policy.name)
        self.fallbacks += 1
        return self._fallback(snapshot), True

    async def earliest_deadline_s(self, snapshot: Snapshot, refused: Job) -> float | None:
        """With which deadline a request that was turned away would have been accepted; None when nobody has the time
        to find out."""
        if self._offers >= MAX_OFFERS:
            return None
        self._offers += 1
        ask = asyncio.get_running_loop().run_in_executor
        try:
            return await ask(self._offers_thread, earliest_deadline_s, self.policy, snapshot, refused)
        except Exception:
            logger.exception("no deadline was found that a refused request could have had")
            return None
        finally:
            self._offers -= 1
