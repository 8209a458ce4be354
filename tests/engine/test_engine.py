"""Same image: whatever degrees, GPU sets, pauses and moves a request goes through, its latents and its
picture are those of the plain diffusers pipeline. Real processes over gloo."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    PipelineQuantizationConfig,
    StableDiffusion3Img2ImgPipeline,
    TorchAoConfig,
)
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import (
    flux_lora,
    tiny_flux,
    tiny_flux2_dev,
    tiny_flux2_klein,
    tiny_hunyuan_video,
    tiny_kontext,
    tiny_qwen_image,
    tiny_qwen_image_edit,
    tiny_sd3,
    tiny_wan,
    tiny_z_image,
)
from PIL import Image
from replica_pool import ReplicaPool, Served
from safetensors.torch import save_file
from torchao.quantization import Int8WeightOnlyConfig

from tetriserve.engine.adapter import ModelAdapter, ModelLimits, picture
from tetriserve.engine.compiled import check_compiler
from tetriserve.engine.engine import Share, is_out_of_memory
from tetriserve.engine.kernels import attention_kernel
from tetriserve.errors import ConfigError, InvalidRequest
from tetriserve.models import load as load_module
from tetriserve.models.load import load_model
from tetriserve.request import GenerateRequest, Shape
from tetriserve.reuse import computed_steps

N_GPUS = 4
TEXT_TOKENS = 30  # 4 does not divide it
STEPS = 6
CPU = torch.device("cpu")
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


def text_tokens(model: str) -> int | None:
    return None if model == "hunyuan-video" else TEXT_TOKENS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "flux-dev": tiny_flux(root / "flux-dev"),
        "flux-schnell": tiny_flux(root / "flux-schnell", guidance_embeds=False),
        "sd35": tiny_sd3(root / "sd35"),
        "sd3": tiny_sd3(root / "sd3", dual_attention=False),
        "z-image": tiny_z_image(root / "z-image"),
        "qwen-image": tiny_qwen_image(root / "qwen-image"),
        "flux-kontext": tiny_kontext(root / "flux-kontext"),
        "qwen-image-edit": tiny_qwen_image_edit(root / "qwen-image-edit"),
        "qwen-image-edit-plus": tiny_qwen_image_edit(root / "qwen-image-edit-plus", plus=True),
        "flux2-dev": tiny_flux2_dev(root / "flux2-dev"),
        "flux2-klein": tiny_flux2_klein(root / "flux2-klein", distilled=True),
        "flux2-klein-base": tiny_flux2_klein(root / "flux2-klein-base"),
        "wan2.1": tiny_wan(root / "wan2.1"),
        "wan2.2": tiny_wan(root / "wan2.2", experts=True),
        "wan2.2-ti2v": tiny_wan(root / "wan2.2-ti2v", per_token=True),
        "hunyuan-video": tiny_hunyuan_video(root / "hunyuan-video"),
    }


@pytest.fixture(scope="module")
def loras(folders: dict[str, Path]) -> dict[str, str]:
    """By name: of the transformer, and of the transformer and the text encoder."""
    root = folders["flux-dev"].parent
    return {
        name: str(flux_lora(root / f"{name}.safetensors", folders["flux-dev"], seed=seed, text=text))
        for name, seed, text in (("pixel", 1, False), ("ink", 2, True))
    }


@pytest.fixture(scope="module")
def pool(folders: dict[str, Path], loras: dict[str, str]):
    models = {name: Served(folder, text_tokens(name)) for name, folder in folders.items()}
    knobs = {"flux-int8": {"quantization": "int8"}, "flux-lora": {"loras": loras}}
    for name, options in knobs.items():
        models[name] = Served(folders["flux-dev"], TEXT_TOKENS, options)
    pool = ReplicaPool(N_GPUS, models)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path], loras: dict[str, str]):
    """The plain diffusers pipeline: (latents, picture) of a request, computed once per request, and what makes our
    latents comparable: FLUX.2's pipeline gives them unpacked."""
    pipelines: dict[str, object] = {}
    adapters: dict[str, ModelAdapter] = {}
    results: dict[tuple[str, GenerateRequest], tuple[torch.Tensor, np.ndarray]] = {}
    torch.set_num_threads(1)

    def run(model: str, request: GenerateRequest):
        if model not in pipelines:
            folder = folders["flux-dev" if model in ("flux-int8", "flux-lora") else model]
            adapter = adapters[model] = load(folder)
            options = {}
            if model == "flux-int8":
                int8 = TorchAoConfig(Int8WeightOnlyConfig())
                options["quantization_config"] = PipelineQuantizationConfig(
                    quant_mapping={"transformer": int8}
                )
            pipelines[model] = type(adapter.pipeline).from_pretrained(folder, dtype=torch.float32, **options)
            pipelines[model].set_progress_bar_config(disable=True)
            for name, path in loras.items() if model == "flux-lora" else ():
                pipelines[model].load_lora_weights(path, adapter_name=name)
        if request.lora:
            pipelines[model].set_adapters([request.lora], [request.lora_scale])
        if (model, request) not in results:
            options = {
                name: getattr(request, name)
                for name in ("guidance_scale", "guidance_scale_2", "true_cfg_scale", "negative_prompt")
                if getattr(request, name) is not None
            }
            if model == "flux-schnell":
                options.setdefault("guidance_scale", 0.0)
            if text_tokens(model):
                options["max_sequence_length"] = TEXT_TOKENS
            pictures = [Image.fromarray(image.pixels) for image in request.images]
            pipeline = pipelines[model]
            if request.strength is not None:
                pipeline = (FluxImg2ImgPipeline if "flux" in model else StableDiffusion3Img2ImgPipeline)(
                    **pipeline.components
                )
                pipeline.set_progress_bar_config(disable=True)
                options |= {"image": pictures[0], "strength": request.strength}
            elif pictures:
                options["image"] = pictures if len(pictures) > 1 else pictures[0]
            if model == "flux-kontext":
                options["max_area"] = request.height * request.width
            video = adapters[model].info.max_frames > 1
            if video:
                options["num_frames"] = request.num_frames
            if model == "hunyuan-video":
                scale = options.pop("guidance_scale", 6.0)
                pipeline.guider = pipeline.guider.new(guidance_scale=scale)

            def generate(output_type: str):
                steps = math.ceil(STEPS * (request.strength or 1))
                computed = computed_steps(steps, request.reuse_every)
                with (
                    extrapolating(pipeline.transformer, computed)
                    if request.reuse_every > 1
                    else nullcontext()
                ):
                    made = pipeline(
                        prompt=request.prompt,
                        height=request.height,
                        width=request.width,
                        num_inference_steps=request.num_inference_steps,
                        generator=torch.Generator().manual_seed(request.seed),
                        output_type=output_type,
                        **options,
                    )
                return made.frames if video else made.images

            picture = generate("pil")[0]
            if request.num_frames == 1 and video:
                (picture,) = picture
            results[model, request] = generate("latent"), np.asarray(picture)
        unpacked = (
            partial(adapters[model].spatial, request) if model.startswith("flux2-klein") else torch.clone
        )
        return *results[model, request], unpacked

    return run


