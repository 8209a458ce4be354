"""Compiled blocks: the same latents, and nothing is compiled anew for other sizes or degrees. Traced, but run by
PyTorch as they are: `bench/compiled.py` has them compiled to the end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import (
    tiny_flux,
    tiny_flux2_klein,
    tiny_hunyuan_video,
    tiny_qwen_image,
    tiny_sd3,
    tiny_wan,
    tiny_z_image,
)

from tetriserve.engine.adapter import ModelAdapter, ModelLimits
from tetriserve.engine.compiled import compile_blocks
from tetriserve.engine.groups import SPGroup
from tetriserve.engine.kernels import attention_kernel
from tetriserve.models.load import load_model
from tetriserve.request import GenerateRequest

CPU = torch.device("cpu")
SIZES = (112, 208), (128, 128), (160, 144)


class NoExchange(SPGroup):
    """A member of a group of two that gets zeros from the other."""

    def __init__(self) -> None:
        super().__init__((0, 1), 0, None, 0)

    def all_to_all(self, sent: torch.Tensor, sent_rows: Any, rows: Any) -> torch.Tensor:
        return sent.new_zeros(sum(rows), *sent.shape[1:])


def load(folder: Path) -> ModelAdapter:
    return load_model(
        str(folder),
        ModelLimits("m"),
        attention_kernel("auto", CPU),
        dtype=torch.float32,
        device=CPU,
    )


def run(adapter: ModelAdapter, size: tuple[int, int], group: SPGroup | None = None) -> torch.Tensor:
    frames = 5 if adapter.info.max_frames > 1 else 1
    request = adapter.resolve(
        GenerateRequest(
            "a star",
            *size,
            num_inference_steps=2,
            seed=1,
            num_frames=frames,
            negative_prompt="a cross",
            true_cfg_scale=2.0,
        )
    )
    with torch.inference_mode():
        state = adapter.begin(request, adapter.encode(request))
        with adapter.over(group):
            adapter.step(state)
            adapter.step(state)
    return state.latents


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What dynamo counts."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "make",
    [
        tiny_flux,
        tiny_sd3,
        *(pytest.param(make, marks=pytest.mark.slow) for make in (tiny_qwen_image, tiny_wan, tiny_z_image)),
        *(pytest.param(make, marks=pytest.mark.long) for make in (tiny_flux2_klein, tiny_hunyuan_video)),
    ],
)
def test_other_sizes_and_degrees_need_no_new_graph(
    tmp_path: Path, traced: Any, make: Callable[[Path], Path]
) -> None:
    folder = make(tmp_path / "model")
    plain, compiled = load(folder), load(folder)
    for transformer in compiled.transformers():
        compile_blocks(transformer)
    latents = run(compiled, SIZES[0])
    graphs = traced["stats"]["unique_graphs"]
    assert graphs > 0
    torch.testing.assert_close(latents, run(plain, SIZES[0]), rtol=1e-4, atol=1e-4)
    for size in SIZES[1:]:
        torch.testing.assert_close(run(compiled, size), run(plain, size), rtol=1e-4, atol=1e-4)
    for size in SIZES:
        run(compiled, size, NoExchange())
    assert traced["stats"]["unique_graphs"] == graphs
    assert sum(traced["graph_break"].values()) == 0
