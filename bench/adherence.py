"""Does a picture show what its prompt says? Classical image analysis for the embedded model's grammar.

    python bench/adherence.py "a small red circle above a large blue square" picture.png

Knows the grammar's words and colours, but nothing of how pictures are drawn for training.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from PIL import Image
from skimage.color import rgb2lab
from skimage.measure import label, regionprops
from skimage.morphology import disk, erosion

from tetriserve.models.embedded.grammar import COLOURS, Scene, Thing, parse

SIDE = 256  # pictures are judged with this short side
LEAST_AREA = 0.004  # of SIDE squared; smaller specks are not things
SMALL_BELOW = 0.285  # extent of a thing, as a share of the short side
LEAST_OVERLAP = 0.7  # of a thing with the ideal shape of its extent, intersection over union
COLOUR_TOLERANCE = 30.0  # CIE76 difference

_NAMES = tuple(COLOURS)
_PALETTE = rgb2lab(np.array([COLOURS[name] for name in _NAMES], dtype=np.uint8)[None])[0]


def complaints(picture: np.ndarray, scene: Scene) -> list[str]:
    """What in `picture`, uint8 [height, width, 3], is not as `scene` says; empty when all is right."""
    height, width = picture.shape[:2]
    scale = SIDE / min(height, width)
    size = (round(width * scale), round(height * scale))
    lab = rgb2lab(np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX)))

    distances = np.linalg.norm(lab[:, :, None] - _PALETTE, axis=-1)
    nearest = distances.argmin(-1)
    background = np.bincount(nearest.ravel()).argmax()
    backdrop = np.median(lab[nearest == background], axis=0)
    found = [f"the background is {_NAMES[background]}"] if _NAMES[background] != scene.background else []
    if np.linalg.norm(backdrop - _PALETTE[background]) > COLOUR_TOLERANCE:
        found.append("the background's colour is off")

    # half-way between background and thing belongs to neither: compare with the nearest other colour
    others = np.delete(distances, background, axis=-1).min(-1)
    regions = [
        region
        for region in regionprops(label(others < np.linalg.norm(lab - backdrop, axis=-1), connectivity=2))
        if region.area > LEAST_AREA * SIDE**2
    ]
    if len(regions) != len(scene.things):
        return [*found, f"{len(regions)} things"]
    seen = [_describe(region, lab) for region in regions]
    order = sorted(range(len(seen)), key=lambda i: seen[i].colour != scene.things[0].colour)
    for thing, index in zip(scene.things, order, strict=True):
        if seen[index] != thing:
            found.append(f"{_name(seen[index])} instead of {_name(thing)}")
    if scene.relation is not None:
        (y, x), (y_2, x_2) = (regions[index].centroid for index in order)
        if abs(y - y_2) > abs(x - x_2):
            relation = "above" if y < y_2 else "below"
        else:
            relation = "left of" if x < x_2 else "right of"
        if relation != scene.relation:
            found.append(f"{relation} instead of {scene.relation}")
    return found


def _describe(region: Any, lab: np.ndarray) -> Thing:
    """Size, colour and shape of a region; the shape is "unclear" when no ideal one covers it well."""
    rows, columns = region.image.shape
    extent = max(rows, columns) / SIDE
    overlaps = {
        shape: np.sum(ideal & region.image) / np.sum(ideal | region.image)
        for shape, ideal in _ideal_shapes(rows, columns).items()
    }
    shape = max(overlaps, key=lambda name: overlaps[name])
    if overlaps[shape] < LEAST_OVERLAP or not 0.75 < rows / columns < 1.33:
        shape = "unclear"
    inside = erosion(np.pad(region.image, 1), disk(2))[1:-1, 1:-1]
    colour = np.median(lab[region.slice][inside if inside.any() else region.image], axis=0)
    distances = np.linalg.norm(_PALETTE - colour, axis=-1)
    name = _NAMES[distances.argmin()] if distances.min() < COLOUR_TOLERANCE else "unclear"
    return Thing("small" if extent < SMALL_BELOW else "large", name, shape)


def _ideal_shapes(rows: int, columns: int) -> dict[str, np.ndarray]:
    """Each shape as a mask that fills a box of rows x columns."""
    y = (np.arange(rows)[:, None] + 0.5) / rows * 2 - 1
    x = (np.arange(columns)[None, :] + 0.5) / columns * 2 - 1
    radius = np.hypot(y, x)
    return {
        "circle": radius < 1,
        "square": radius < 2,
        "triangle": np.abs(x) < (y + 1) / 2,
        "cross": np.minimum(np.abs(y), np.abs(x)) < 1 / 3,
        "ring": np.abs(radius - 0.75) < 0.25,
    }


def _name(thing: Thing) -> str:
    return f"{thing.size} {thing.colour} {thing.shape}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt")
    parser.add_argument("picture")
    options = parser.parse_args()
    picture = np.asarray(Image.open(options.picture).convert("RGB"))
    print("\n".join(complaints(picture, parse(options.prompt))) or "as the prompt says")


if __name__ == "__main__":
    main()