def load(folder: Path, kernel: str = "auto", dtype: torch.dtype = torch.float32, **limits):
    return load_model(
        str(folder),
        ModelLimits("m", max_sequence_length=text_tokens(folder.name), **limits),
        attention_kernel(kernel, CPU),
        dtype=dtype,
        device=CPU,
    )


class Journey:
    """Plays the scheduler for one request: keeps the packed state and who holds what."""

    def __init__(self, pool: ReplicaPool, model: str, request: GenerateRequest, gpu: int) -> None:
        self.pool, self.model, self.id = pool, model, f"{model}-{random.random()}"
        _, self.conditioning, self.latents = pool.call((gpu,), model, "encode", self.id, request)[0]
        if request.images:
            _, self.conditioning, self.latents = pool.call((gpu,), model, "encode_image", self.id, request)[0]
        self.step = 0
        self.knows = {gpu}
        self.holders = {gpu}

    def run(self, gpus: tuple[int, ...], steps: int) -> None:
        for gpu in gpus:
            conditioning = None if gpu in self.knows else self.conditioning
            latents = None if gpu in self.holders else self.latents
            self.pool.send(gpu, self.model, "denoise", self.id, gpus, self.step, steps, conditioning, latents)
        for gpu in gpus:
            self.pool.receive(gpu)
        self.step += steps
        self.knows |= set(gpus)
        self.holders = set(gpus)
        packed = self.pool.call(gpus, self.model, "pack", self.id)
        self.latents = packed[0]
        for other in packed[1:]:  # every member holds the same bits
            np.testing.assert_array_equal(other.tensor.array, self.latents.tensor.array)

    def finish(self, gpu: int) -> np.ndarray:
        conditioning = None if gpu in self.knows else self.conditioning
        latents = None if gpu in self.holders else self.latents
        _, image = self.pool.call((gpu,), self.model, "decode", self.id, conditioning, latents)[0]
        self.pool.call(tuple(range(N_GPUS)), self.model, "release", self.id)
        return image


def assert_same(journey: Journey, image: np.ndarray, expected) -> None:
    latents, picture, unpacked = expected
    with torch.inference_mode():
        ours = unpacked(torch.from_numpy(np.array(journey.latents.tensor.array)))
    error = (ours - latents).abs().max() / latents.abs().max()
    assert error < 1e-4, f"latents differ by {error}"
    difference = np.abs(image.astype(int) - picture.astype(int))
    assert difference.max() <= 1
    assert (difference.max(axis=-1) == 0).mean() >= 0.999


