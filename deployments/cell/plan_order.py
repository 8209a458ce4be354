"""The worker thread of a GPU replica: step ranges one at a time, in the order of the plan."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from deployments.logs import logger


class PlanOrder:
    """One worker thread; ranges run strictly behind the `seq` the plan put before them on this GPU.

    Args:
        niceness: of the worker, where it may have it; 0 leaves it as it is.
        dies: told why, when the worker dies; the process ends then.
    """

    def __init__(self, niceness: int, dies: Callable[[str], None]) -> None:
        self._ready = threading.Condition()
        self._waiting: dict[int, tuple[int, Callable[[], Any], Future[Any]]] = {}
        self._unordered: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._last_seq = -1
        self._dies = dies
        threading.Thread(target=self._work_or_end, args=(niceness,), name="engine", daemon=True).start()

    def post(self, call: Callable[[], Any]) -> Future[Any]:
        """Run between ranges, as soon as the worker is free; does not wait for it."""
        future: Future[Any] = Future()
        with self._ready:
            self._unordered.append((call, future))
            self._ready.notify()
        return future

    def run(self, call: Callable[[], Any]) -> Any:
        """The same; blocks and returns the result."""
        return self.post(call).result()

    def run_after(self, after: int, seq: int, call: Callable[[], Any]) -> Any:
        """Run as range `seq`, right behind range `after`; blocks and returns the result."""
        future: Future[Any] = Future()
        with self._ready:
            self._waiting[after] = (seq, call, future)
            self._ready.notify()
        return future.result()

    def _work_or_end(self, niceness: int) -> None:
        """Without its worker a replica would take calls and answer none: then its process ends, to be replaced."""
        try:
            self._work(niceness)
        except BaseException as error:
            try:
                logger.critical("the engine thread died, this process ends", exc_info=True)
                self._dies(f"{type(error).__name__}: {error}")
            finally:
                os._exit(1)

    def _work(self, niceness: int) -> None:
        if niceness:
            with contextlib.suppress(OSError):  # nice to have
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._unordered or self._last_seq in self._waiting)
                if self._unordered:
                    call, future = self._unordered.pop(0)
                else:
                    self._last_seq, call, future = self._waiting.pop(self._last_seq)
            try:
                future.set_result(call())
            except BaseException as error:  # the waiting call raises it; the worker goes on
                future.set_exception(error)
