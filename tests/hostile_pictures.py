"""Picture files: sound ones, and such as are wrong or meant to do harm."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def colors(height: int = 96, width: int = 128) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def file_of(kind: str, picture: np.ndarray | Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    if picture is None:
        picture = colors()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return PNG_HEAD + head + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def animated() -> bytes:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    return file_of("webp", frames[0], save_all=True, append_images=frames[1:])


HOSTILE = {
    "not a picture": b"hello",
    "empty": b"",
    "gif": file_of("gif", Image.new("RGB", (8, 8))),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "truncated png": file_of("png")[:2000],
    "truncated jpeg": file_of("jpeg")[:700],
    "head only": PNG_HEAD,
    "too large": file_of("png", np.zeros((2000, 2000, 3), np.uint8)),
    "says 60000 x 60000": png(60000, 60000, zlib.compress(b"\0" * 100)),
    "bomb": png(1000, 1000, zlib.compress(b"\0" * 50_000_000)),
    "bomb of text": png(
        8, 8, zlib.compress(b"\0" * 200), chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * (1 << 27)))
    ),
    "animated": animated(),
    "no data": png(8, 8, b""),
    "wrong sum": file_of("png").replace(b"IDAT", b"IDAX", 1),
}
