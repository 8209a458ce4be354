"""Previews: when one is made, what it shows, and that the picture is the same without."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import tiny_flux, tiny_flux2_klein, tiny_qwen_image, tiny_sd3

from tetriserve.engine import preview
from tetriserve.engine.adapter import ModelLimits
from tetriserve.engine.engine import Engine
from tetriserve.engine.groups import GroupTable
from tetriserve.engine.kernels import attention_kernel
from tetriserve.models.load import load_model
from tetriserve.request import GenerateRequest

CPU = torch.device("cpu")
STEPS = 8


@pytest.mark.parametrize(
    ("steps", "previews", "marks"),
    [(8, 0, []), (8, 1, [4]), (8, 3, [2, 4, 6]), (10, 2, [4, 7]), (3, 3, [1, 2, 3]), (1, 3, [1])],
)
def test_marks_are_evenly_spaced(steps: int, previews: int, marks: list[int]) -> None:
    passed = partial(preview.marks_passed, previews, steps)
    assert [end for end in range(1, steps + 1) if passed(end - 1, end)] == marks
    assert passed(0, steps) == bool(marks)
    assert not passed(marks[-1] if marks else 0, steps)


class LinearVAE:
    """Decodes every latent to a block of one colour, as an adapter."""

    def __init__(self, channels: int) -> None:
        self.device = CPU
        self.latent_channels = channels
        self.colors = torch.randn(channels + 1, 3, generator=torch.Generator().manual_seed(1)) / channels
        self.decodes = 0

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        self.decodes += 1
        rgb = torch.einsum("bchw,cd->bdhw", latents, self.colors[:-1]) + self.colors[-1].view(1, 3, 1, 1)
        return rgb.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


@pytest.mark.parametrize("channels", [4, 16, 64])
def test_a_linear_decoder_is_found_exactly(channels: int) -> None:
    vae: Any = LinearVAE(channels)
    colors = preview.fit_colors(vae)
    torch.testing.assert_close(colors, vae.colors, atol=1e-4, rtol=1e-3)
    latents = torch.randn(1, channels, 12, 20, generator=torch.Generator().manual_seed(2))
    rgb = preview.picture(latents, colors)
    assert (rgb.shape, rgb.dtype) == ((12, 20, 3), np.uint8)
    expected = (vae.pixels(latents)[0, :, ::8, ::8].permute(1, 2, 0) + 1) * 127.5
    assert np.abs(rgb - expected.clamp(0, 255).numpy()).max() <= 1


@pytest.fixture(scope="module", params=["flux", "sd3", "qwen-image", "flux2-klein"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    make = {
        "flux": tiny_flux,
        "sd3": tiny_sd3,
        "qwen-image": tiny_qwen_image,
        "flux2-klein": tiny_flux2_klein,
    }[request.param]
    torch.set_num_threads(1)
    folder: Path = make(tmp_path_factory.mktemp("models") / request.param)
    limits = ModelLimits("m", max_sequence_length=30)
    adapter = load_model(
        str(folder), limits, attention_kernel("native", CPU), dtype=torch.float32, device=CPU
    )
    return Engine(adapter, GroupTable(0, CPU, Path("unused")))


def run(
    engine: Engine, ranges: list[int], previews: int
) -> tuple[np.ndarray, dict[int, np.ndarray], np.ndarray]:
    """Latents, previews by steps done, and the picture of a request that runs in `ranges`."""
    request = GenerateRequest("a star", 96, 160, num_inference_steps=STEPS, seed=3, previews=previews)
    engine.encode("r", request)
    done, shown = 0, {}
    for steps in ranges:
        report = engine.denoise("r", (0,), done, steps)
        done += steps
        if report.previews[0] is not None:
            shown[done] = report.previews[0]
    latents = engine.pack("r").tensor.array
    _, image = engine.decode("r")
    engine.release("r")
    return latents, shown, image


def test_the_picture_is_the_same_to_the_bit(engine: Engine) -> None:
    torch.manual_seed(0)
    drawn = torch.get_rng_state()
    without, none, image = run(engine, [1] * STEPS, 0)
    assert none == {}
    latents, shown, same = run(engine, [1] * STEPS, 3)
    assert sorted(shown) == [2, 4, 6]
    np.testing.assert_array_equal(latents, without)
    np.testing.assert_array_equal(image, same)
    assert torch.equal(torch.get_rng_state(), drawn)
    for rgb in shown.values():
        assert (rgb.shape, rgb.dtype) == ((12, 20, 3), np.uint8)


def test_a_range_over_several_marks_makes_one_preview(engine: Engine) -> None:
    assert sorted(run(engine, [1, 5, 2], 3)[1]) == [6]
    assert sorted(run(engine, [STEPS], 2)[1]) == [STEPS]


def test_a_preview_shows_where_the_flow_leads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the last step it is what the finished latents look like; before that it comes closer to it."""
    # colours in which small differences of latents show; those of a VAE without training hardly differ
    colors = torch.randn(17, 3, generator=torch.Generator().manual_seed(1)) / 8
    monkeypatch.setattr(engine, "_colors", colors)
    request = GenerateRequest("a star", 96, 160, num_inference_steps=STEPS, seed=3)
    latents, shown, _ = run(engine, [1] * (STEPS - 2) + [2], STEPS)
    with torch.inference_mode():
        held = engine.adapter.spatial(request, torch.from_numpy(latents.copy()))
        finished = preview.picture(held, colors).astype(int)
    assert np.abs(shown[STEPS] - finished).max() <= 1
    away = [np.abs(rgb - finished).mean() for _, rgb in sorted(shown.items())]
    assert away[0] > away[2] > away[4] > away[-1]
