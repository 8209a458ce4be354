"""One mechanism shards every family: over changing groups of real processes a transformer predicts what it predicts
alone, and not when the exchange is left out."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from small_transformers import CASES, make

from tetriserve.engine.groups import GroupTable, SPGroup
from tetriserve.engine.kernels import attention_kernel
from tetriserve.engine.sequence import SequenceParallel

N_GPUS = 4
CPU = torch.device("cpu")
GROUPS = ([(0,), (1,), (2,), (3,)], [(0, 1), (2, 3)], [(0, 1, 2, 3)], [(0, 1), (2, 3)], [(0, 1, 2, 3)])
"""One step over each of these, side by side."""


class Alone(SPGroup):
    """A member that hears only itself."""

    def all_to_all(self, sent, sent_rows, rows):
        return sent[:1].expand(sum(rows), *sent.shape[1:]).clone()


_table: GroupTable


def join(folder: Path, counter) -> None:
    global _table
    torch.set_num_threads(1)
    with counter.get_lock():
        gpu, counter.value = counter.value, counter.value + 1
    _table = GroupTable(gpu, CPU, folder)


def denoise(name: str, exchanging: bool) -> tuple[int, torch.Tensor]:
    """Euler steps on this GPU, which takes part in every group that holds it."""
    case = make(name)
    parallel = SequenceParallel(case.model, case.plan, attention_kernel("native", CPU), case.kinds)
    x, steps = case.latents, len(GROUPS)
    with torch.no_grad():
        for step, sets in enumerate(GROUPS):
            (gpus,) = (gpus for gpus in sets if _table.gpu in gpus)
            group = _table.group(gpus, 0)
            if group is not None and not exchanging:
                group = Alone(group.gpus, group.rank, None, 0)
            with parallel.over(group):
                x = x - case.predict(case.model, x, torch.tensor([1 - step / steps])) / steps
    return _table.gpu, x


def alone(name: str) -> torch.Tensor:
    """diffusers' own, untouched."""
    case = make(name)
    x, steps = case.latents, len(GROUPS)
    with torch.no_grad():
        for step in range(steps):
            x = x - case.predict(case.model, x, torch.tensor([1 - step / steps])) / steps
    return x


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """As many processes as GPUs: each takes exactly one of as many tasks, for all must have come before one ends."""
    context = mp.get_context("spawn")
    folder = tmp_path_factory.mktemp("meeting")
    with ProcessPoolExecutor(N_GPUS, context, join, (folder, context.Value("i", 0))) as pool:
        yield pool


@pytest.mark.parametrize("name", CASES)
def test_every_family_predicts_what_it_predicts_alone(gpus: ProcessPoolExecutor, name: str) -> None:
    expected = alone(name)
    made = dict(gpus.map(denoise, [name] * N_GPUS, [True] * N_GPUS))
    assert set(made) == set(range(N_GPUS))
    for latents in made.values():
        assert torch.equal(latents, made[0])
    error = (made[0] - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, f"{name}: {error}"


@pytest.mark.parametrize("name", [name for name in CASES if name != "flux_with_as_many_words_nearly"])
def test_without_the_exchange_it_does_not(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The control: on one rank of two, as far as it gets."""
    case, expected = make(name), alone(name)
    parallel = SequenceParallel(case.model, case.plan, attention_kernel("native", CPU), case.kinds)
    x, steps = case.latents, len(GROUPS)
    with torch.no_grad():
        for step in range(steps):
            with parallel.over(Alone((0, 1), 0, None, 0) if step else None):
                x = x - case.predict(case.model, x, torch.tensor([1 - step / steps])) / steps
    assert (x - expected).abs().max() / expected.abs().max() > 1e-3
