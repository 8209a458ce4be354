"""Flow matching for the embedded transformer and its text encoders, on latents of drawn pictures."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from tetriserve.models.embedded.build import T5_REACH, hide_pads, make_scheduler
from tetriserve.models.embedded.draw import draw
from tetriserve.models.embedded.grammar import random_scene, write

TEXT_TOKENS = 18  # the longest prompt has 17 with its end mark; the last token is always a pad
TOKENS_A_STEP = 1600  # of text and image, over the batch

PICTURES = {  # how many, by (height, width)
    (64, 64): 24000,
    (128, 128): 24000,
    (256, 256): 8000,
    (128, 256): 3000,
    (256, 128): 3000,
    (512, 512): 3000,
    (1024, 512): 1000,
    (512, 1024): 1000,
    (1024, 1024): 1600,
}


class Part(NamedTuple):
    """What of a picture a step trains on.

    Attributes:
        kept: of a large picture only so many image tokens are computed; 0 for all.
        outlines: those are mostly on outlines and next to pure noise, of several pictures: there it is decided where
            a thing ends, and other tokens hardly matter. Else they are a square, and some for what is around it.
    """

    height: int
    width: int
    kept: int = 0
    outlines: bool = False


Stages = list[tuple[float, dict[Part, float]]]
"""(share of the training from which it holds, weights of what a step may train on)."""

STAGES: Stages = [
    (
        0.0,
        {
            Part(64, 64): 5,
            Part(128, 128): 5,
            Part(256, 256): 1,
            Part(128, 256): 0.5,
            Part(256, 128): 0.5,
        },
    ),
    (
        0.25,
        {
            Part(64, 64): 0.5,
            Part(128, 128): 4,
            Part(256, 256): 4,
            Part(128, 256): 0.5,
            Part(256, 128): 0.5,
            Part(512, 512, 256): 0.5,
        },
    ),
    (
        0.7,
        {
            Part(128, 128): 1,
            Part(256, 256): 2,
            Part(128, 256): 0.25,
            Part(256, 128): 0.25,
            Part(512, 512, 256): 2,
            Part(512, 512): 3,
            Part(1024, 512, 512): 1,
            Part(512, 1024, 512): 1,
            Part(1024, 1024, 512): 1,
            Part(1024, 1024, 1024): 1,
        },
    ),
]
REFINING: Stages = [
    (
        0.0,
        {
            Part(128, 128): 1,
            Part(256, 256): 1,
            Part(512, 512): 1.5,
            Part(1024, 512, 1024): 1,
            Part(512, 1024, 1024): 1,
            Part(1024, 1024, 1024): 3,
            Part(1024, 512, 256, outlines=True): 1,
            Part(512, 1024, 256, outlines=True): 1,
            Part(1024, 1024, 256, outlines=True): 4,
        },
    ),
]
"""For a model that draws well up to 512 px, and is not to forget the small sizes."""


class Pool:
    """Latents and prompts of drawn pictures of one size, kept in a file once made.

    Attributes:
        latents: [pictures, image tokens, 64], scaled and packed as `FluxPipeline` holds them.
        t5_ids, clip_ids: [pictures, text tokens], padded.
    """

    def __init__(
        self,
        folder: Path,
        vae: Any,
        tokenizers: dict[str, Any],
        height: int,
        width: int,
        count: int,
    ) -> None:
        path = folder / f"pool-{height}x{width}.safetensors"
        tensors = load_file(path) if path.exists() else {}
        if not tensors or len(tensors["latents"]) < count:
            tensors = _draw_pool(vae, tokenizers, height, width, count)
            save_file(tensors, path)
        self.latents, self.t5_ids, self.clip_ids = (
            tensors["latents"],
            tensors["t5_ids"],
            tensors["clip_ids"],
        )


@torch.no_grad()
def _draw_pool(
    vae: Any, tokenizers: dict[str, Any], height: int, width: int, count: int
) -> dict[str, torch.Tensor]:
    choice = random.Random(f"{height}x{width}")
    scenes = [random_scene(choice, choice.choice((1, 2, 2)), held_out=False) for _ in range(count)]
    prompts = [write(scene, choice) for scene in scenes]
    batch = max(1, 128 * 128 // (height * width))
    latents = []
    for start in tqdm(range(0, count, batch), desc=f"pictures {width}x{height}", mininterval=10):
        pictures = np.stack([draw(scene, height, width, choice) for scene in scenes[start : start + batch]])
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean = vae.encode(pixels).latent_dist.mean
        mean = (mean - vae.config.shift_factor) * vae.config.scaling_factor
        latents.append(FluxPipeline._pack_latents(mean, *mean.shape).half())
    return {"latents": torch.cat(latents), **token_ids(tokenizers, prompts)}


def token_ids(tokenizers: dict[str, Any], prompts: list[str]) -> dict[str, torch.Tensor]:
    """T5's ids with as many pads as its words can see behind the longest prompt, CLIP's ids with a few."""

    def ids(name: str, length: int) -> torch.Tensor:
        return tokenizers[name](
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    return {
        "t5_ids": ids("t5_tokenizer", TEXT_TOKENS - 1 + T5_REACH),
        "clip_ids": ids("clip_tokenizer", TEXT_TOKENS + 1),
    }


class FlowMatching:
    """The loss of `model` (its `transformer`, `t5` and `clip`) at a step, all randomness from the step's number."""

    def __init__(
        self,
        model: Any,
        vae: Any,
        tokenizers: dict[str, Any],
        folder: Path,
        *,
        steps: int,
        seed: int = 0,
        pictures: dict[tuple[int, int], int] = PICTURES,
        stages: Stages = STAGES,
    ) -> None:
        self.model, self.steps, self.seed, self.stages = model, steps, seed, stages
        self.scheduler = make_scheduler().config
        self._make_pool = lambda h, w: Pool(folder, vae, tokenizers, h, w, pictures[h, w])
        self._pools: dict[tuple[int, int], Pool] = {}
        self._empty = token_ids(tokenizers, [""])

    def after_step(self) -> None:
        hide_pads(self.model["t5"])

    def loss(self, step: int) -> torch.Tensor:
        choice = random.Random(f"{self.seed} {step}")
        torch.manual_seed(choice.getrandbits(32))
        weights = [weights for start, weights in self.stages if step >= start * self.steps][-1]
        (part,) = choice.choices(list(weights), list(weights.values()))
        height, width = part.height, part.width
        if (height, width) not in self._pools:
            self._pools[height, width] = self._make_pool(height, width)
        pool = self._pools[height, width]
        device = self.model["transformer"].device

        tokens = height * width // 256
        positions = FluxPipeline._prepare_latent_image_ids(
            1, height // 16, width // 16, device, torch.float32
        )
        count = max(1, TOKENS_A_STEP // (TEXT_TOKENS + (part.kept or tokens)))
        rows = torch.randint(len(pool.latents), [count])
        clean = pool.latents[rows].float()
        chosen, near = _near_and_far(clean, part)
        clean = clean[:, chosen].to(device)
        empty = torch.rand(count, 1) < 0.03
        t5_ids = torch.where(empty, self._empty["t5_ids"], pool.t5_ids[rows]).to(device)
        clip_ids = torch.where(empty, self._empty["clip_ids"], pool.clip_ids[rows]).to(device)

        # Noise levels on the scale on which the sampler takes even steps at this size, spread evenly over the batch
        # but crowded where there is little but noise: there it is decided what goes where.
        mu = calculate_shift(
            tokens,
            self.scheduler.base_image_seq_len,
            self.scheduler.max_image_seq_len,
            self.scheduler.base_shift,
            self.scheduler.max_shift,
        )
        level = (torch.arange(count) + torch.rand(count)).to(device) / count
        level = (1 - (1 - level) ** 3).clamp(0.005, 0.9999)
        if part.outlines:
            # the noisiest twentieth: with more of the picture neighbours count, and they are left out
            level = 1 - (1 - level) / 20
        sigma = 1 / (1 + math.exp(-mu) * (1 / level - 1))
        noise = torch.randn_like(clean)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])

        # One key may stand for many alike: the last text token for all further pads, an image token far away for
        # those that were left out. Added to the attention's logits, log n does just that.
        pads = choice.choice((64, 64, 64, 512, choice.randint(20, 128))) - TEXT_TOKENS + 1
        key_bias = torch.zeros(TEXT_TOKENS + len(chosen), device=device)
        key_bias[TEXT_TOKENS - 1] = math.log(pads)
        if near < tokens:
            key_bias[TEXT_TOKENS + near :] = math.log((tokens - near) / (len(chosen) - near))

        predicted = self.model[
            "transformer"
        ](
            hidden_states=noisy,
            timestep=sigma,
            guidance=torch.empty(count, device=device).uniform_(1, 7),  # any: the model is to ignore it
            pooled_projections=self.model["clip"](clip_ids).pooler_output,
            encoder_hidden_states=self.model["t5"](t5_ids)[0][:, :TEXT_TOKENS],
            txt_ids=torch.zeros(TEXT_TOKENS, 3, device=device),
            img_ids=positions[chosen.to(device)],
            joint_attention_kwargs={"attention_mask": key_bias[None, None, None]},
            return_dict=False,
        )[0]
        error = (predicted - (noise - clean))[:, :near].square().mean((1, 2))
        # below half noise a step moves the picture by `sigma` times the error, and the decoder forgives a little
        return (error * (2 * sigma).clamp(max=1).square()).mean()


