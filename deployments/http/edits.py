"""`POST /v1/images/edits`: pictures to be edited come as files of a form, or as data URLs in JSON."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, Mapping
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from deployments.config import HTTPArgs
from deployments.http.bodies import ImageRequest, Number, json_object
from deployments.http.pictures import read_image
from tetriserve.errors import InvalidRequest
from tetriserve.images import InputImage
from tetriserve.model_info import ModelInfo

PICTURES = ("image", "image[]", "images")
"""Fields that hold pictures, one or a list."""

PICTURE_TYPES = "image/png, image/jpeg, image/webp"

MAX_FIELDS = 200
"""Of a form."""


class EditRequest(ImageRequest):
    """Body of `POST /v1/images/edits`, beside the pictures."""

    events: ClassVar[str] = "image_edit"

    size: str | None = Field(
        None,
        description='"WIDTHxHEIGHT"; absent or "auto": like the first picture.',
        json_schema_extra=ImageRequest.model_fields["size"].json_schema_extra,
    )
    strength: Number | None = Field(
        None,
        description="How much is made anew, by models that start from the picture.",
        json_schema_extra={"exclusiveMinimum": 0, "maximum": 1},
    )
    _images: tuple[InputImage, ...] = PrivateAttr(())

    def like_its_picture(self, info: ModelInfo) -> EditRequest:
        """With a size, where it says none: that of the first picture as far as the model allows it."""
        if self.width is not None or self.height is not None or self.size is not None or not self._images:
            return self
        shape = info.shape_like(self._images[0])
        return self.model_copy(update={"size": f"{shape.width}x{shape.height}"})

    def _more(self) -> dict[str, Any]:
        return {"images": self._images, "strength": self.strength}


_FIELDS = EditRequest.model_json_schema()
_SENT = {"type": "string", "format": "data-url", "description": "A data URL, or base64 alone."}
_FILE = {"type": "string", "format": "binary", "description": "PNG, JPEG or WebP."}
_NESTED = {"type": "object", "properties": {"image_url": _SENT}, "required": ["image_url"]}


def _with_pictures(**pictures: Any) -> dict[str, Any]:
    return {**_FIELDS, "properties": _FIELDS["properties"] | pictures}


EDIT_BODY = {
    "multipart/form-data": {
        "schema": _with_pictures(**{"image": _FILE, "image[]": {"type": "array", "items": _FILE}}),
        "encoding": {name: {"contentType": PICTURE_TYPES} for name in ("image", "image[]")},
    },
    "application/json": {
        "schema": _with_pictures(
            image={"anyOf": [_SENT, {"type": "array", "items": _SENT}]},
            images={"type": "array", "items": _NESTED},
        )
    },
}
"""Of the request, for the OpenAPI document."""


async def parse_edit(body: bytes, headers: Headers, http: HTTPArgs) -> EditRequest:
    """Read a form or JSON, by its Content-Type. Raises `InvalidRequest` naming the first wrong field."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        fields, contents = await _of_form(body, headers, http)
    else:
        fields, contents = _of_json(body)
    if fields.pop("mask", None) is not None:
        raise InvalidRequest("mask", "no model here fills in masks: say in the prompt what is to change")
    if not contents:
        raise InvalidRequest("image", f"required: a picture in one of {', '.join(PICTURES)}")
    if len(contents) > http.max_images:
        raise InvalidRequest("image", f"{len(contents)} pictures, allowed are 1 to {http.max_images}")
    request = EditRequest.checked(fields, http)
    pixels = await asyncio.gather(
        *(asyncio.to_thread(_read, field, content, http) for field, content in contents)
    )
    request._images = tuple(pixels)
    return request


def _read(field: str, content: bytes, http: HTTPArgs) -> InputImage:
    try:
        return InputImage.of(read_image(content, http.max_image_pixels))
    except ValueError as error:
        raise InvalidRequest(field, str(error)) from None


async def _of_form(
    body: bytes, headers: Headers, http: HTTPArgs
) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    async def whole() -> AsyncGenerator[bytes, None]:
        yield body
        yield b""

    parser = MultiPartParser(
        headers,
        whole(),
        max_files=http.max_images + 1,
        max_fields=MAX_FIELDS,
        max_part_size=http.max_body_bytes,
    )
    parser.spool_max_size = len(body)  # what is in memory stays there
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:  # KeyError: without a boundary
        reason = error.message if isinstance(error, MultiPartException) else f"no form: {error}"
        raise InvalidRequest("body", reason) from None
    fields: dict[str, Any] = {}
    contents: list[tuple[str, bytes]] = []
    try:
        for name, value in form.multi_items():
            if not isinstance(value, str):
                if name in PICTURES:
                    contents.append((name, await value.read()))
                else:
                    fields[name] = "a file"
            elif name in PICTURES:
                contents.append((name, _of_text(name, value)))
            elif value:  # what a form leaves empty is absent
                fields[name] = value
    finally:
        await form.close()
    return fields, contents


def _of_json(body: bytes) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    fields = json_object(body, "neither a form nor JSON")
    contents = []
    for name in PICTURES:
        value = fields.pop(name, None)
        given = value if isinstance(value, list) else [] if value is None else [value]
        contents += [(name, _of_text(name, one)) for one in given]
    return fields, contents


def _of_text(name: str, value: Any) -> bytes:
    """A data URL or bare base64, alone or as OpenAI nests it: `{"image_url": ...}`, `{"image_url": {"url": ...}}`."""
    for key in ("image_url", "url"):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
    if not isinstance(value, str):
        raise InvalidRequest(name, "must be a data URL, or an object with one as image_url")
    head, comma, data = value.partition(",")
    if comma and not (head.startswith("data:") and head.endswith(";base64")):
        raise InvalidRequest(name, 'a data URL must begin with "data:image/...;base64,"')
    if not comma:
        data = value
        if value.startswith(("http:", "https:")):
            raise InvalidRequest(name, "this server fetches no URLs: send the picture itself, as a data URL")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(name, "not base64") from None