def scene(height: int, width: int, seed: int) -> np.ndarray:
    """Something to be edited: soft colours."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def steps_of(request: GenerateRequest) -> int:
    """That are computed."""
    steps = STEPS if request.strength is None else math.ceil(STEPS * request.strength)
    return len(computed_steps(steps, request.reuse_every))


@contextmanager
def extrapolating(transformer: Any, computed: Sequence[int]) -> Iterator[None]:
    """A plain transformer that is called once a step, and only runs for some of them."""
    plain, outputs, step = transformer.forward, {}, itertools.count()

    def forward(*args: Any, **kwargs: Any) -> Any:
        now = next(step)
        if now in computed:
            outputs[now] = plain(*args, **kwargs)[0]
            return (outputs[now],)
        (s0, v0), (s1, v1) = sorted(outputs.items())[-2:]
        return (v1 + (v1 - v0) * ((now - s1) / (s1 - s0)),)

    transformer.forward = forward
    try:
        yield
    finally:
        transformer.forward = plain


REQUESTS = {
    "flux reuse": ("flux-dev", GenerateRequest("a star", 112, 208, STEPS, seed=40, reuse_every=3)),
    "sd3.5 reuse": ("sd35", GenerateRequest("a star", 128, 144, STEPS, seed=41, reuse_every=2)),
    "flux edit with reuse": (
        "flux-dev",
        GenerateRequest(
            "a star",
            112,
            208,
            STEPS,
            3.5,
            seed=42,
            images=[scene(150, 200, 10)],
            strength=0.8,
            reuse_every=2,
        ),
    ),
    "flux image to image odd": (
        "flux-dev",
        GenerateRequest("a star", 112, 208, STEPS, 3.5, seed=30, images=[scene(150, 200, 1)], strength=0.7),
    ),
    "sd3.5 image to image": (
        "sd35",
        GenerateRequest("a star", 128, 144, STEPS, seed=31, images=[scene(128, 144, 2)], strength=0.5),
    ),
    "kontext odd": (
        "flux-kontext",
        GenerateRequest("a star", 112, 208, STEPS, seed=32, images=[scene(90, 130, 3)]),
    ),
    "flux.2 klein two references": (
        "flux2-klein-base",
        GenerateRequest("a star", 112, 208, STEPS, seed=33, images=[scene(90, 130, 4), scene(64, 112, 5)]),
    ),
    "flux.2 dev reference": (
        "flux2-dev",
        GenerateRequest("a star", 128, 128, STEPS, seed=34, images=[scene(90, 130, 6)]),
    ),
    "qwen-image-edit": (
        "qwen-image-edit",
        GenerateRequest("a star", 112, 208, STEPS, negative_prompt=" ", seed=35, images=[scene(90, 130, 7)]),
    ),
    "qwen-image-edit two": (
        "qwen-image-edit-plus",
        GenerateRequest("a star", 112, 208, STEPS, seed=36, images=[scene(90, 130, 8), scene(70, 70, 9)]),
    ),
    "square": ("flux-dev", GenerateRequest("a small red circle", 256, 256, STEPS, seed=1)),
    # 7 x 13 = 91 image tokens: no degree above 1 divides them
    "odd": ("flux-dev", GenerateRequest("a blue square", 112, 208, STEPS, seed=2)),
    "distilled guidance": (
        "flux-dev",
        GenerateRequest("a star", 128, 256, STEPS, guidance_scale=1.5, seed=3),
    ),
    "true cfg": (
        "flux-dev",
        GenerateRequest(
            "a star", 192, 128, STEPS, true_cfg_scale=3.0, negative_prompt="a large cross", seed=4
        ),
    ),
    "int8": ("flux-int8", GenerateRequest("a star", 112, 208, STEPS, seed=25)),
    "lora": (
        "flux-lora",
        GenerateRequest("a star", 112, 208, STEPS, seed=26, lora="pixel", lora_scale=0.7),
    ),
    "lora of the text too": ("flux-lora", GenerateRequest("a star", 128, 128, STEPS, seed=27, lora="ink")),
    "schnell": ("flux-schnell", GenerateRequest("a star", 128, 192, STEPS, seed=5)),
    "sd3.5": ("sd35", GenerateRequest("a star", 256, 192, STEPS, seed=6)),
    "sd3.5 odd": (
        "sd35",
        GenerateRequest("a star", 112, 208, STEPS, negative_prompt="a blue circle", seed=7),
    ),
    "sd3": ("sd3", GenerateRequest("a star", 208, 144, STEPS, guidance_scale=4.0, seed=8)),
    "sd3 unguided": ("sd3", GenerateRequest("a star", 128, 144, STEPS, guidance_scale=1.0, seed=9)),
    # two prompts of different lengths, the shorter one masked; degrees 2 and 4 do not divide its 3 heads
    "z-image odd": (
        "z-image",
        GenerateRequest("a star", 112, 208, STEPS, negative_prompt="a cross, a ring, a blue heart", seed=10),
    ),
    # above 0 it is guidance here
    "z-image little guidance": (
        "z-image",
        GenerateRequest("a star", 128, 144, STEPS, guidance_scale=0.5, seed=11),
    ),
    "z-image turbo": ("z-image", GenerateRequest("a star", 160, 128, STEPS, guidance_scale=0.0, seed=12)),
    "flux.2 dev odd": (
        "flux2-dev",
        GenerateRequest("a star", 112, 208, STEPS, guidance_scale=2.5, seed=28),
    ),
    "flux.2 klein": ("flux2-klein", GenerateRequest("a star", 144, 128, STEPS, seed=16)),
    "flux.2 klein base odd": ("flux2-klein-base", GenerateRequest("a star", 112, 208, STEPS, seed=17)),
    "qwen-image": ("qwen-image", GenerateRequest("a star", 144, 128, STEPS, seed=13)),
    "qwen-image odd": (
        "qwen-image",
        GenerateRequest("a star", 112, 208, STEPS, negative_prompt="a cross", seed=14),
    ),
    # 3 frames of latents, 273 tokens
    "wan 2.1 odd": ("wan2.1", GenerateRequest("a star", 112, 208, STEPS, num_frames=9, seed=18)),
    "wan 2.1 picture": (
        "wan2.1",
        GenerateRequest("a star", 128, 128, STEPS, guidance_scale=1.0, seed=19),
    ),
    "wan 2.2": (
        "wan2.2",
        GenerateRequest(
            "a star",
            128,
            144,
            STEPS,
            guidance_scale=4.0,
            guidance_scale_2=3.0,
            negative_prompt="a cross",
            num_frames=5,
            seed=20,
        ),
    ),
    "wan 2.2 ti2v odd": ("wan2.2-ti2v", GenerateRequest("a star", 112, 208, STEPS, num_frames=5, seed=21)),
    "hunyuan-video odd": (
        "hunyuan-video",
        GenerateRequest('a star says "hello"', 112, 208, STEPS, num_frames=9, seed=22),
    ),
    "hunyuan-video unguided picture": (
        "hunyuan-video",
        GenerateRequest("a star", 128, 128, STEPS, guidance_scale=1.0, seed=23),
    ),
    "qwen-image guided": (
        "qwen-image",
        GenerateRequest("a star", 128, 128, STEPS, negative_prompt="", true_cfg_scale=2.0, seed=15),
    ),
}


LARGE = ("flux-kontext", "qwen-image-edit", "qwen-image-edit-plus", "hunyuan-video")
"""Their references have a megapixel, or their text 1985 tokens: seconds a step here."""


def cases(ways: Sequence[int], quick: int) -> list[Any]:
    """Every request in every way, the large ones in two; `quick` is the one that is always tried."""

    def marks(model: str, way: int) -> list[pytest.MarkDecorator]:
        if way == quick:
            return [pytest.mark.slow] if model in LARGE[1:] else []
        return [pytest.mark.long if model in LARGE else pytest.mark.slow]

    return [
        pytest.param(name, way, marks=marks(model, way))
        for name, (model, _) in REQUESTS.items()
        for way in (sorted({quick, ways[0]}) if model in LARGE else ways)
    ]


@pytest.mark.parametrize(("name", "degree"), cases([1, 2, 3, 4], quick=3))
def test_fixed_degree_equals_plain_pipeline(pool, plain, name: str, degree: int) -> None:
    model, request = REQUESTS[name]
    gpus = tuple(range(degree))
    journey = Journey(pool, model, request, gpu=0)
    journey.run(gpus, steps_of(request))
    assert_same(journey, journey.finish(gpus[-1]), plain(model, request))


@pytest.mark.parametrize(("name", "seed"), cases([0, 1], quick=0))
def test_any_journey_equals_plain_pipeline(pool, plain, name: str, seed: int) -> None:
    """Random step ranges at random degrees on random GPU sets, aligned or not."""
    model, request = REQUESTS[name]
    dice = random.Random(seed)
    journey = Journey(pool, model, request, gpu=dice.randrange(N_GPUS))
    while journey.step < steps_of(request):
        gpus = tuple(sorted(dice.sample(range(N_GPUS), dice.randint(1, N_GPUS))))
        journey.run(gpus, dice.randint(1, steps_of(request) - journey.step))
    assert_same(journey, journey.finish(dice.randrange(N_GPUS)), plain(model, request))


def run_together(journeys: Sequence[Journey], gpus: tuple[int, ...], steps: int) -> None:
    """A range that several share; each comes from wherever it was."""
    pool, model = journeys[0].pool, journeys[0].model
    for gpu in gpus:
        shares = [
            Share(
                one.id,
                one.step,
                None if gpu in one.knows else one.conditioning,
                None if gpu in one.holders else one.latents,
            )
            for one in journeys
        ]
        pool.send(gpu, model, "denoise_together", shares, gpus, steps)
    reports = [pool.receive(gpu) for gpu in gpus]
    assert all(report.failures == ("",) * len(journeys) for report in reports)
    for one in journeys:
        one.step += steps
        one.knows |= set(gpus)
        one.holders = set(gpus)
        packed = pool.call(gpus, model, "pack", one.id)
        one.latents = packed[0]
        for other in packed[1:]:
            np.testing.assert_array_equal(other.tensor.array, one.latents.tensor.array)


TOGETHER = [
    ["square", "odd", "true cfg", "distilled guidance", "flux reuse"],
    ["sd3.5", "sd3.5 odd", "sd3.5 reuse"],
    ["qwen-image", "qwen-image odd", "qwen-image guided"],
    pytest.param(["flux.2 klein", "flux.2 klein"], marks=pytest.mark.slow),
    pytest.param(["wan 2.1 odd", "wan 2.1 odd", "wan 2.1 picture"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: names[0])
def test_any_journey_in_company_equals_plain_pipeline(pool, plain, names: list[str]) -> None:
    """Members join and leave between ranges of all degrees, at steps of their own, and run alone between."""
    dice = random.Random(names[0])
    model = REQUESTS[names[0]][0]
    requests = [REQUESTS[name][1] for name in names]
    journeys = [Journey(pool, model, request, gpu=dice.randrange(N_GPUS)) for request in requests]
    journeys[0].run((1,), 1)
    degrees = [1, 2, 4, 3]
    while open_ := [i for i, one in enumerate(journeys) if one.step < steps_of(requests[i])]:
        members = dice.sample(open_, dice.randint(min(2, len(open_)), len(open_)))
        gpus = tuple(sorted(dice.sample(range(N_GPUS), degrees[0])))
        degrees = degrees[1:] + degrees[:1]
        left = min(steps_of(requests[i]) - journeys[i].step for i in members)
        run_together([journeys[i] for i in members], gpus, dice.randint(1, min(2, left)))
    for one, request in zip(journeys, requests, strict=True):
        assert_same(one, one.finish(dice.randrange(N_GPUS)), plain(model, request))


def test_one_member_without_numbers_fails_alone(pool, plain) -> None:
    model, request = REQUESTS["odd"]
    well, ill = (Journey(pool, model, request, gpu=0) for _ in range(2))
    ill.latents.tensor.array[:] = np.nan
    ill.holders = set()
    for gpu in (0, 1):
        shares = [Share(one.id, 0, one.conditioning, one.latents) for one in (well, ill)]
        pool.send(gpu, model, "denoise_together", shares, (0, 1), 2)
    for gpu in (0, 1):
        report = pool.receive(gpu)
        assert report.failures[0] == "" and "not finite" in report.failures[1]
    (well.latents,) = pool.call((0,), model, "pack", well.id)
    well.step, well.knows, well.holders = 2, {0, 1}, {0, 1}
    well.run((0, 1, 2), STEPS - 2)
    assert_same(well, well.finish(2), plain(model, request))
    pool.call((0, 1), model, "release", ill.id)


def test_a_lora_is_of_its_request_only(pool, plain) -> None:
    """Plain requests between two with different ones are the plain model's to the bit, on the same GPUs."""
    (_, first), (_, second) = REQUESTS["lora"], REQUESTS["lora of the text too"]
    model, request = REQUESTS["odd"]
    ways = ((0, 1), 2), ((0, 1, 2), 2), ((1,), 2)

    def run(model: str, request: GenerateRequest, between: tuple[Journey, ...] = ()) -> tuple:
        journey = Journey(pool, model, request, gpu=1)
        for gpus, steps in ways:
            journey.run(gpus, steps)
            for other in between:
                other.run(gpus, steps)
        return journey.latents.tensor.array, journey.finish(1)

    alone = run(model, request)
    others = tuple(Journey(pool, "flux-lora", lora, gpu=1) for lora in (first, second))
    among = run("flux-lora", request, others)
    np.testing.assert_array_equal(among[0], alone[0])
    np.testing.assert_array_equal(among[1], alone[1])
    for journey, lora in zip(others, (first, second), strict=True):
        assert_same(journey, journey.finish(0), plain("flux-lora", lora))
    for lora in (first, second):  # it does something
        latents, *_ = plain("flux-lora", lora)
        without, *_ = plain("flux-dev", replace(lora, lora=None))
        assert (latents - without).abs().max() / without.abs().max() > 1e-3


