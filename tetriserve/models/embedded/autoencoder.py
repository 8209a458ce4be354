"""The loss of the embedded model's VAE on crops of drawn pictures."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from tetriserve.models.embedded.draw import draw
from tetriserve.models.embedded.grammar import random_scene

_CROPS = ((64, 8), (96, 4), (128, 2), (64, 8), (64, 8), (64, 8), (192, 1))  # (side, crops a step), in turn
_PICTURES = (64, 128, 192, 256, 512, 1024)  # sides
_NOISE = 0.1  # on the latents, so that the decoder forgives what the transformer gets slightly wrong


class Reconstruction:
    """How far pictures and their edges come out of the VAE from what went in, with latents that are easy to guess.

    Three latent channels follow the picture's colours at an eighth of its size; the others are kept small.
    """

    def __init__(self, vae: Any, seed: int = 0) -> None:
        self.vae, self.seed = vae, seed

    def loss(self, step: int) -> torch.Tensor:
        choice = random.Random(f"{self.seed} {step}")
        torch.manual_seed(choice.getrandbits(32))
        side, count = _CROPS[step % len(_CROPS)]
        pictures = np.stack([_crop(side, choice) for _ in range(count)])
        wanted = torch.from_numpy(pictures).to(self.vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = self.vae.encode(wanted).latent_dist.mean
        got = self.vae.decode(latents + _NOISE * torch.randn_like(latents)).sample
        error = got - wanted
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        colours = (latents[:, :3] - avg_pool2d(wanted, 8)).square().mean()
        return error.abs().mean() + edges + 0.5 * colours + 0.003 * latents[:, 3:].square().mean()


def _crop(side: int, choice: random.Random) -> np.ndarray:
    """A part of a picture of any size; parts of one flat colour are rarer than chance has them."""
    scene = random_scene(choice, choice.choice((1, 2)), held_out=False)
    picture = choice.choice([size for size in _PICTURES if size >= side])
    for _ in range(3):
        window = (choice.randint(0, picture - side), choice.randint(0, picture - side), side, side)
        crop = draw(scene, picture, picture, choice, window)
        if crop.min((0, 1)).tolist() != crop.max((0, 1)).tolist() or choice.random() < 0.3:
            break
    return crop


@torch.no_grad()
def fit_scale(vae: Any, pictures: int = 100) -> None:
    """Set the VAE's scaling and shift so that latents of 256x256 pictures have mean 0 and variance 1 over all."""
    choice = random.Random("scale")
    drawn = [
        draw(random_scene(choice, choice.choice((1, 2)), held_out=False), 256, 256, choice)
        for _ in range(pictures)
    ]
    latents = torch.cat(
        [
            vae.encode(
                torch.from_numpy(picture)[None].permute(0, 3, 1, 2).float() / 127.5 - 1
            ).latent_dist.mean
            for picture in drawn
        ]
    )
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
