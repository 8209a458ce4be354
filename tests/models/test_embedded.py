"""The shipped embedded model draws what it is asked; its checker can be trusted; its training can be cut."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomllib
import torch
from diffusers import AutoencoderKL, FluxPipeline

from tetriserve.models.embedded import EMBEDDED, embedded_folder, flow
from tetriserve.models.embedded.autoencoder import Reconstruction
from tetriserve.models.embedded.build import VAE_CHANNELS, make_text_stack, make_transformer, make_vae
from tetriserve.models.embedded.draw import draw
from tetriserve.models.embedded.flow import TEXT_TOKENS, FlowMatching, Part, token_ids
from tetriserve.models.embedded.grammar import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    parse,
    random_scene,
    write,
)
from tetriserve.models.embedded.train import load_vae, restore, transformer_trainer
from tetriserve.models.embedded.trainer import Trainer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
from adherence import complaints  # noqa: E402

PROMPTS = (
    "a red circle",
    "a small blue square on a yellow background",
    "a large green triangle on a black background",
    "a small black ring on a cyan background",
    "a white cross",
    "a small red circle above a large blue square on a white background",
    "a large yellow ring to the left of a small green cross on a purple background",
    "a small white triangle below a large black circle on a red background",
    "a large cyan square right of a large purple triangle",
    "a small purple cross above a small yellow square on a blue background",
)


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    torch.set_num_threads(1)
    pipeline = FluxPipeline.from_pretrained(embedded_folder())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: FluxPipeline, prompt: str, seed: int = 0, **options: int) -> np.ndarray:
    options = {"height": 256, "width": 256, "num_inference_steps": 12, "max_sequence_length": 64} | options
    generator = torch.Generator("cpu").manual_seed(seed)
    return np.asarray(pipeline(prompt, generator=generator, **options).images[0])


def test_draws_what_is_asked(pipeline: FluxPipeline) -> None:
    wrong = {prompt: complaints(generate(pipeline, prompt), parse(prompt)) for prompt in PROMPTS}
    assert sum(not found for found in wrong.values()) >= 8, wrong


def test_a_seed_is_a_picture(pipeline: FluxPipeline) -> None:
    first, again, *others = (generate(pipeline, PROMPTS[5], seed) for seed in (1, 1, 2, 3, 4))
    assert np.array_equal(first, again)
    for other in others:  # light falls otherwise, by a few of 255, on the same scene
        difference = np.abs(first.astype(float) - other)
        assert difference.mean() > 1 and (difference.max(-1) > 100).mean() < 0.02


def test_number_of_pads_hardly_matters(pipeline: FluxPipeline) -> None:
    short, long = (generate(pipeline, PROMPTS[5], max_sequence_length=length) for length in (64, 512))
    assert (np.abs(short.astype(float) - long).max(-1) > 100).mean() < 0.02


@pytest.mark.parametrize("prompt", ["", "a cat that rides a bicycle", "一只猫 🐱", "red " * 300])
def test_any_prompt_gives_a_picture(pipeline: FluxPipeline, prompt: str) -> None:
    picture = generate(pipeline, prompt, height=128, width=192, num_inference_steps=2)
    assert picture.shape == (128, 192, 3) and picture.std() > 0


@pytest.mark.parametrize("name", EMBEDDED)
def test_folder_is_flux_and_shipped(name: str) -> None:
    folder = embedded_folder(name)
    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    config = pipeline.transformer.config
    assert config.guidance_embeds and config.num_attention_heads % 4 == 0
    assert pipeline.vae_scale_factor == 8 and pipeline.vae.config.latent_channels == 16

    packaging = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = Path(flow.__file__).parent
    patterns = packaging["package-data"]["tetriserve.models.embedded"]
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert files <= shipped and "tetriserve.models.embedded" in packaging["packages"]
    assert sum(path.stat().st_size for path in shipped) <= 20e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png"}


def test_prompts_and_scenes() -> None:
    choice = random.Random(0)
    for _ in range(300):
        scene = random_scene(choice, choice.choice((1, 2)), held_out=choice.random() < 0.5)
        assert parse(write(scene)) == parse(write(scene, choice)) == scene
    assert parse("A red circle") == parse("a large red circle on a white background.")
    with pytest.raises(ValueError, match="not in the grammar"):
        parse("a red dog")


def test_training_text_is_what_the_pipeline_sees() -> None:
    """Training runs few text tokens; the words' features and the pads' are those of 512."""
    text = make_text_stack(width=64)
    longest = "a small red circle to the right of a large blue square on a white background"
    short = text["t5"](token_ids(text, [longest])["t5_ids"])[0][:, :TEXT_TOKENS]
    ids = text["t5_tokenizer"](longest, padding="max_length", max_length=512, return_tensors="pt").input_ids
    long = text["t5"](ids)[0]
    torch.testing.assert_close(short, long[:, :TEXT_TOKENS])
    assert long[:, TEXT_TOKENS - 1 :].abs().max() == 0


@pytest.mark.slow
def test_checker_accepts_drawn_pictures_and_refuses_others() -> None:
    choice = random.Random(1)
    accepted, refused, pairs = 0, 0, 200
    for index in range(pairs):
        scene = random_scene(choice, 1 + index % 2, held_out=index % 3 == 0)
        height, width = choice.choice([(128, 128), (256, 256), (256, 256), (256, 512), (512, 256)])
        picture = draw(scene, height, width, choice)
        accepted += not complaints(picture, scene)
        refused += bool(complaints(picture, _changed(scene, choice)))
    assert accepted >= 0.99 * pairs
    assert refused >= 0.97 * pairs


def _changed(scene: Scene, choice: random.Random) -> Scene:
    """The scene with one of its attributes changed."""

    def other(values: tuple[str, ...], value: str) -> str:
        return choice.choice([candidate for candidate in values if candidate != value])

    kind = choice.choice(["background", "size", "colour", "shape"] + ["relation"] * (len(scene.things) - 1))
    if kind == "background":
        return replace(scene, background=other(tuple(COLOURS), scene.background))
    if kind == "relation":
        return replace(scene, relation=other(RELATIONS, scene.relation))
    things = list(scene.things)
    index = choice.randrange(len(things))
    values = {"size": SIZES, "colour": tuple(COLOURS), "shape": SHAPES}[kind]
    things[index] = replace(things[index], **{kind: other(values, getattr(things[index], kind))})
    return replace(scene, things=tuple(things))


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_training_goes_on_where_it_was_cut(tmp_path: Path, part: str) -> None:
    def trainer(checkpoint: str) -> Trainer:
        torch.manual_seed(0)
        vae = make_vae(VAE_CHANNELS)
        if part == "vae":
            return Trainer(vae, Reconstruction(vae).loss, tmp_path / checkpoint, steps=6, learning_rate=1e-3)
        return _flow_trainer(tmp_path, checkpoint, vae)

    uncut = trainer("uncut.pt")
    uncut.run()
    trainer("cut.pt").run(until=2)
    resumed = trainer("cut.pt")
    assert resumed.step == 2
    resumed.run()
    assert resumed.step == uncut.step == 6
    for name, value in uncut.average.items():
        torch.testing.assert_close(resumed.average[name], value, rtol=0, atol=0)


def test_training_goes_on_from_what_is_shipped(tmp_path: Path, pipeline: FluxPipeline) -> None:
    restore(tmp_path, light=False)
    trainer = transformer_trainer(tmp_path, light=False, steps=10, device="cpu", refine=True)
    assert trainer.step == 0
    parts = {
        "transformer": pipeline.transformer,
        "t5": pipeline.text_encoder_2,
        "clip": pipeline.text_encoder,
    }
    shipped = {f"{part}.{name}": value for part, m in parts.items() for name, value in m.state_dict().items()}
    for name, value in trainer.average.items():
        assert torch.equal(value, shipped[name]), name
    vae = load_vae(tmp_path)
    assert vae.config.scaling_factor == pytest.approx(pipeline.vae.config.scaling_factor, rel=1e-2)
    with pytest.raises(FileExistsError, match=r"transformer\.pt|vae\.pt"):
        restore(tmp_path, light=False)


def _flow_trainer(folder: Path, checkpoint: str, vae: AutoencoderKL) -> Trainer:
    text = make_text_stack(width=64)
    transformer = make_transformer(heads=2, head_dim=8, double_blocks=1, single_blocks=1)
    model = torch.nn.ModuleDict({"transformer": transformer, "t5": text["t5"], "clip": text["clip"]})
    task = FlowMatching(
        model,
        vae,
        text,
        folder,
        steps=6,
        pictures={(64, 64): 4, (128, 128): 2},
        stages=[
            (0.0, {Part(64, 64): 1.0}),
            (0.5, {Part(128, 128, 32): 1.0, Part(128, 128, 32, outlines=True): 1.0}),
        ],
    )
    return Trainer(
        model, task.loss, folder / checkpoint, steps=6, learning_rate=1e-3, after_step=task.after_step
    )


def test_large_pictures_are_trained_where_things_end() -> None:
    torch.manual_seed(0)
    pictures = torch.zeros(2, 32, 48, 64)
    pictures[:, 8:20, 10:22] = 1.0
    outline = torch.zeros(32, 48, dtype=torch.bool)
    outline[5:23, 7:25] = True
    outline[11:17, 13:19] = False
    kept, trained = flow._near_and_far(pictures.flatten(1, 2), Part(512, 768, 256, outlines=True))
    assert (len(kept), trained, len(kept.unique())) == (256, 128, 256)
    assert outline.flatten()[kept[:trained]].float().mean() > 0.8  # a sixth of all tokens
    kept, trained = flow._near_and_far(pictures.flatten(1, 2), Part(512, 768, 256))
    assert (len(kept), trained, len(kept.unique())) == (256, 144, 256)
    rows, columns = kept[:trained] // 48, kept[:trained] % 48
    assert rows.max() - rows.min() == columns.max() - columns.min() == 11