def test_int8_is_another_picture(plain) -> None:
    """The equality above would mean little if nothing were quantised."""
    _, request = REQUESTS["int8"]
    latents, *_ = plain("flux-int8", request)
    exact, *_ = plain("flux-dev", request)
    assert 1e-4 < (latents - exact).abs().max() / exact.abs().max() < 0.1


def test_move_to_disjoint_gpus_and_pause(pool, plain) -> None:
    """(0,1) -> pause while another request uses all GPUs -> (2,3): holders and newcomers share no GPU."""
    model, request = REQUESTS["square"]
    other_model, other_request = REQUESTS["odd"]
    journey = Journey(pool, model, request, gpu=0)
    journey.run((0, 1), 2)
    other = Journey(pool, other_model, other_request, gpu=3)
    other.run((0, 1, 2, 3), 4)
    journey.run((2, 3), 3)
    other.run((1,), 2)
    journey.run((0,), 1)
    assert_same(journey, journey.finish(3), plain(model, request))
    assert_same(other, other.finish(2), plain(other_model, other_request))


def test_fixed_degree_sequence_is_bit_reproducible(pool) -> None:
    model, request = REQUESTS["sd3.5 odd"]
    runs = []
    for _ in range(2):
        journey = Journey(pool, model, request, gpu=1)
        for gpus, steps in (((0, 1), 2), ((0, 1, 2), 1), ((3,), 1), ((0, 1, 2, 3), 2)):
            journey.run(gpus, steps)
        runs.append((journey.latents.tensor.array, journey.finish(0)))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