def _near_and_far(clean: torch.Tensor, part: Part) -> tuple[torch.Tensor, int]:
    """Indices of the tokens kept of pictures [count, tokens, channels], and how many of them, the first, are trained.

    About half of those kept are trained: a square around an outline, which sees its surroundings as in the whole
    picture, or tokens on outlines. The others are scattered elsewhere.
    """
    rows, columns = part.height // 16, part.width // 16
    if not part.kept:
        return torch.arange(rows * columns), rows * columns
    contrast = _contrast(clean.view(-1, rows, columns, clean.shape[2]))
    outside = torch.ones(rows, columns, dtype=torch.bool)
    if part.outlines:
        outside.view(-1)[torch.multinomial(contrast.flatten(), part.kept // 2)] = False
    else:
        side = min(rows, columns, math.isqrt(part.kept * 9 // 16))
        at = divmod(int(torch.multinomial(contrast.flatten(), 1)), columns)
        top, left = (
            min(max(0, center - side // 2), length - side)
            for center, length in zip(at, (rows, columns), strict=True)
        )
        outside[top : top + side, left : left + side] = False
    near, far = (~outside).flatten().nonzero()[:, 0], outside.flatten().nonzero()[:, 0]
    return torch.cat([near, far[torch.randperm(len(far))[: part.kept - len(near)]]]), len(near)


def _contrast(latents: torch.Tensor) -> torch.Tensor:
    """How much latents [count, rows, columns, channels] change around each place: [rows, columns], nowhere 0."""
    contrast = torch.zeros(latents.shape[1:3])
    for axis in (0, 1):
        step = latents.diff(dim=axis + 1).square().sum((0, 3))
        for start in (0, 1):
            contrast.narrow(axis, start, step.shape[axis]).add_(step)
    return F.avg_pool2d(contrast[None], 5, stride=1, padding=2)[0] + 0.1 * contrast.mean()
