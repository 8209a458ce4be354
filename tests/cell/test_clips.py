"""A cell that makes clips: real replicas in Ray's own processes, the scheduler in the test's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import ray
import torch
import yaml
from diffusers import WanPipeline
from model_folders import tiny_wan

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


def test_clips_and_pictures_of_one_model(tmp_path: Path) -> None:
    """Frames reach the plan, the pixels and the answer: a clip of nine, a picture beside it, and a number between."""
    folder = tiny_wan(tmp_path / "wan")
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(PROFILE))
    cell = {"gpus": 2, "device": "cpu", "cpus_per_replica": 0.5}
    args = AppArgs.parse(
        {
            "model": {"path": str(folder), "dtype": "float32", "max_sequence_length": 30},
            "cell": cell,
            "profile": {"path": str(tmp_path / "profile.yaml"), "correct": False},
        }
    )

    def request(seed: int, **more: int) -> GenerateRequest:
        name = f"r{seed}"
        return GenerateRequest("a star", 128, 144, 4, seed=seed, request_id=name, slo_s=60, **more)

    async def run() -> None:
        group = ray.util.placement_group(args.cell.bundles)
        await group.ready()
        scheduler = Scheduler(args, group)
        await scheduler.start()
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
        ray.util.remove_placement_group(group)

    start_ray(3)
    try:
        asyncio.run(run())
    finally:
        ray.shutdown()