def test_only_the_leader_of_a_group_makes_previews(pool) -> None:
    """They change nothing: the latents are those of the same journey without, to the bit."""
    model, request = REQUESTS["odd"]
    journey = Journey(pool, model, request, gpu=0)
    journey.run((1, 2), STEPS)
    asked = replace(request, previews=2)
    _, conditioning, latents = pool.call((0,), model, "encode", "watched", asked)[0]
    for gpu in (1, 2):
        pool.send(gpu, model, "denoise", "watched", (1, 2), 0, STEPS, conditioning, latents)
    leader, other = (pool.receive(gpu) for gpu in (1, 2))
    assert leader.previews[0].shape == (14, 26, 3) and other.previews[0] is None
    (packed,) = pool.call((2,), model, "pack", "watched")
    np.testing.assert_array_equal(packed.tensor.array, journey.latents.tensor.array)
    pool.call((0, 1, 2), model, "release", "watched")
    journey.finish(0)


def test_seed_and_prompt_change_the_picture(pool) -> None:
    """The equality above would mean little if the model ignored its inputs."""
    model, request = REQUESTS["square"]
    pictures = []
    for changed in (request, replace(request, seed=99), replace(request, prompt="a large blue star")):
        journey = Journey(pool, model, changed, gpu=0)
        journey.run((0, 1), STEPS)
        pictures.append(journey.finish(0))
    assert (pictures[0] != pictures[1]).mean() > 0.05
    assert (pictures[0] != pictures[2]).mean() > 0.001


