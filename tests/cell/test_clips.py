"""A cell that makes clips, and one that edits: real replicas in Ray's own processes, the scheduler in the test's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import live_cell
import numpy as np
import pytest
import ray
import torch
import yaml
from diffusers import FluxImg2ImgPipeline, WanPipeline
from model_folders import tiny_flux, tiny_wan
from PIL import Image

from deployments.cell.scheduler import Scheduler
from deployments.config import AppArgs
from deployments.local import start_ray
from tetriserve.errors import InvalidRequest
from tetriserve.request import GenerateRequest

PROFILE = {
    "model": "wan",
    "device": "CPU",
    "source": "made up",
    "degrees": [1, 2],
    "step_seconds": {"128x144": {1: 0.1, 2: 0.08}, "128x144x9": {1: 0.4, 2: 0.1}},
}


@pytest.mark.slow
def test_clips_and_pictures_of_one_model(tmp_path: Path) -> None:
    """Frames reach the plan, the pixels and the answer: a clip of nine, a picture beside it, and a number between."""
    folder = tiny_wan(tmp_path / "wan")

    def request(seed: int, **more: int) -> GenerateRequest:
        name = f"r{seed}"
        return GenerateRequest("a star", 128, 144, 4, seed=seed, request_id=name, slo_s=60, **more)

    async def run(scheduler: Scheduler) -> None:
        clip, picture = await asyncio.gather(
            scheduler.generate(request(1, num_frames=9), "call"), scheduler.generate(request(2), "call")
        )
        assert clip.metrics.planned_with.step_s == {1: 0.4, 2: 0.1}
        assert picture.metrics.planned_with.step_s == {1: 0.1, 2: 0.08}
        frames, image = await clip.image, await picture.image
        assert frames.shape == (9, 128, 144, 3) and image.shape == (128, 144, 3)
        plain = WanPipeline.from_pretrained(folder, dtype=torch.float32)
        (expected,) = plain(
            "a star",
            height=128,
            width=144,
            num_frames=9,
            num_inference_steps=4,
            max_sequence_length=30,
            generator=torch.Generator().manual_seed(1),
            output_type="pil",
        ).frames
        assert np.abs(frames.astype(int) - np.asarray(expected)).max() <= 1
        try:
            await scheduler.generate(request(3, num_frames=8), "call")
        except InvalidRequest as error:
            assert error.field == "num_frames" and "nearest: 9" in error.message
        else:
            raise AssertionError("8 frames were taken")

    on_a_cell(folder, PROFILE, run)


EDIT_PROFILE = {
    "model": "flux",
    "device": "CPU",
    "source": "made up",
    "degrees": [1, 2],
    "step_seconds": {"128x144": {1: 0.2, 2: 0.1}},
    "encode_image_seconds": {"128x144": 0.05},
}


def test_edits_beside_pictures_from_text(tmp_path: Path) -> None:
    """Pixels go by the object store, to a phase of their own; a replica that dies on the way changes nothing."""
    folder = tiny_flux(tmp_path / "flux")
    pixels = np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)

    def request(name: str, **more: Any) -> GenerateRequest:
        return GenerateRequest("a star", 128, 144, 6, 3.5, seed=1, request_id=name, slo_s=60, **more)

    async def run(scheduler: Scheduler) -> None:
        asked = request("edit", images=[pixels], strength=0.7)
        sent = asked.with_pixels([ray.put(pixels)])
        edit, text = await asyncio.gather(
            scheduler.generate(sent, "call"), scheduler.generate(request("text"), "call")
        )
        assert [one.kind for one in edit.metrics.schedule][:2] == ["encode", "encode_image"]
        assert sum(one.steps for one in edit.metrics.steps) == 5
        assert sum(one.steps for one in text.metrics.steps) == 6
        assert edit.metrics.planned_with.encode_image_s == 0.05
        plain = FluxImg2ImgPipeline.from_pretrained(folder, dtype=torch.float32)
        expected = plain(
            "a star",
            image=Image.fromarray(pixels),
            strength=0.7,
            height=128,
            width=144,
            num_inference_steps=6,
            guidance_scale=3.5,
            max_sequence_length=30,
            generator=torch.Generator().manual_seed(1),
        ).images[0]
        image = await edit.image
        assert np.abs(image.astype(int) - np.asarray(expected)).max() <= 1
        assert np.abs((await text.image).astype(int) - np.asarray(expected)).max() > 5

        again = asyncio.create_task(scheduler.generate(replace(sent, request_id="again"), "call"))
        fleet = scheduler._state.fleet
        while not any(entry.phase == "encode_image" for entry in scheduler._requests.entries.values()):
            await asyncio.sleep(0.002)
        ray.kill(fleet[0])
        watching = asyncio.create_task(_look(scheduler))
        result = await again
        watching.cancel()
        np.testing.assert_array_equal(await result.image, image)

    on_a_cell(folder, EDIT_PROFILE, run)


async def _look(scheduler: Scheduler) -> None:
    while True:
        await scheduler.check_health()
        await asyncio.sleep(0.2)


def on_a_cell(
    model: Path, profile: dict[str, Any], work: Callable[[Scheduler], Coroutine[Any, Any, None]]
) -> None:
    """Do `work` on two replicas of the model in that folder."""
    file = model.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(profile))
    args = AppArgs.parse(
        {
            "model": {"path": str(model), "dtype": "float32", "max_sequence_length": 30},
            "cell": {"gpus": 2, "device": "cpu", "cpus_per_replica": 0.5},
            "profile": {"path": str(file), "correct": False},
        }
    )
    start_ray(3)
    try:
        live_cell.on_a_cell(args, work)
    finally:
        ray.shutdown()
