"""The ranges that were committed to GPUs and not yet reported, and when they can be expected to end."""

from __future__ import annotations

import math

from tetriserve.scheduler.assignment import Assignment

QUEUE_DEPTH = 2
"""Assignments a GPU may hold: the running one and the one behind it, so that it never waits for the brain."""


class Committed:
    """The queues of the GPUs.

    Attributes:
        free_at_s: by GPU, when it is done with what it holds, as far as is known; infinite while it is lost.
    """

    def __init__(self, n_gpus: int) -> None:
        self.free_at_s = [-math.inf] * n_gpus
        self._running: dict[int, Assignment] = {}
        self._began_s: dict[int, float] = {}
        self._queue: list[list[int]] = [[] for _ in range(n_gpus)]
        self._last_seq = [-1] * n_gpus

    def __len__(self) -> int:
        return len(self._running)

    @property
    def running(self) -> list[Assignment]:
        """In plan order."""
        return [self._running[seq] for seq in sorted(self._running)]

    def takes(self, gpus: tuple[int, ...]) -> bool:
        """Whether one more range may be committed to these GPUs."""
        return all(len(self._queue[g]) < QUEUE_DEPTH and self.free_at_s[g] < math.inf for g in gpus)

    def last_seqs(self, gpus: tuple[int, ...]) -> tuple[int, ...]:
        """Of each of these GPUs, the range that was committed to it last, -1 for none."""
        return tuple(self._last_seq[gpu] for gpu in gpus)

    def add(self, assignment: Assignment) -> None:
        self._running[assignment.seq] = assignment
        for gpu in assignment.gpus:
            self._queue[gpu].append(assignment.seq)
            self._last_seq[gpu] = assignment.seq

    def retire(self, seq: int, now_s: float) -> Assignment:
        """A range was reported, done or not. Returns it."""
        assignment = self._running.pop(seq)
        self._began_s.pop(seq, None)
        for gpu in assignment.gpus:
            self._queue[gpu].remove(seq)
            self._free_at(gpu, now_s)
        return assignment

    def lose(self, gpu: int) -> None:
        self.free_at_s[gpu] = math.inf

    def regain(self, gpu: int, now_s: float) -> None:
        self.free_at_s[gpu] = now_s
        self._last_seq[gpu] = -1

    def expected(self, now_s: float) -> list[tuple[Assignment, float, float]]:
        """The running assignments in plan order, each with the start and the end that can be expected now.

        A range begins when the ranges before it, on its GPUs and of its requests, have been reported; all that
        waits behind moves with it, on all its GPUs alike.
        """
        gpu_end_s: dict[int, float] = {}
        request_end_s: dict[str, float] = {}
        expected = []
        for assignment in self.running:
            before = [gpu_end_s[gpu] for gpu in assignment.gpus if gpu in gpu_end_s]
            before += [request_end_s[i] for i in assignment.request_ids if i in request_end_s]
            start_s = max(before) if before else self._began_s.setdefault(assignment.seq, now_s)
            end_s = max(now_s, start_s + assignment.end_s - assignment.start_s)
            gpu_end_s.update(dict.fromkeys(assignment.gpus, end_s))
            request_end_s.update(dict.fromkeys(assignment.request_ids, end_s))
            expected.append((assignment, start_s, end_s))
        return expected

    def update(self, now_s: float) -> dict[str, float]:
        """Bring `free_at_s` up to date. Returns when the ranges of each request will have ended."""
        ready_s = {}
        for assignment, _, end_s in self.expected(now_s):  # the last one of a GPU or a request counts
            for gpu in assignment.gpus:
                self._free_at(gpu, end_s)
            ready_s.update(dict.fromkeys(assignment.request_ids, end_s))
        return ready_s

    def _free_at(self, gpu: int, at_s: float) -> None:
        if self.free_at_s[gpu] < math.inf:
            self.free_at_s[gpu] = at_s