def test_state_is_checked(pool) -> None:
    """A range that does not start where the latents are is refused, not run."""
    model, request = REQUESTS["square"]
    journey = Journey(pool, model, request, gpu=0)
    journey.run((0,), 2)
    with pytest.raises(RuntimeError, match=r"is at step 2 .* expected 3"):
        pool.call((0,), model, "denoise", journey.id, (0,), 3, 1)
    with pytest.raises(RuntimeError, match="no state on GPU 2"):
        pool.call((2,), model, "denoise", journey.id, (2,), 2, 1)
    journey.finish(0)
    with pytest.raises(RuntimeError, match="no state on GPU 0"):
        pool.call((0,), model, "decode", journey.id)


def test_latents_that_are_no_numbers_end_their_request_only(pool) -> None:
    model, request = REQUESTS["square"]
    _, conditioning, latents = pool.call((0,), model, "encode", "broken", request)[0]
    array = latents.tensor.array.copy()
    array.flat[7] = np.nan
    broken = replace(latents, tensor=replace(latents.tensor, array=array))
    with pytest.raises(RuntimeError, match="FloatingPointError: latents are not finite after step 1"):
        pool.call((0, 1), model, "denoise", "broken", (0, 1), 0, 1, conditioning, broken)
    pool.call((0, 1), model, "release", "broken")
    journey = Journey(pool, model, request, gpu=0)
    journey.run((0, 1), 2)
    journey.finish(0)


