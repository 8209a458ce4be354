"""Parts of the run about one model on one GPU: step times, kernels, degrees without their exchange, compilation,
batches, encode and decode, memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from models import bytes_of, make_qwen_image, make_sd35, make_wan, make_z_image, twin, write_flux
from record import GIB, Place, Rows, host_peak_gib
from transformers import CLIPTextModel, T5EncoderModel

from tetriserve.engine.adapter import ModelAdapter, ModelLimits, picture
from tetriserve.engine.compiled import compile_blocks
from tetriserve.engine.engine import Engine
from tetriserve.engine.groups import GroupTable, SPGroup
from tetriserve.engine.kernels import attention_kernel
from tetriserve.models.load import load_model
from tetriserve.request import GenerateRequest

SIDES, SMALL_SIDES = (256, 512, 1024, 2048), (128, 256)
DEGREES = (1, 2, 4, 8)
BATCHES = (1, 2, 4, 8)
STEPS = 4
"""Of a run through the loops; more only repeat the same."""


class NoExchange(SPGroup):
    """A member of a group that gets zeros from the others at once: what a degree computes, without what it sends."""

    def all_to_all(self, sent: torch.Tensor, sent_rows: Any, rows: Any) -> torch.Tensor:
        return sent.new_zeros(sum(rows), *sent.shape[1:])


class Model:
    """The model of `place.flux` as the server loads it, with a kernel that can be changed."""

    def __init__(self, place: Place) -> None:
        device = torch.device(place.device, 0) if place.on_cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if place.on_cuda else torch.float32
        names = ("auto", "native", "_native_cudnn") if place.on_cuda else ("auto", "native")
        self.kernels = {name: attention_kernel(name, device) for name in names}
        self.kernel = "auto"
        self.adapter: ModelAdapter = load_model(
            str(place.flux),
            ModelLimits("FLUX.1-dev", max_pixels=2048 * 2048),
            lambda *x, **more: self.kernels[self.kernel](*x, **more),
            dtype=self.dtype,
            device=device,
        )
        self.engine = Engine(self.adapter, GroupTable(0, device, Path("no groups")))

    def begin(self, side: int, steps: int) -> tuple[GenerateRequest, Any]:
        """A request and its state before the first step."""
        request = self.adapter.resolve(GenerateRequest("a small red circle", side, side, steps, seed=1))
        return request, self.adapter.begin(request, self.adapter.encode(request))


def sides(place: Place) -> tuple[int, ...]:
    return SMALL_SIDES if place.small else SIDES


def folder(place: Place, rows: Rows) -> None:
    """Writes the model that the other parts load, and times how each component is loaded."""
    start_s = time.perf_counter()
    write_flux(place, place.flux)
    rows.add(what="written", seconds=time.perf_counter() - start_s)
    dtype = torch.bfloat16 if place.on_cuda else torch.float32
    kinds: dict[str, Any] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
    }
    for name, kind in kinds.items():
        with rows.or_error(what=name):
            start_s = time.perf_counter()
            how = {"torch_dtype": dtype, "device_map": {"": place.device}}
            module = kind.from_pretrained(place.flux, subfolder=name, **how)
            place.sync()
            rows.add(
                what=name,
                load_s=time.perf_counter() - start_s,
                memory_gib=bytes_of(module) / GIB,
                host_peak_gib=host_peak_gib(),
            )
            del module
            if place.on_cuda:
                torch.cuda.empty_cache()


@torch.inference_mode()
def flux(place: Place, rows: Rows) -> None:
    """Steps of the server's loop beside the plain pipeline's, in turn; kernels; degrees; encode, decode, uint8."""
    start_s = time.perf_counter()
    model = Model(place)
    place.sync()
    rows.add(what="load_model", seconds=time.perf_counter() - start_s, host_peak_gib=host_peak_gib())
    pipeline = type(model.adapter.pipeline)(
        **{**model.adapter.pipeline.components, "transformer": twin(model.adapter.pipeline.transformer)}
    )
    pipeline.set_progress_bar_config(disable=True)
    for side in sides(place):
        with rows.or_error(side=side):
            side_by_side(place, rows, model, pipeline, side)
        with rows.or_error(side=side):
            rest_of_a_request(place, rows, model, side)
    for side in sides(place):
        degrees_and_kernels(place, rows, model, side)


def side_by_side(place: Place, rows: Rows, model: Model, pipeline: Any, side: int) -> None:
    request, _ = model.begin(side, STEPS)
    _, conditioning, latents = model.engine.encode("r", request)
    held = model.adapter.encode(request)
    ours, plain, results = [], [], [torch.empty(0)] * 2

    def run_ours() -> None:
        report = model.engine.denoise("r", (0,), 0, STEPS, conditioning, latents)
        ours.append(1e3 * (report.ended_s - report.started_s - report.switch_s) / STEPS)
        results[0] = model.engine._states["r"].latents

    def run_plain() -> None:
        begun_s: list[float] = []

        def after_a_step(*_: object) -> dict[str, Any]:
            begun_s.append(time.perf_counter())
            return {}

        place.sync()
        start_s = time.perf_counter()
        results[1] = pipeline(
            prompt_embeds=held["embeds"],
            pooled_prompt_embeds=held["pooled"],
            height=side,
            width=side,
            num_inference_steps=STEPS,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(1),
            output_type="latent",
        ).images
        place.sync()
        plain.append(1e3 * (time.perf_counter() - start_s) / STEPS)

    for number in range(4):
        for run in (run_ours, run_plain) if number % 2 else (run_plain, run_ours):
            run()
    model.engine.release("r")
    ours_ms, plain_ms = (float(np.median(times[1:])) for times in (ours, plain))
    difference = (results[0].float() - results[1].float()).abs().max() / results[1].float().abs().max()
    rows.add(
        side=side,
        loop="eager",
        ours_ms=ours_ms,
        plain_ms=plain_ms,
        ratio=ours_ms / plain_ms,
        latents_differ=float(difference),
    )


def rest_of_a_request(place: Place, rows: Rows, model: Model, side: int) -> None:
    request, state = model.begin(side, STEPS)
    adapter = model.adapter
    encode_ms, _ = place.timed(lambda: adapter.encode(request), 3, 1)
    spatial = adapter.spatial(request, state.latents)
    with place.peak_gib() as peak:
        decode_ms, _ = place.timed(lambda: adapter.pixels(spatial), 2, 1)
    pixels = adapter.pixels(spatial)
    processor = VaeImageProcessor()
    host_ms, _ = place.timed(lambda: np.asarray(processor.postprocess(pixels, output_type="pil")[0]), 3, 1)
    device_ms, _ = place.timed(lambda: picture(pixels), 3, 1)
    same = np.array_equal(picture(pixels), np.asarray(processor.postprocess(pixels, output_type="pil")[0]))
    rows.add(side=side, encode_ms=encode_ms, decode_ms=decode_ms, decode_peak_gib=peak())
    rows.add(side=side, uint8_on_host_ms=host_ms, uint8_on_device_ms=device_ms, equal=same)


def degrees_and_kernels(place: Place, rows: Rows, model: Model, side: int) -> None:
    """One step by kernel, and by degree without its exchange."""
    _, state = model.begin(side, 1)
    for kernel in model.kernels:
        for degree in DEGREES if kernel == "auto" else DEGREES[:1]:
            group = None if degree == 1 else NoExchange(tuple(range(degree)), 0, None, 0)
            model.kernel = kernel
            with rows.or_error(side=side, kernel=kernel, degree=degree), place.peak_gib() as peak:
                with model.adapter.over(group):
                    done_ms, launched_ms = place.timed(
                        lambda: model.adapter.predict([state]), 3 if side > 1024 else 5
                    )
                rows.add(
                    side=side,
                    kernel=kernel,
                    degree=degree,
                    step_ms=done_ms,
                    launched_ms=launched_ms,
                    peak_gib=peak(),
                )
    model.kernel = "auto"
    for degree in DEGREES if place.on_cuda else ():
        with rows.or_error(side=side, degree=degree, replayed_ms=None):
            replayed_ms = replayed(place, model, state, degree)
            rows.add(side=side, degree=degree, replayed_ms=replayed_ms)


def replayed(place: Place, model: Model, state: Any, degree: int) -> float:
    """A step as one CUDA graph: what the device needs when nothing waits for the host."""
    group = None if degree == 1 else NoExchange(tuple(range(degree)), 0, None, 0)
    graph = torch.cuda.CUDAGraph()
    with model.adapter.over(group):
        beside = torch.cuda.Stream()
        with torch.cuda.stream(beside):  # kernels choose and load before the capture
            for _ in range(2):
                model.adapter.predict([state])
        place.sync()
        with torch.cuda.graph(graph):
            model.adapter.predict([state])
    return place.timed(graph.replay, 5, 1)[0]


@torch.inference_mode()
def compiled(place: Place, rows: Rows) -> None:
    """The same step with the blocks compiled, ours and the plain transformer."""
    model = Model(place)
    ours, plain = model.adapter.pipeline.transformer, twin(model.adapter.pipeline.transformer)
    for name, module in (("ours", ours), ("plain", plain)):
        model.adapter.pipeline.transformer = module
        with rows.or_error(loop=f"compiled, {name}"):
            if place.small:  # what the CPU would have to compile takes longer than all the rest
                module.compile_repeated_blocks(dynamic=True, backend="eager")
            elif name == "ours":
                compile_blocks(module)  # as `model.compile` does it
            else:
                module.compile_repeated_blocks(dynamic=True)
            for side in sides(place):
                _, state = model.begin(side, 1)
                start_s = time.perf_counter()
                model.adapter.predict([state])
                place.sync()
                first_s = time.perf_counter() - start_s
                done_ms, _ = place.timed(lambda: model.adapter.predict([state]), 3, 1)  # noqa: B023
                rows.add(side=side, loop=f"compiled, {name}", step_ms=done_ms, first_s=first_s)


def flux_inputs(model: Any, side: int, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    config, tokens = model.config, (side // 16) ** 2
    on: dict[str, Any] = {"device": model.device, "dtype": dtype}
    return {
        "hidden_states": torch.randn(batch, tokens, config.in_channels, **on),
        "encoder_hidden_states": torch.randn(batch, 512, config.joint_attention_dim, **on),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, **on),
        "timestep": torch.ones(batch, **on),
        "guidance": torch.full([batch], 3.5, device=model.device),
        "img_ids": torch.zeros(tokens, 3, **on),
        "txt_ids": torch.zeros(512, 3, **on),
        "return_dict": False,
    }


@torch.inference_mode()
def batches(place: Place, rows: Rows) -> None:
    """Step batches of one shape through the plain transformer: the batch law (design: Profile)."""
    dtype = torch.bfloat16 if place.on_cuda else torch.float32
    loaded = FluxTransformer2DModel.from_pretrained(
        place.flux, subfolder="transformer", torch_dtype=dtype, device_map={"": place.device}
    )
    timed_batches(place, rows, loaded.eval(), lambda side, batch: flux_inputs(loaded, side, batch, dtype))


@torch.inference_mode()
def families(place: Place, rows: Rows) -> None:
    """The same in the dimensions of other families; batch 2 is what guidance makes of one request."""
    for family, (make, inputs) in FAMILIES.items():
        with rows.or_error(family=family):
            model = make(place)
            timed_batches(place, rows, model, partial(inputs, model), family=family)
        model = None
        if place.on_cuda:
            torch.cuda.empty_cache()


def on_model(model: Any) -> dict[str, Any]:
    return {"device": model.device, "dtype": torch.bfloat16}


def sd35_inputs(model: Any, side: int, batch: int) -> dict[str, Any]:
    config, on = model.config, on_model(model)
    return {
        "hidden_states": torch.randn(batch, config.in_channels, side // 8, side // 8, **on),
        "encoder_hidden_states": torch.randn(batch, 333, config.joint_attention_dim, **on),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, **on),
        "timestep": torch.ones(batch, **on),
        "return_dict": False,
    }


def qwen_inputs(model: Any, side: int, batch: int) -> dict[str, Any]:
    config, on = model.config, on_model(model)
    return {
        "hidden_states": torch.randn(batch, (side // 16) ** 2, config.in_channels, **on),
        "encoder_hidden_states": torch.randn(batch, 128, config.joint_attention_dim, **on),
        "timestep": torch.ones(batch, **on),
        "img_shapes": [[(1, side // 16, side // 16)]] * batch,
        "return_dict": False,
    }


def z_image_inputs(model: Any, side: int, batch: int) -> dict[str, Any]:
    on = on_model(model)
    return {
        "x": list(torch.randn(batch, model.in_channels, 1, side // 8, side // 8, **on)),
        "t": torch.ones(batch, **on),
        "cap_feats": list(torch.randn(batch, 128, model.config.cap_feat_dim, **on)),
        "return_dict": False,
    }


def wan_inputs(model: Any, side: int, batch: int) -> dict[str, Any]:
    """Of 17 frames."""
    config, on = model.config, on_model(model)
    return {
        "hidden_states": torch.randn(batch, config.in_channels, 5, side // 8, side // 8, **on),
        "encoder_hidden_states": torch.randn(batch, 512, config.text_dim, **on),
        "timestep": torch.ones(batch, **on),
        "return_dict": False,
    }


FAMILIES: dict[str, tuple[Callable[[Place], Any], Callable[[Any, int, int], dict[str, Any]]]] = {
    "SD3.5 large": (make_sd35, sd35_inputs),
    "Z-Image": (make_z_image, z_image_inputs),
    "Qwen-Image": (make_qwen_image, qwen_inputs),
    "Wan 2.1 1.3B": (make_wan, wan_inputs),
}


def timed_batches(
    place: Place, rows: Rows, model: Any, inputs: Callable[[int, int], dict[str, Any]], **which: str
) -> None:
    for side in [side for side in sides(place) if side <= 1024]:
        for batch in BATCHES[:2] if place.small else BATCHES:
            with rows.or_error(**which, side=side, batch=batch), place.peak_gib() as peak:
                values = inputs(side, batch)
                done_ms, launched_ms = place.timed(lambda: model(**values), 3, 1)  # noqa: B023
                rows.add(
                    **which,
                    side=side,
                    batch=batch,
                    step_ms=done_ms,
                    launched_ms=launched_ms,
                    peak_gib=peak(),
                )
