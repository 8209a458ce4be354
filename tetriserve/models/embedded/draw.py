"""A scene as a picture of any size: colours in soft light, smooth edges, places and sizes relative to the picture."""

from __future__ import annotations

import random

import numpy as np

from tetriserve.models.embedded.grammar import COLOURS, Scene

EXTENT = {"small": 0.21, "large": 0.36}  # of the picture's short side
LIGHT = 24  # of 255, at most
WAVES = 3
_PLACES = {  # (y, x) of the first and the second thing, as shares of height and width
    None: ((0.5, 0.5),),
    "left of": ((0.5, 0.25), (0.5, 0.75)),
    "right of": ((0.5, 0.75), (0.5, 0.25)),
    "above": ((0.25, 0.5), (0.75, 0.5)),
    "below": ((0.75, 0.5), (0.25, 0.5)),
}


def draw(
    scene: Scene,
    height: int,
    width: int,
    choice: random.Random,
    window: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """uint8 [height, width, 3], with `window` (top, left, rows, columns) only that part.

    `choice` decides how light falls. That is all in which pictures of one prompt differ, because a small model can
    settle it place by place. When the whole scene moved instead, parts of one edge settled for different moves.
    """
    top, left, rows, columns = window or (0, 0, height, width)
    y = np.arange(top, top + rows, dtype=np.float32)[:, None] + 0.5
    x = np.arange(left, left + columns, dtype=np.float32)[None, :] + 0.5
    picture: np.ndarray = np.broadcast_to(_rgb(scene.background), (rows, columns, 3))
    for thing, (place_y, place_x) in zip(scene.things, _PLACES[scene.relation], strict=True):
        extent = EXTENT[thing.size] * min(height, width)
        distance = _distance(thing.shape, y - place_y * height, x - place_x * width, extent)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        picture = picture + cover * (_rgb(thing.colour) - picture)
    light = _light(y / height, x / width, choice)[..., None]
    return np.clip(np.round(picture + light), 0, 255).astype(np.uint8)


def _light(y: np.ndarray, x: np.ndarray, choice: random.Random) -> np.ndarray:
    """What to add to colours at (y, x), shares of the picture: waves that cross it once or twice."""
    total = np.zeros(np.broadcast_shapes(y.shape, x.shape), dtype=np.float32)
    for _ in range(WAVES):
        waves_y, waves_x = choice.choice([(a, b) for a in range(3) for b in range(-2, 3) if a or b])
        phase = choice.random()
        total += LIGHT / WAVES * np.cos(2 * np.pi * (waves_y * y + waves_x * x + phase))
    return total


def _rgb(colour: str) -> np.ndarray:
    return np.array(COLOURS[colour], dtype=np.float32)


def _distance(shape: str, y: np.ndarray, x: np.ndarray, extent: float) -> np.ndarray:
    """Signed distance in pixels to the edge of a shape centred at 0 (negative inside), its box `extent` wide."""
    half = extent / 2
    if shape == "circle":
        return np.hypot(y, x) - half
    if shape == "ring":
        return np.abs(np.hypot(y, x) - 0.75 * half) - 0.25 * half
    if shape == "square":
        return np.maximum(np.abs(y), np.abs(x)) - 0.9 * half
    if shape == "cross":
        near, far = np.minimum(np.abs(y), np.abs(x)), np.maximum(np.abs(y), np.abs(x))
        return np.maximum(near - extent / 6, far - half)
    assert shape == "triangle"
    slope = np.hypot(1.0, 2.0)  # sides rise two for one: as high as wide
    return np.maximum(y - half, (2 * np.abs(x) - y - half) / slope)