def test_a_member_that_fails_leaves_nobody_waiting_and_the_group_is_built_anew(pool, plain) -> None:
    """GPU 1 cannot begin, GPU 0 waits for it inside a step; both give up, and the next range is sound."""
    model, request = REQUESTS["odd"]
    journey = Journey(pool, model, request, gpu=0)
    pool.send(0, model, "denoise", journey.id, (0, 1), 0, 2, None, None, 50)
    with pytest.raises(RuntimeError, match="no state on GPU 1"):
        pool.call((1,), model, "denoise", journey.id, (0, 1), 0, 2, None, None, 50)
    pool.call((1,), model, "abandon", [journey.id], (0, 1), 50)
    with pytest.raises(RuntimeError, match=r"Connection (closed|reset) by peer"):
        pool.receive(0)
    pool.call((0,), model, "abandon", [journey.id], (0, 1), 50)
    with pytest.raises(RuntimeError, match="no state on GPU 0"):
        pool.call((0,), model, "decode", journey.id)
    journey.knows, journey.holders = set(), set()
    for gpu in (0, 1):
        arguments = (journey.id, (0, 1), 0, 2, journey.conditioning, journey.latents, 51)
        pool.send(gpu, model, "denoise", *arguments)
    for gpu in (0, 1):
        pool.receive(gpu)
    pool.call((0,), model, "abandon", ["another"], (0, 1), 50)  # late news of what was cleared up
    journey.latents = pool.call((0,), model, "pack", journey.id)[0]
    journey.knows, journey.holders, journey.step = {0, 1}, {0, 1}, 2
    journey.run((0, 1), STEPS - 2)
    assert_same(journey, journey.finish(2), plain(model, request))


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "NCCL error in: NCCLUtils.cpp:98, unhandled cuda error: Cuda failure 2 'out of memory'",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_what_the_libraries_say_when_memory_is_short(said: str) -> None:
    assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(ValueError(said))


def test_loading_refuses_knobs_that_it_cannot_turn(folders, loras, monkeypatch, tmp_path: Path) -> None:
    def refused(*lines: str, folder: str = "flux-dev", **options: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            load_model(
                str(folders[folder]),
                ModelLimits("m", max_sequence_length=text_tokens(folder)),
                attention_kernel("auto", CPU),
                dtype=torch.float32,
                device=CPU,
                **options,
            )
        assert "\n" not in caught.value.message
        for line in lines:
            assert line in caught.value.message

    refused(
        "model.loras: oil: cannot load", "oil.safetensors", loras={"oil": str(tmp_path / "oil.safetensors")}
    )
    refused("model.loras: pixel: cannot load", "SD3Transformer2DModel", folder="sd3", loras=loras)
    other = tmp_path / "other.safetensors"
    save_file({"unet.block.to_q.lora_A.weight": torch.ones(2, 2)}, other)
    refused("model.loras: other: ", "has no weights for this flux model", loras={"other": str(other)})
    refused("diffusers loads none into hunyuan-video-1.5 models", folder="hunyuan-video", loras=loras)
    monkeypatch.setattr(load_module, "find_spec", lambda name: None)
    refused("model.quantization: fp8 needs torchao", "tetriserve[quantization]", quantization="fp8")
    refused("model.loras needs peft", "tetriserve[lora]", loras=loras)


def test_no_compiler_is_said_before_anything_is_loaded(monkeypatch) -> None:
    check_compiler(CPU)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match=r"model.compile: no C\+\+ compiler"):
        check_compiler(CPU)


def test_memory_errors_are_told_from_others() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    for said in (
        "boom",
        "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "CUDA error: an illegal memory access was encountered",
    ):
        assert not is_out_of_memory(RuntimeError(said))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9), st.sampled_from(PRECISIONS))
def test_a_picture_is_what_the_image_processor_makes(
    seed: int, height: int, width: int, dtype: torch.dtype
) -> None:
    """To the bit, values out of range and halves included."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, 3, height, width, generator=generator)
    halves = (torch.randint(0, 256, pixels.shape, generator=generator) + 0.5) / 255 * 2 - 1
    pixels = torch.where(torch.rand(pixels.shape, generator=generator) < 0.3, halves, pixels).to(dtype)
    (expected,) = VaeImageProcessor().postprocess(pixels, output_type="pil")
    np.testing.assert_array_equal(picture(pixels), np.asarray(expected))


def test_measure_times_every_phase(pool) -> None:
    seconds = pool.call((2,), "sd3", "measure", "one", Shape(128, 128), (2,), 90, 1, 2)[0]
    assert min(seconds.values()) > 0
    assert seconds.keys() == {"encode", "encode_image", "denoise", "decode"}
    (seconds,) = pool.call((2,), "z-image", "measure", "other", Shape(128, 128), (2,), 92, 1, 2)
    assert seconds.keys() == {"encode", "denoise", "decode"}  # it takes no pictures
    results = pool.call((0, 1), "sd3", "measure", "two", Shape(128, 128), (0, 1), 91, 1, 2)
    assert all(result.keys() == {"denoise"} and result["denoise"] > 0 for result in results)


def test_the_schedule_of_reuse() -> None:
    """The first steps are computed, then every so-manieth, as in the trial."""
    assert computed_steps(12, 3) == (0, 1, 3, 6, 9)
    assert len(computed_steps(28, 4)) == 9
    assert computed_steps(5, 1) == (0, 1, 2, 3, 4)
    assert [computed_steps(steps, 8) for steps in (1, 2, 3, 4)] == [(0,), (0, 1), (0, 1), (0, 1, 3)]


def test_reuse_changes_the_picture_and_only_of_its_request(plain) -> None:
    (model, request) = REQUESTS["flux reuse"]
    lossy, _, _ = plain(model, request)
    exact, _, _ = plain(model, replace(request, reuse_every=1))
    assert (lossy - exact).abs().max() / exact.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("model", "cut", "negative"),
    [
        ("flux-dev", True, False),
        ("sd35", True, True),
        ("z-image", True, True),
        ("qwen-image", True, True),
        ("flux2-dev", True, False),
        ("flux2-klein-base", True, True),
        ("wan2.1", True, True),
        ("hunyuan-video", True, True),
        ("qwen-image-edit-plus", False, False),  # it cuts nothing
    ],
)
def test_prompts_that_are_cut_are_said(pool, model: str, cut: bool, negative: bool) -> None:
    """By the fields' names; what CLIP alone does not see, T5 has seen."""

    def truncated(prompt: str, negative_prompt: str | None = None) -> tuple[str, ...]:
        request = GenerateRequest(prompt, 128, 128, 2, seed=1, negative_prompt=negative_prompt)
        return pool.call((3,), model, "encode", "cut", request)[0][0].truncated

    words = " two  stars " * 2000
    assert truncated("a star") == ()
    assert truncated(words) == (("prompt",) if cut else ())
    assert truncated("a star", words) == (("negative_prompt",) if negative else ())
    assert truncated("a star") == ()  # and nothing is left of the one before
    pool.call((3,), model, "release", "cut")


