"""Pictures as files, and those behind URLs: one small store for all ingress replicas, so that each of them can
answer for any URL."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from logging import DEBUG
from typing import Any

import numpy as np
from PIL import Image

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
