"""Communication groups of a cell: one per GPU set, warmed before use, built anew after a loss.

Aligned sets (pairs, fours, eights) exist from `warm` on; other sets are made when a plan first needs them.
Size-1 groups are never built: one NCCL communicator costs half a gigabyte (peers.md, section 6).
After a failed range all its members leave their group: who stopped where is unknown, and the next range over it
would meet messages of the failed one. The range that needs the set next builds it anew.

Members meet in a file of their own, named by the set and the range that builds the group. A store in a process would
be lost with it, and then the GPUs that live on could not build the groups that they need; the file of one meeting
is nobody else's, whatever its members die of.

torch's backends are used directly, without its default process group: `new_group` must either be called by
the whole world or derives the group's name from a counter that differs between ranks with different sets,
and then hangs (torch 2.11 to 2.13). A set names itself here.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tetriserve.engine.report import GivenUp

COLLECTIVE_TIMEOUT_S = 1800.0
"""A rank may wait this long for its partners, who may still be in an earlier assignment; the scheduler's
watchdog acts long before."""

BUILD_TIMEOUT_S = 30.0
"""Members that have all met build their group within this time."""

MEET_POLL_S = 0.002

LOOPBACK = "127.0.0.1"
"""A cell lives on one node: gloo listens on no other address. What NCCL listens on is NCCL_SOCKET_IFNAME's
(`environment`)."""


IN_STREAM = dist.AllToAllOptions()
"""NCCL stays on the stream that computes, and there is nothing to wait for."""
IN_STREAM.asyncOp = False


@dataclass
class SPGroup:
    """A GPU set that runs one step together; `rank` is this GPU's place in it, `seq` the range that built it."""

    gpus: tuple[int, ...]
    rank: int
    backend: Any
    seq: int

    @property
    def degree(self) -> int:
        return len(self.gpus)

    def rows(self, length: int) -> tuple[int, ...]:
        """How a sequence is cut over the ranks: the first `length % degree` ranks take one row more."""
        base, more = divmod(length, self.degree)
        return tuple(base + (rank < more) for rank in range(self.degree))

    def all_to_all(self, sent: torch.Tensor, sent_rows: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        """Exchange row blocks: block j of contiguous `sent` goes to rank j, all ranks' blocks come back.

        Raises `GivenUp` when the exchange fails: another member failed, or the group was left from another thread.

        Args:
            sent: [sum(sent_rows), ...].
            sent_rows: rows for each rank.
            rows: rows from each rank.
        """
        got = sent.new_empty(sum(rows), *sent.shape[1:])
        self._exchange(got, sent, rows, sent_rows)
        return got

    def agree(self, device: torch.device) -> None:
        """Return when all members got here. Raises `GivenUp` when one failed before."""
        ones = [1] * self.degree
        # zeros stay where an aborted kernel brought nothing
        got = torch.zeros(self.degree, device=device)
        self._exchange(got, torch.ones_like(got), ones, ones)
        if not got.all():
            raise GivenUp(f"a member of {self.gpus} failed")

    def close(self) -> None:
        """Leave; gloo's other members fail at once, NCCL's when they are told to leave. From any thread."""
        backend, self.backend = self.backend, None  # gloo hangs up when the object goes away
        if backend is not None:
            backend.abort()

    def _exchange(
        self, got: torch.Tensor, sent: torch.Tensor, rows: Sequence[int], sent_rows: Sequence[int]
    ) -> None:
        backend = self.backend
        if backend is None:
            raise GivenUp(f"the group of GPUs {self.gpus} was left")
        try:
            work = backend.alltoall_base(got, sent, list(rows), list(sent_rows), IN_STREAM)
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise GivenUp(f"an exchange between GPUs {self.gpus} failed: {error}") from error


class GroupTable:
    """This GPU's groups.

    All members of a set must use it in the same order relative to other sets; plan order gives that.

    Args:
        gpu: this one's number in the cell.
        device: what its tensors are on.
        folder: of the cell, the same for all its GPUs: where members meet.
    """

    def __init__(self, gpu: int, device: torch.device, folder: Path) -> None:
        self.gpu = gpu
        self.device = device
        self._folder = folder
        self._groups: dict[tuple[int, ...], SPGroup] = {}
        self._called_off: set[int] = set()
        self._lock = threading.Lock()  # of the two above: members are told to leave from other threads

    def warm(self, sets: Iterable[tuple[int, ...]], seq: int) -> None:
        """Build those of `sets` that hold this GPU; every member must do the same."""
        for gpus in sets:
            if self.gpu in gpus:
                self.group(gpus, seq)

    def group(self, gpus: tuple[int, ...], seq: int) -> SPGroup | None:
        """The group of a GPU set that holds this GPU, made and warmed on first use; None for a single GPU.

        `seq` is the range that asks, the same on all members and never used again: they meet under it. Raises
        `GivenUp` when the range is called off before all have come, and when building fails.
        """
        if len(gpus) == 1:
            return None
        with self._lock:
            found = self._groups.get(gpus)
        return found or self._build(gpus, seq)

    def _build(self, gpus: tuple[int, ...], seq: int) -> SPGroup:
        name, rank = "-".join(map(str, gpus)), gpus.index(self.gpu)
        store = dist.FileStore(str(self._folder / f"{name}@{seq}"), len(gpus))
        self._meet(store, rank, len(gpus), seq)
        store.set_timeout(datetime.timedelta(seconds=BUILD_TIMEOUT_S))
        try:
            built = SPGroup(gpus, rank, self._backend(store, rank, gpus), seq)
        except RuntimeError as error:
            raise GivenUp(f"GPUs {gpus} could not build their group: {error}") from error
        with self._lock:  # before its first exchange, so that it can be left from there too
            if seq in self._called_off:
                raise GivenUp(f"range {seq} was called off: a member failed")
            self._groups[gpus] = built
        try:
            ones = [1] * len(gpus)
            built.all_to_all(torch.zeros(len(gpus), device=self.device), ones, ones)
        except GivenUp:
            self.leave(gpus, seq)
            raise
        return built

    def _meet(self, store: dist.Store, rank: int, size: int, seq: int) -> None:
        """Wait until all members are here: partners may still be in an earlier range, and building cannot be
        interrupted."""
        with self._lock:
            self._called_off = {later for later in self._called_off if later >= seq}
        store.set(f"here/{rank}", "")
        everyone = [f"here/{member}" for member in range(size)]
        while not store.check(everyone):
            if seq in self._called_off:
                raise GivenUp(f"range {seq} was called off: a member failed")
            time.sleep(MEET_POLL_S)

    def call_off(self, seq: int) -> None:
        """A member of range `seq` failed: do not wait for it to come. From any thread."""
        with self._lock:
            self._called_off.add(seq)

    def drop(self, gpu: int) -> None:
        """Tear down the groups that a lost GPU was in; weights, request states and other groups stay. From any
        thread where NCCL is, else from the one that computes."""
        with self._lock:
            torn = [self._groups.pop(gpus) for gpus in list(self._groups) if gpu in gpus]
        for group in torn:
            group.close()

    def leave(self, gpus: tuple[int, ...], seq: int) -> None:
        """Range `seq` over a set failed: tear its group down, unless a later range built it, and all that this range
        built (warming builds several). From which thread: as `drop`."""
        with self._lock:
            torn = [
                self._groups.pop(known)
                for known, group in list(self._groups.items())
                if group.seq == seq or (known == gpus and group.seq < seq)
            ]
        for group in torn:
            group.close()

    def close(self) -> None:
        """Leave the cell."""
        with self._lock:
            groups, self._groups = self._groups, {}
        for group in groups.values():
            group.close()

    def _backend(self, store: dist.Store, rank: int, gpus: tuple[int, ...]) -> Any:
        """torch's backend over the members of `store`; NCCL connects at the first exchange, gloo here."""
        waiting = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        if self.device.type == "cuda":
            options: Any = dist.ProcessGroupNCCL.Options()
            options._timeout = waiting
            # for its logs
            options.group_name = "-".join(map(str, gpus))
            options.global_ranks_in_group = list(gpus)
            return dist.ProcessGroupNCCL(store, rank, len(gpus), options)
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=LOOPBACK)]
        options._timeout = datetime.timedelta(seconds=BUILD_TIMEOUT_S)
        backend = gloo(store, rank, len(gpus), options)
        backend._set_default_timeout(waiting)
        return backend