def test_model_limits(folders) -> None:
    adapter = load(folders["sd3"], max_pixels=512 * 512)
    info = adapter.info
    assert info.why_not_shape(Shape(256, 256)) is None
    assert "multiple of 16" in info.why_not_shape(Shape(250, 256))
    assert "pixels" in info.why_not_shape(Shape(1024, 512))
    assert "above 1024" in info.why_not_shape(Shape(2048, 16))
    assert info.why_not_degree(Shape(256, 256), 4) is None
    assert "tokens" in info.why_not_degree(Shape(128, 128), 100)


def test_frames_are_part_of_the_shape(folders) -> None:
    info = load(folders["wan2.1"], max_frames=16).info
    assert info.tokens(Shape(128, 144, 9)) == 3 * 8 * 9
    assert info.why_not_shape(Shape(128, 144, 9)) is info.why_not_shape(Shape(128, 144)) is None
    for frames, nearest in ((2, 1), (8, 9), (11, 13), (12, 13), (13 + 4, 13), (10**6, 13), (0, 1), (-8, 1)):
        with pytest.raises(InvalidRequest, match=rf"num_frames.* up to 13 \(nearest: {nearest}\)"):
            info.check(GenerateRequest("a star", 128, 144, num_frames=frames))
    picture = load(folders["sd3"]).info
    with pytest.raises(InvalidRequest, match="m makes pictures: 1 is allowed"):
        picture.check(GenerateRequest("a star", 128, 144, num_frames=5))
    with pytest.raises(InvalidRequest, match="guidance_scale_2: m has one transformer"):
        info.check(GenerateRequest("a star", 128, 144, guidance_scale_2=2.0))


def test_a_second_scale_follows_the_first_unless_it_is_given(folders) -> None:
    resolve = load(folders["wan2.2"]).resolve
    request = GenerateRequest("a star", 128, 144)
    scales = [
        (resolved.guidance_scale, resolved.guidance_scale_2)
        for resolved in (
            resolve(request),
            resolve(replace(request, guidance_scale=6.0)),
            resolve(replace(request, guidance_scale=6.0, guidance_scale_2=2.0)),
            resolve(replace(request, guidance_scale_2=2.0)),
        )
    ]
    assert scales == [(4.0, 3.0), (6.0, 6.0), (6.0, 2.0), (4.0, 2.0)]


def test_loading_refuses_what_it_cannot_serve(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.path: .*no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(
        ConfigError, match="PixArtAlphaPipeline, supported are Flux2KleinPipeline, Flux2Pipeline, FluxK"
    ):
        load(tmp_path)
    with pytest.raises(
        ConfigError, match=r"model.dtype: float16 overflows in flux models, allowed are float32, bf"
    ):
        load(tiny_flux(tmp_path / "flux"), dtype=torch.float16)
    with pytest.raises(ConfigError, match="attention_backend: unknown 'warp'"):
        attention_kernel("warp", CPU)


def test_a_kernel_that_takes_no_mask_has_a_stand_in_for_it() -> None:
    query, key, value = torch.randn(3, 1, 5, 2, 8)
    mask = torch.tensor([True, True, False, True, False])[None, None, None]
    masked = attention_kernel("flash", CPU)(query, key, value, mask)
    seen = mask.flatten()
    torch.testing.assert_close(masked, attention_kernel("native", CPU)(query, key[:, seen], value[:, seen]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, xfuser may load")
def test_xfuser_without_gpu_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="xfuser needs a CUDA device"):
        attention_kernel("xfuser", CPU)
