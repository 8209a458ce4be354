"""Pictures as files, and those behind URLs: one small store for all ingress replicas, so that each of them can
answer for any URL."""

from __future__ import annotations

import io
import time
import warnings
from dataclasses import dataclass
from logging import DEBUG
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from deployments.config import HTTPArgs
from deployments.logs import log_request


def encode_image(pixels: np.ndarray, output_format: str, quality: int) -> bytes:
    """A picture, uint8 [height, width, 3], as a file; `quality` in percent, for jpeg and webp. Slow enough to need a
    thread."""
    # level 1 takes half the time of the default level for 15 % more bytes (1024x1024)
    options: dict[str, Any] = {"compress_level": 1} if output_format == "png" else {"quality": quality}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=output_format, **options)
    return file.getvalue()


READ = ("PNG", "JPEG", "WEBP")
"""Pillow's other formats are not let near what strangers send."""


def read_image(content: bytes, max_pixels: int) -> np.ndarray:
    """A file's picture, uint8 [height, width, 3]: upright, on white where it is transparent. Raises ValueError saying
    what is wrong with it. Slow enough to need a thread."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # looks at the head only; what it says of the size is checked before anything is unpacked
            image: Image.Image = Image.open(io.BytesIO(content), formats=READ)
            _check_head(image, max_pixels)
            image = ImageOps.exif_transpose(image)
            return np.asarray(_in_rgb(image))
    except Image.DecompressionBombError:  # so large that Pillow does not even open it
        raise ValueError(f"at most {max_pixels} pixels are allowed") from None
    except UnidentifiedImageError:
        raise ValueError(f"not a picture in {', '.join(READ)}") from None
    except (_Refused, MemoryError):
        raise
    except Exception as error:  # of Pillow's decoders, on what is broken, whatever they raise
        raise ValueError(f"a broken file: {type(error).__name__}") from None


class _Refused(ValueError):
    """A sound picture, but not one that is taken."""


def _check_head(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise _Refused(f"{image.width}x{image.height}, at most {max_pixels} pixels are allowed")
    if getattr(image, "n_frames", 1) > 1:
        raise _Refused("it is animated, one picture is allowed")


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bit grey, which Pillow would only cut off
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 0xFFFF) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colors = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Picture:
    """An encoded picture and what it is encoded as, for example "image/png"."""

    content: bytes
    media_type: str


class Pictures:
    """Serve deployment of one replica. Keeps each picture for `url_ttl_s` and all of them within `url_max_bytes`,
    the oldest go first. What it held is gone when its process dies: a URL is no archive."""

    def __init__(self, http: HTTPArgs) -> None:
        self._ttl_s = http.url_ttl_s
        self._max_bytes = http.url_max_bytes
        self._kept: dict[tuple[str, str], tuple[float, Picture]] = {}
        self._bytes = 0

    async def keep(self, picture_id: str, token: str, picture: Picture) -> None:
        """Have a picture for whoever knows its id and its token."""
        self._kept[picture_id, token] = (time.monotonic() + self._ttl_s, picture)
        self._bytes += len(picture.content)
        log_request(DEBUG, picture_id, "has a picture to be fetched")
        self._forget()

    async def get(self, picture_id: str, token: str) -> Picture | None:
        """The picture; None when there is none, or none any more."""
        self._forget()
        return self._kept.get((picture_id, token), (0.0, None))[1]

    def _forget(self) -> None:
        now_s = time.monotonic()
        while self._kept:
            oldest = next(iter(self._kept))  # all have the same time to live
            until_s, picture = self._kept[oldest]
            if until_s > now_s and self._bytes <= self._max_bytes:
                return
            del self._kept[oldest]
            self._bytes -= len(picture.content)
            log_request(DEBUG, oldest[0], "has its picture forgotten")
