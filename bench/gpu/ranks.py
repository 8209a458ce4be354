"""Processes that play the GPUs of a cell: NCCL with a GPU each, NCCL or gloo on one GPU for all, gloo on the CPU."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetriserve.engine.environment import ENVIRONMENT, set_environment

ANSWER_S = 60.0
LOAD_S = 100.0


@dataclass(frozen=True)
class Setting:
    """How the ranks are set up.

    Attributes:
        device: "cuda" or "cpu".
        backend: "nccl" or "gloo", which takes CUDA tensors too, by way of the host.
        share: all ranks on one GPU, which NCCL refuses unless each says that it is another host.
        dtype: torch's name.
        model: folder, "embedded", or None for exchanges alone.
        defaults: with torch's own settings instead of ours.
    """

    device: str
    backend: str
    share: bool
    dtype: str = "float32"
    model: str | None = "embedded"
    defaults: bool = False


def serve(gpu: int, setting: Setting, folder: Path, pipe: Any) -> None:
    """Runs the methods of `Rank` that come through the pipe."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if setting.defaults:
        for name in ENVIRONMENT:
            os.environ.pop(name, None)
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"  # or it finds no way between two ranks of one GPU
    else:
        set_environment()
    if setting.share:
        os.environ.update(NCCL_HOSTID=f"rank{gpu}", NCCL_IB_DISABLE="1")
    rank = Rank(gpu, setting, folder)
    pipe.send("ready")
    while (message := pipe.recv()) is not None:
        method, args = message
        try:
            pipe.send(getattr(rank, method)(*args))
        except Exception:
            pipe.send(RuntimeError(traceback.format_exc()[-800:]))
    os._exit(0)


