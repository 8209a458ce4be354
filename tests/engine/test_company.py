"""Steps of several requests in one forward: what each gets is what it gets alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
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

from tetriserve.engine.adapter import ModelAdapter, ModelLimits, RequestState
from tetriserve.engine.company import Members, Modulation
from tetriserve.engine.kernels import attention_kernel
from tetriserve.models.load import load_model
from tetriserve.request import GenerateRequest

CPU = torch.device("cpu")
STEPS = 6
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "flux": tiny_flux,
    "flux schnell": lambda folder: tiny_flux(folder, guidance_embeds=False),
    "sd3.5": tiny_sd3,
    "sd3": lambda folder: tiny_sd3(folder, dual_attention=False),
    "qwen-image": tiny_qwen_image,
    "flux.2": tiny_flux2_klein,
    "wan 2.1": tiny_wan,
    "wan 2.2": lambda folder: tiny_wan(folder, experts=True),
    "z-image": tiny_z_image,
    "hunyuan-video": tiny_hunyuan_video,
}
FLAT = ("flux", "flux schnell", "sd3.5", "sd3", "qwen-image")
SHAPES = [(128, 128), (112, 208), (256, 64), (128, 128)]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ModelAdapter]]:
    root, loaded = tmp_path_factory.mktemp("models"), {}
    torch.set_num_threads(1)

    def get(name: str) -> ModelAdapter:
        if name not in loaded:
            loaded[name] = load_model(
                str(FOLDERS[name](root / name)),
                ModelLimits("tiny", None if name == "hunyuan-video" else 30),
                attention_kernel("auto", CPU),
                dtype=torch.float32,
                device=CPU,
            )
        return loaded[name]

    yield get


def begun(adapter: ModelAdapter, seed: int, **options: Any) -> RequestState:
    """A request `seed` steps on its way."""
    height, width = SHAPES[seed % len(SHAPES)]
    words = "a small red circle beside a large blue star and a green ring".split()
    options = {"height": height, "width": width, "prompt": " ".join(words[: 3 * seed + 2]), **options}
    request = adapter.resolve(
        GenerateRequest(num_inference_steps=STEPS, seed=seed, guidance_scale=1.0 + seed, **options)
    )
    state = adapter.begin(request, adapter.encode(request))
    for _ in range(seed):
        adapter.step(state)
    return state


@contextmanager
def counted(adapter: ModelAdapter) -> Iterator[list[int]]:
    """Forwards of its transformers."""
    calls: list[int] = []
    hooks = [one.register_forward_hook(lambda *_: calls.append(1)) for one in adapter.transformers()]
    yield calls
    for hook in hooks:
        hook.remove()


def compared(alone: list[RequestState], together: list[RequestState]) -> float:
    """The largest difference, relative to the largest latent."""
    return max(
        float((a.latents - b.latents).abs().max() / a.latents.abs().max())
        for a, b in zip(alone, together, strict=True)
    )


@torch.inference_mode()
@pytest.mark.parametrize("name", FLAT)
def test_shapes_steps_and_texts_of_all_kinds_in_one_forward(adapters, name: str) -> None:
    adapter = adapters(name)
    alone, together = ([begun(adapter, seed) for seed in range(4)] for _ in range(2))
    for state in alone:
        adapter.step(state)
        if state.step < 4:
            adapter.step(state)
    with counted(adapter) as forwards:
        adapter.step_together(together)
    assert len(forwards) == 1
    adapter.step_together(together[:3])  # one left, the others are somewhere else by now
    assert compared(alone, together) < 1e-4
    # whose timesteps are mixed up gets something else: the comparison sees what it is for
    wrong = [begun(adapter, seed) for seed in (1, 2)]
    wrong[0].step = 3
    adapter.step_together(wrong)
    wrong[0].step = 2
    right = [begun(adapter, seed) for seed in (1, 2)]
    for state in right:
        adapter.step(state)
    assert compared(right[:1], wrong[:1]) > 1e-3
    assert compared(right[1:], wrong[1:]) < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("name", FOLDERS)
def test_pictures_of_one_shape(adapters, name: str) -> None:
    """On the batch axis where the family's calls can be merged, one after the other elsewhere."""
    adapter = adapters(name)
    same = {"height": 128, "width": 144, "prompt": "a star"}
    alone, together = ([begun(adapter, seed, **same) for seed in (1, 2, 3)] for _ in range(2))
    for state in alone:
        adapter.step(state)
    with counted(adapter) as forwards:
        adapter.step_together(together)
    assert compared(alone, together) < 1e-4
    if name not in ("z-image", "hunyuan-video"):
        guided = adapter.info.guided(together[0].request)
        split = 1 + (name in ("flux.2", "wan 2.1", "wan 2.2") and guided)
        assert len(forwards) <= split + (name == "wan 2.2") * 2


