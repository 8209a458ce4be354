"""Pictures that go in: what to begin from, or to look at while another one is made."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tetriserve.errors import InvalidRequest

MIN_REFERENCE_SIDE = 64
MAX_REFERENCE_ASPECT = 8
"""Of a picture that is looked at, as FLUX.2's pipeline has them."""


@dataclass(frozen=True)
class InputImage:
    """One picture of a request. Two are equal when their pixels are.

    Attributes:
        digest: of the pixels.
        pixels: uint8 [height, width, 3]; on the way to a GPU a reference to them, behind it None.
    """

    height: int
    width: int
    digest: str
    pixels: Any = field(compare=False, repr=False)

    @classmethod
    def of(cls, picture: Any) -> InputImage:
        """Of a PIL image, or of an array uint8 [height, width, 3]. Raises `InvalidRequest`."""
        if isinstance(picture, cls):
            return picture
        pixels = np.asarray(picture.convert("RGB") if hasattr(picture, "convert") else picture)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            kind = f"{pixels.dtype} {list(pixels.shape)}"
            raise InvalidRequest(
                "image", f"{kind}, allowed are PIL images and arrays uint8 [height, width, 3]"
            )
        pixels = np.ascontiguousarray(pixels)
        height, width, _ = pixels.shape
        return cls(height, width, hashlib.sha256(pixels.data).hexdigest(), pixels)

    def seen(self, area: int, *, enlarge: bool, multiple: int) -> tuple[int, int]:
        """(height, width) at about `area` pixels, of whole multiples; no larger than it is unless `enlarge`."""
        scale = math.sqrt(area / (self.height * self.width))
        if not enlarge:
            scale = min(scale, 1.0)
        height, width = (max(1, int(side * scale) // multiple) for side in (self.height, self.width))
        return height * multiple, width * multiple


@dataclass(frozen=True)
class Editing:
    """How a model takes pictures.

    Attributes:
        max_images: in one request; 0: none.
        needs_image: it makes nothing without one.
        default_strength: the first latents are the picture's, with so much of the noise, and steps start there. None:
            pictures are references, whose tokens stand beside those of the picture that is made.
        reference_pixels: a larger reference is made smaller, to about so many ...
        enlarges: ... and a smaller one larger.
    """

    max_images: int = 0
    needs_image: bool = False
    default_strength: float | None = None
    reference_pixels: int = 1024 * 1024
    enlarges: bool = False


NO_EDITING = Editing()