class Rank:
    """One GPU: its groups, and an engine where the setting has a model."""

    def __init__(self, gpu: int, setting: Setting, folder: Path) -> None:
        import torch

        from tetriserve.engine.adapter import ModelLimits
        from tetriserve.engine.engine import Engine
        from tetriserve.engine.groups import GroupTable
        from tetriserve.engine.kernels import attention_kernel
        from tetriserve.models.load import load_model

        class Gloo(GroupTable):
            """gloo for tensors of any device."""

            def _backend(self, store: Any, rank: int, gpus: tuple[int, ...]) -> Any:
                return GroupTable(self.gpu, torch.device("cpu"), folder)._backend(store, rank, gpus)

        self.gpu, self.torch, self.on_cuda = gpu, torch, setting.device == "cuda"
        self.device = (
            torch.device("cuda", 0 if setting.share else gpu) if self.on_cuda else torch.device("cpu")
        )
        self.dtype = getattr(torch, setting.dtype)
        if self.on_cuda:
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(1)
        self.groups = (GroupTable if setting.backend == "nccl" else Gloo)(gpu, self.device, folder)
        self.held: list[Any] = []
        if setting.model is not None:
            limits = ModelLimits("ranks", max_sequence_length=64 if setting.model == "embedded" else None)
            kernel = attention_kernel("auto", self.device)
            adapter = load_model(setting.model, limits, kernel, dtype=self.dtype, device=self.device)
            self.engine = Engine(adapter, self.groups)

    def sync(self) -> None:
        if self.on_cuda:
            self.torch.cuda.synchronize()

    def call(self, method: str, *args: Any) -> Any:
        """A method of the engine."""
        return getattr(self.engine, method)(*args)

    def exchange(self, gpus: tuple[int, ...], seq: int) -> str:
        """Rows that the ranks do not divide evenly; "ok" when everybody has everybody's."""
        torch, group = self.torch, self.groups.group(gpus, seq)
        assert group is not None
        rows = group.rows(7 * len(gpus) + 1)
        mine = rows[group.rank]
        sent = torch.full((mine * len(gpus), 4, 16), float(self.gpu), device=self.device, dtype=self.dtype)
        got = group.all_to_all(sent, [mine] * len(gpus), rows)
        group.agree(self.device)
        want = torch.cat([torch.full((n,), float(gpu)) for gpu, n in zip(gpus, rows, strict=True)])
        return "ok" if torch.equal(got[:, 0, 0].float().cpu(), want) else f"wrong: {got[:, 0, 0].tolist()}"

    def timed_exchange(self, gpus: tuple[int, ...], seq: int, tokens: int, width: int, repeats: int) -> float:
        """Median milliseconds of one all-to-all of `tokens` x `width` over the group, as attention has three of."""
        torch, group = self.torch, self.groups.group(gpus, seq)
        assert group is not None
        rows = group.rows(tokens)
        mine = rows[group.rank]
        sent = torch.ones(mine * len(gpus), width // len(gpus), device=self.device, dtype=self.dtype)
        times = []
        for _ in range(3 + repeats):
            self.sync()
            start_s = time.perf_counter()
            group.all_to_all(sent, [mine] * len(gpus), rows)
            self.sync()
            times.append(1e3 * (time.perf_counter() - start_s))
        group.agree(self.device)
        return statistics.median(times[3:])

    def alone(self, gpus: tuple[int, ...], seq: int, leave_after_s: float | None) -> dict[str, Any]:
        """An exchange that not everybody comes to.

        NCCL's group is left from another thread after so long, as `GPUReplica.leave` does; None: from this one, when
        the exchange fails, as gloo's does at once when a member dies.
        """
        torch, group, out = self.torch, self.groups.group(gpus, seq), dict[str, Any]()
        assert group is not None

        def leave() -> None:
            time.sleep(leave_after_s or 0)
            start_s = time.monotonic()
            self.groups.call_off(seq)
            self.groups.leave(gpus, seq)
            out["leave_s"] = round(time.monotonic() - start_s, 3)

        thread = threading.Thread(target=leave)
        if leave_after_s is not None:
            thread.start()
        start_s = time.monotonic()
        try:
            sent = torch.ones(len(gpus), 64, device=self.device)
            for _ in range(200):
                group.all_to_all(sent, [1] * len(gpus), [1] * len(gpus))
            self.sync()
            group.agree(self.device)
            out["error"] = "none"
        except Exception as error:
            out["error"] = f"{type(error).__name__}: {str(error)[:120]}"
        out["stood_s"] = round(time.monotonic() - start_s, 3)
        if leave_after_s is None:
            thread.start()
        thread.join()
        out["device_works"] = self.device_works()
        return out

    def device_works(self) -> bool:
        return float(self.torch.ones(3, device=self.device).sum()) == 3

    def free_mib(self) -> int:
        """Memory that nobody has on this rank's GPU."""
        return self.torch.cuda.mem_get_info(self.device)[0] >> 20 if self.on_cuda else 0

    def fill(self, leave_mib: int) -> int:
        """Take all memory but so much."""
        while (free := self.free_mib()) > leave_mib + 8:
            self.held.append(
                self.torch.empty((free - leave_mib) << 20, dtype=self.torch.uint8, device=self.device)
            )
        return self.free_mib()

    def what_exchange_says(self, gpus: tuple[int, ...], seq: int) -> dict[str, Any]:
        """The error of an exchange, and what is made of it."""
        from tetriserve.engine.engine import is_out_of_memory

        try:
            said = self.exchange(gpus, seq)
            short = False
        except Exception as error:
            said, short = f"{type(error).__name__}: {str(error)[:300]}", is_out_of_memory(error)
        self.held.clear()
        if self.on_cuda:
            self.torch.cuda.empty_cache()
        self.groups.leave(gpus, seq)
        return {"said": said, "is_out_of_memory": short, "device_works": self.device_works()}

    def listens_on(self) -> list[str]:
        """Addresses that this process listens on, beyond loopback."""
        mine = set()
        for link in Path("/proc/self/fd").iterdir():
            try:
                mine.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
            except OSError:
                continue
        found = []
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if (
                    state == "0A"
                    and rest[5] in mine
                    and not local.startswith(("0100007F", "0" * 24 + "01000000"))
                ):
                    found.append(local)
        return found


class Ranks:
    """The processes; a context manager that leaves none behind."""

    def __init__(self, n: int, setting: Setting) -> None:
        self._setting = setting
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: dict[int, Any] = {}
        self.processes: dict[int, Any] = {}
        self.everyone = tuple(range(n))
        for gpu in self.everyone:
            self.start(gpu)
        for gpu in self.everyone:
            self.ready(gpu)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
        self._folder.cleanup()

    def start(self, gpu: int) -> None:
        context = mp.get_context("spawn")
        self._pipes[gpu], theirs = context.Pipe()
        self.processes[gpu] = context.Process(
            target=serve, args=(gpu, self._setting, Path(self._folder.name), theirs), daemon=True
        )
        self.processes[gpu].start()
        theirs.close()

    def ready(self, gpu: int) -> None:
        """Wait until it has loaded."""
        if (said := self.get(gpu, LOAD_S)) != "ready":
            raise RuntimeError(f"rank {gpu} does not start: {said}")

    def kill(self, gpu: int) -> None:
        os.kill(self.processes[gpu].pid, signal.SIGKILL)
        self.processes[gpu].join()

    def send(self, gpu: int, method: str, *args: Any) -> None:
        with contextlib.suppress(OSError):  # `get` says that it died
            self._pipes[gpu].send((method, args))

    def get(self, gpu: int, patience_s: float = ANSWER_S) -> Any:
        """What it answers; an exception is returned, not raised, and so are silence, which ends it, and death, as
        text."""
        try:
            if not self._pipes[gpu].poll(patience_s):
                self.kill(gpu)  # its late answer would be taken for that to the next question
                return f"no answer in {patience_s:g} s"
            return self._pipes[gpu].recv()
        except (EOFError, ConnectionResetError):
            self.processes[gpu].join()
            return f"died with {self.processes[gpu].exitcode}"

    def all(self, gpus: Sequence[int], method: str, *args: Any) -> list[Any]:
        for gpu in gpus:
            self.send(gpu, method, *args)
        return [self.get(gpu) for gpu in gpus]
