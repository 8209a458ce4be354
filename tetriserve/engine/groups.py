"""Communication groups of a cell: one per GPU set, warmed before use, rebuilt on a fresh store after a loss.

Aligned sets (pairs, fours, eights) exist from `connect` on; other sets are made when a plan first needs them.
Size-1 groups are never built: one NCCL communicator costs half a gigabyte (peers.md, section 6).
After a failed range all its members leave their group: who stopped where is unknown, and the next range over it
would meet messages of the failed one. The range that needs the set next builds it anew.

torch's backends are used directly, without its default process group: `new_group` must either be called by
the whole world or derives the group's name from a counter that differs between ranks with different sets,
and then hangs (torch 2.11 to 2.13). A set names itself here.
"""

from __future__ import annotations

import datetime
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT_S = 1800.0
"""A rank may wait this long for its partners, who may still be in an earlier assignment; the scheduler's
watchdog acts long before."""

BUILD_TIMEOUT_S = 30.0
"""Members that have all met build their group within this time."""

MEET_POLL_S = 0.002

LOOPBACK = "127.0.0.1"
"""A cell lives on one node: nothing of it listens on the network."""


@dataclass
class SPGroup:
    """A GPU set that runs one step together; `rank` is this GPU's place in it, `seq` the range that built it."""

    gpus: tuple[int, ...]
    rank: int
    backend: Any
    seq: int = -1

    @property
    def degree(self) -> int:
        return len(self.gpus)

    def rows(self, length: int) -> tuple[int, ...]:
        """How a sequence is cut over the ranks: the first `length % degree` ranks take one row more."""
        base, more = divmod(length, self.degree)
        return tuple(base + (rank < more) for rank in range(self.degree))

    def all_to_all(self, sent: torch.Tensor, sent_rows: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        """Exchange row blocks: block j of contiguous `sent` goes to rank j, all ranks' blocks come back.

        Args:
            sent: [sum(sent_rows), ...].
            sent_rows: rows for each rank.
            rows: rows from each rank.
        """
        got = sent.new_empty(sum(rows), *sent.shape[1:])
        self.backend.alltoall_base(got, sent, list(rows), list(sent_rows)).wait()
        return got

    def agree(self, device: torch.device) -> None:
        """Return when all members got here. Raises RuntimeError when one failed before."""
        ones = [1] * self.degree
        # zeros stay where an aborted kernel brought nothing
        got = torch.zeros(self.degree, device=device)
        self.backend.alltoall_base(got, torch.ones_like(got), ones, ones).wait()
        if not got.all():
            raise RuntimeError(f"a member of {self.gpus} failed")

    def close(self) -> None:
        """Leave; gloo's other members fail at once, NCCL's when they are told to leave."""
        self.backend.abort()
        self.backend = None  # gloo hangs up when the object goes away


def open_store() -> tuple[int, dist.TCPStore]:
    """A fresh rendezvous store on a free loopback port: (port, store). It lives as long as the object."""
    listener = socket.socket()
    listener.bind((LOOPBACK, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return port, store


class GroupTable:
    """This GPU's groups.

    All members of a set must use it in the same order relative to other sets; plan order gives that. A group
    that does not exist yet is built over the store of the `epoch` that its members are told, so that all of
    them meet in the same place while GPUs are being replaced.
    """

    def __init__(self, gpu: int, device: torch.device) -> None:
        self.gpu = gpu
        self.device = device
        self._stores: dict[int, dist.Store] = {}
        self._groups: dict[tuple[int, ...], SPGroup] = {}
        self._called_off: set[int] = set()

    def join(self, epoch: int, port: int) -> None:
        """Use the store on `port` for groups that are built in `epoch`."""
        self._stores[epoch] = dist.TCPStore(LOOPBACK, port, is_master=False, timeout=_timeout())

    def warm(self, epoch: int, sets: Iterable[tuple[int, ...]]) -> None:
        """Build those of `sets` that hold this GPU; every member must do the same."""
        for gpus in sets:
            if self.gpu in gpus:
                self.group(gpus, epoch, -1)

    def group(self, gpus: tuple[int, ...], epoch: int, seq: int) -> SPGroup | None:
        """The group of a GPU set that holds this GPU, made and warmed on first use; None for a single GPU.

        `seq` is the range that asks, the same on all members: they meet under it, since names in a store are
        good for one meeting only. Raises RuntimeError when the range is called off before all have come.
        """
        if len(gpus) == 1:
            return None
        found = self._groups.get(gpus)
        if found is None:
            if epoch not in self._stores:
                raise RuntimeError(f"GPU {self.gpu} has not joined epoch {epoch} of its cell")
            rank = gpus.index(self.gpu)
            name = "-".join(map(str, gpus))
            store = dist.PrefixStore(f"{name}@{seq}", self._stores[epoch])
            self._meet(store, rank, len(gpus), seq)
            found = SPGroup(gpus, rank, self._backend(store, rank, len(gpus)), seq)
            ones = [1] * len(gpus)
            found.all_to_all(torch.zeros(len(gpus), device=self.device), ones, ones)
            self._groups[gpus] = found
        return found

    def _meet(self, store: dist.Store, rank: int, size: int, seq: int) -> None:
        """Wait until all members are here: partners may still be in an earlier range, and building cannot be
        interrupted."""
        self._called_off.difference_update([old for old in tuple(self._called_off) if old < seq])
        store.set(f"here/{rank}", "")
        everyone = [f"here/{member}" for member in range(size)]
        while not store.check(everyone):
            if seq in self._called_off:
                raise RuntimeError(f"range {seq} was called off: a member failed")
            time.sleep(MEET_POLL_S)

    def call_off(self, seq: int) -> None:
        """A member of range `seq` failed: do not wait for it to come. From any thread."""
        self._called_off.add(seq)

    def drop(self, gpu: int) -> None:
        """Tear down the groups that a lost GPU was in; weights, request states and other groups stay."""
        for gpus in [gpus for gpus in self._groups if gpu in gpus]:
            self._groups.pop(gpus).close()

    def leave(self, gpus: tuple[int, ...], seq: int) -> None:
        """Range `seq` over a set failed: tear its group down, unless a later range built it."""
        found = self._groups.get(gpus)
        if found is not None and found.seq <= seq:
            del self._groups[gpus]
            found.close()

    def close(self) -> None:
        """Leave the cell."""
        for group in self._groups.values():
            group.close()
        self._groups.clear()
        self._stores.clear()

    def _backend(self, store: dist.Store, rank: int, size: int) -> Any:
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _timeout()
            return dist.ProcessGroupNCCL(store, rank, size, options)
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=LOOPBACK)]
        options._timeout = datetime.timedelta(seconds=BUILD_TIMEOUT_S)
        backend = gloo(store, rank, size, options)
        backend._set_default_timeout(_timeout())
        return backend


def _timeout() -> datetime.timedelta:
    return datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