@torch.inference_mode()
@pytest.mark.parametrize("name", ["flux", "qwen-image", "sd3.5"])
def test_guided_beside_unguided(adapters, name: str) -> None:
    adapter = adapters(name)
    options = [
        {"true_cfg_scale": 3.0, "negative_prompt": "a cross"},
        {"true_cfg_scale": 1.0},
        {"true_cfg_scale": 2.0, "negative_prompt": "a cross and a ring"},
    ]
    if name == "sd3.5":  # its guidance is one call of two rows
        options = [{}, {}, {"negative_prompt": "a cross"}]
    alone, together = ([begun(adapter, seed, **more) for seed, more in enumerate(options)] for _ in range(2))
    for state in alone:
        adapter.step(state)
    adapter.step_together(together)
    assert compared(alone, together) < 1e-4


@torch.inference_mode()
def test_what_is_no_number_stays_with_its_request(adapters) -> None:
    adapter = adapters("flux")
    alone, together = ([begun(adapter, seed) for seed in range(3)] for _ in range(2))
    together[1].latents[:] = float("nan")
    adapter.step_together(together)
    adapter.step(alone[0])
    adapter.step(alone[2])
    assert not torch.isfinite(together[1].latents).all()
    assert compared([alone[0], alone[2]], [together[0], together[2]]) < 1e-4


@torch.inference_mode()
def test_reuse_is_each_requests_own(adapters) -> None:
    adapter = adapters("sd3")
    alone, together = ([begun(adapter, seed) for seed in (0, 1)] for _ in range(2))
    for states in (alone, together):
        states[1].request = replace(states[1].request, reuse_every=2)
    for _ in range(2):
        for state in alone:
            adapter.step(state)
        adapter.step_together(together)
    assert [len(state.velocities) for state in together] == [0, 2]
    for states in (alone, together):
        adapter.coast(states[1])
    assert compared(alone, together) < 1e-4


def test_a_modulation_of_unknown_form_is_refused() -> None:
    owners = torch.tensor([0, 0, 1])
    rows = Modulation.of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), owners)
    for spread in (rows[:, None], rows.unsqueeze(1), rows.unsqueeze(dim=1), (1 + rows)[:, None, :] - 1):
        assert type(spread) is torch.Tensor
        assert spread.tolist() == [[[1, 2], [1, 2], [3, 4]]]
    first, second = rows.chunk(2, dim=1)
    assert first[:, None].tolist() == [[[1], [1], [3]]] and second.unsqueeze(1).tolist() == [[[2], [2], [4]]]
    with pytest.raises(RuntimeError, match="not known to belong"):
        rows * torch.ones(1, 2, 2)


def test_shards_of_a_company_know_their_owners(adapters) -> None:
    """Whole sequences are cut, so a shard may hold the end of one request and the beginning of the next."""

    class Group:
        degree, rank = 2, 1

        def rows(self, length: int) -> tuple[int, ...]:
            return (length - length // 2, length // 2)

    flat = adapters("flux").flat
    lengths = {"hidden_states": [3, 4], "encoder_hidden_states": [2, 1]}
    members = Members(flat, lengths, [], Group(), CPU)
    image, text = "hidden_states", "encoder_hidden_states"
    assert members.owners((text, image), "whole").tolist() == [0, 0, 1, 0, 0, 0, 1, 1, 1, 1]
    assert members.owners((text, image), "own").tolist() == [1, 1, 1, 1]
    assert members.owners((text, image), "exchanged").tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert members.streams_of(4, "own") == (text, image)
    assert members.streams_of(3, "own") == (image,)
