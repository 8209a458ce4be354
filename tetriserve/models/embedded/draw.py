"""A scene as a picture of any size: flat colours, smooth edges, places and sizes relative to the picture."""

from __future__ import annotations

import random

import numpy as np

from tetriserve.models.embedded.grammar import COLOURS, Scene

EXTENT = {"small": 0.21, "large": 0.36}  # of the picture's short side
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
    """uint8 [height, width, 3]. `choice` moves the scene by up to 1/32 of the picture each way.

    With `window` (top, left, rows, columns) only that part is drawn.
    """
    top, left, rows, columns = window or (0, 0, height, width)
    y = np.arange(top, top + rows, dtype=np.float32)[:, None] + 0.5
    x = np.arange(left, left + columns, dtype=np.float32)[None, :] + 0.5
    picture: np.ndarray = np.broadcast_to(_rgb(scene.background), (rows, columns, 3))
    moved_y, moved_x = choice.randint(-1, 1) / 32, choice.randint(-1, 1) / 32
    for thing, (place_y, place_x) in zip(scene.things, _PLACES[scene.relation], strict=True):
        center_y = (place_y + moved_y) * height
        center_x = (place_x + moved_x) * width
        extent = EXTENT[thing.size] * min(height, width)
        distance = _distance(thing.shape, y - center_y, x - center_x, extent)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        picture = picture + cover * (_rgb(thing.colour) - picture)
    return np.round(picture).astype(np.uint8)


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
