"""A cell on real replicas, with its scheduler in the test's process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import ray

from deployments.cell.scheduler import Scheduler
from deployments.config import AppArgs


def on_a_cell(args: AppArgs, work: Callable[[Scheduler], Coroutine[Any, Any, None]]) -> None:
    """Do `work` on a cell of these arguments; Ray runs."""

    async def on_scheduler() -> None:
        group = ray.util.placement_group(args.cell.bundles)
        await group.ready()
        scheduler = Scheduler(args, group)
        await scheduler.start()
        try:
            await work(scheduler)
        finally:
            ray.util.remove_placement_group(group)

    asyncio.run(on_scheduler())
