"""Engines in real processes joined by gloo: the scheduler's part is played by the test, Ray is left out."""

from __future__ import annotations

import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import small_processor  # noqa: F401  (diffusers loads a part only from a module that is imported)
import torch
import torch.multiprocessing as mp

from solver.placement import group_sets


@dataclass(frozen=True)
class Served:
    """A model of the pool: its folder, how many text tokens it takes (None: its own), `options` of `load_model`."""

    folder: Path
    text_tokens: int | None
    options: dict[str, Any] = field(default_factory=dict)


def _serve(gpu: int, n_gpus: int, meeting: Path, models: dict[str, Served], pipe: Any) -> None:
    from tetriserve.engine.adapter import ModelLimits
    from tetriserve.engine.engine import Engine
    from tetriserve.engine.groups import GroupTable
    from tetriserve.engine.kernels import attention_kernel
    from tetriserve.models.load import load_model

    torch.set_num_threads(1)
    device = torch.device("cpu")
    groups = GroupTable(gpu, device, meeting)
    groups.warm(group_sets(n_gpus), -1)
    engines = {
        name: Engine(
            load_model(
                str(model.folder),
                ModelLimits(name, max_sequence_length=model.text_tokens),
                attention_kernel("auto", device),
                dtype=torch.float32,
                device=device,
                **model.options,
            ),
            groups,
        )
        for name, model in models.items()
    }
    while True:
        message = pipe.recv()
        if message is None:
            groups.close()
            return
        model, method, args = message
        try:
            target = engines[model]
            pipe.send(getattr(target, method)(*args))
        except Exception:
            pipe.send(RuntimeError(traceback.format_exc()))


class ReplicaPool:
    """`n_gpus` processes, each holding all of `models`."""

    def __init__(self, n_gpus: int, models: dict[str, Served]) -> None:
        self._meeting = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self.n_gpus = n_gpus
        self._pipes, self._processes = [], []
        for gpu in range(n_gpus):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(gpu, n_gpus, Path(self._meeting.name), models, theirs),
                daemon=True,
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, gpus: tuple[int, ...], model: str, method: str, *args: Any) -> list[Any]:
        """Run a method of the engine on several replicas at once; results in the order of `gpus`."""
        for gpu in gpus:
            self._pipes[gpu].send((model, method, args))
        results = [self._pipes[gpu].recv() for gpu in gpus]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def send(self, gpu: int, model: str, method: str, *args: Any) -> None:
        self._pipes[gpu].send((model, method, args))

    def receive(self, gpu: int) -> Any:
        result = self._pipes[gpu].recv()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(timeout=30)
            if process.is_alive():
                process.kill()
        self._meeting.cleanup()
