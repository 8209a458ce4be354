"""What every part of the GPU run shares: where it runs, how it times, rows that are on disk once they are known."""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # the package need not be installed

GIB = 1 << 30


@dataclass(frozen=True)
class Place:
    """Where a part runs.

    Attributes:
        out: folder of the results.
        device: "cuda" or "cpu".
        small: everything in a size for two CPU cores.
        scratch: folder for model weights, on the fastest thing there is.
    """

    out: Path
    device: str
    small: bool
    scratch: Path

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def flux(self) -> Path:
        """The model folder in FLUX.1-dev's dimensions."""
        return self.scratch / "flux"

    def sync(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], object], repeats: int = 5, warmup: int = 2) -> tuple[float, float]:
        """Median milliseconds until `call` is done, and until it has returned: launched, on a GPU."""
        times = []
        for number in range(warmup + repeats):
            self.sync()
            start_s = time.perf_counter()
            call()
            launched_s = time.perf_counter() - start_s
            self.sync()
            if number >= warmup:
                times.append((1e3 * (time.perf_counter() - start_s), 1e3 * launched_s))
        done_ms, launched_ms = (statistics.median(column) for column in zip(*times, strict=True))
        return done_ms, launched_ms

    @contextmanager
    def peak_gib(self) -> Iterator[Callable[[], float]]:
        """Gives what torch allocated at most inside, above what was there before; 0 on a CPU."""
        before = 0
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        yield lambda: (torch.cuda.max_memory_allocated() - before) / GIB if self.on_cuda else 0.0


class Rows:
    """The rows of a part, in `PART.jsonl` of the results: a part that is cut leaves what it had."""

    def __init__(self, out: Path, part: str) -> None:
        self._file = (out / f"{part}.jsonl").open("a")

    def add(self, **values: Any) -> None:
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
        self._file.write(json.dumps(rounded) + "\n")
        self._file.flush()
        print("   ", " ".join(f"{key}={value}" for key, value in rounded.items()), flush=True)

    @contextmanager
    def or_error(self, **values: Any) -> Iterator[None]:
        """What fails inside becomes a row, and the part goes on."""
        try:
            yield
        except Exception as error:
            self.add(**values, error=f"{type(error).__name__}: {str(error)[:300]}")


def rows_of(out: Path, part: str) -> list[dict[str, Any]]:
    file = out / f"{part}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def host_peak_gib() -> float:
    """Resident memory of this process at its highest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def roomy_folder(needed_bytes: int) -> Path:
    """In memory where it has the room, else where temporary files go."""
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free > needed_bytes:
        return shared
    return Path("/tmp")
