"""`POST /v1/images/edits`: forms and JSON, what reaches the cell, pictures that are wrong or meant to do harm."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from hostile_pictures import HOSTILE, colors, file_of
from http_app import INFO, Cell, ask, check_error, ingress, listening
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deployments.http.pictures import read_image
from tetriserve.images import Editing, InputImage
from tetriserve.request import GenerateRequest

URL = "/v1/images/edits"
STARTS = replace(INFO, editing=Editing(max_images=1, default_strength=0.6))
LOOKS = replace(INFO, editing=Editing(max_images=3))


@pytest.fixture(autouse=True)
def no_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in of a cell is in this process."""
    monkeypatch.setattr("deployments.router.ray.put", lambda pixels: pixels)


def cell_of(info: Any = STARTS) -> Cell:
    cell = Cell()
    cell.info = info
    return cell


def url_of(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def form(cell: Cell, *files: tuple[str, bytes], limits: dict[str, Any] | None = None, **fields: Any) -> Any:
    parts = [(name, ("picture.png", content, "image/png")) for name, content in files]
    return ask(cell, "POST", URL, limits, data={"prompt": "a star", **fields}, files=parts)


def edited(cell: Cell) -> GenerateRequest:
    (request,) = cell.requests
    return request


WAYS: dict[str, Callable[[bytes], dict[str, Any]]] = {
    "image": lambda content: {"image": url_of(content)},
    "bare base64": lambda content: {"image": base64.b64encode(content).decode()},
    "list": lambda content: {"image": [url_of(content)]},
    "images": lambda content: {"images": [{"image_url": url_of(content)}]},
    "nested": lambda content: {"images": [{"type": "image_url", "image_url": {"url": url_of(content)}}]},
}


@pytest.mark.parametrize("way", WAYS)
def test_json_in_all_ways(way: str) -> None:
    cell, pixels = cell_of(), colors()
    answer = ask(cell, "POST", URL, json={"prompt": "a star", "seed": 1, **WAYS[way](file_of("png", pixels))})
    assert answer.status_code == 200, answer.text
    (image,) = edited(cell).images
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image == InputImage.of(pixels)


def test_a_form_has_the_fields_of_json() -> None:
    cell, pixels = cell_of(), colors()
    answer = form(
        cell,
        ("image", file_of("png", pixels)),
        n="1",
        size="64x96",
        seed="5",
        strength="0.25",
        slo_ms="2500",
        guidance_scale="2",
        user="",
        extra_args='{"priority": 3}',
    )
    assert answer.status_code == 200, answer.text
    asked = edited(cell)
    assert (asked.width, asked.height, asked.seed, asked.strength) == (64, 96, 5, 0.25)
    assert (asked.slo_s, asked.guidance_scale, asked.priority, asked.user) == (2.5, 2.0, 3, None)
    np.testing.assert_array_equal(asked.images[0].pixels, pixels)
    body = answer.json()
    assert body["size"] == "64x96"
    assert body["metrics"]["ignored"] == []


def test_openai_client_edits_one_and_several(tmp_path: Any) -> None:
    pictures = [file_of("png", colors(96, 128)), file_of("png", colors(80, 80))]
    cell = cell_of(LOOKS)
    with listening(ingress(cell)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        one = client.images.edit(image=pictures[0], prompt="a star", extra_body={"slo_ms": 3000, "seed": 4})
        several = client.images.edit(
            image=[("a.png", pictures[0]), ("b.png", pictures[1])], prompt="a star", size="auto"
        )
        events = list(client.images.edit(image=pictures[0], prompt="a star", stream=True))
        with pytest.raises(openai.BadRequestError, match="mask"):
            client.images.edit(image=pictures[0], mask=pictures[0], prompt="a star")
    first, second, third = cell.requests
    assert (first.slo_s, first.seed, len(first.images)) == (3.0, 4, 1)
    assert [(image.height, image.width) for image in second.images] == [(96, 128), (80, 80)]
    for made in (one, several):
        assert Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json))).size == (128, 96)
    assert len(third.images) == 1
    assert [event.type for event in events] == ["image_edit.completed"]


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((96, 128), (96, 128)),
        ((100, 130), (96, 128)),
        ((4000, 3000), (1184, 880)),  # 3:4 within a megapixel
        ((20, 30), (64, 80)),  # enlarged to what the model draws
        ((16, 3000), (16, 2048)),
    ],
)
def test_without_a_size_it_is_that_of_the_picture(size: tuple[int, int], shape: tuple[int, int]) -> None:
    cell = cell_of()
    answer = form(cell, ("image", file_of("png", np.zeros((*size, 3), np.uint8))))
    assert answer.status_code == 200, answer.text
    assert (edited(cell).height, edited(cell).width) == shape


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_any_picture_has_an_allowed_shape_like_it(height: int, width: int) -> None:
    for info in (INFO, STARTS, replace(INFO, size_multiple=32, max_side=512)):
        shape = info.shape_like(InputImage(height, width, "", None))
        assert info.why_not_shape(shape) is None


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[274] = orientation
    return data


def test_pictures_are_taken_as_they_are_seen() -> None:
    """Turned by EXIF, 16 bit, transparent, with a palette, in CMYK."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20] = 200
    turned = read_image(file_of("jpeg", pixels, exif=exif(6), quality=95), 10_000)
    assert turned.shape == (60, 40, 3)
    assert turned[:, 30:].min() > 180  # what was above is on the right
    assert turned[:, :10].max() < 20

    grey = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    assert set(read_image(file_of("png", grey), 100).flatten().tolist()) == {127}

    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert read_image(file_of("png", clear), 100).min() == 255  # not the red that is hidden in it
    palette = Image.fromarray(pixels).quantize()
    np.testing.assert_array_equal(read_image(file_of("png", palette), 10_000), pixels)
    cmyk = read_image(file_of("jpeg", Image.new("CMYK", (8, 8), (0, 255, 255, 0))), 100)
    assert (cmyk[0, 0, 0] > 240, cmyk[0, 0, 1] < 15, cmyk.shape) == (True, True, (8, 8, 3))


FORGIVEN = ("bomb", "no data", "wrong sum", "bomb of text")
"""What Pillow makes a picture of, or not, without harm."""


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_refused_by_name(name: str) -> None:
    cell = cell_of()
    limits = {"max_image_pixels": 1_000_000}
    answer = form(cell, ("image", HOSTILE[name]), limits=limits)
    if name in FORGIVEN and answer.status_code == 200:
        return
    message = check_error(answer, 400, "invalid_value", "image")
    assert len(message) < 120
    if name == "animated":
        assert "animated" in message
    if name in ("too large", "says 60000 x 60000"):
        assert "1000000 pixels are allowed" in message
    assert cell.requests == []


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_no_broken_file_is_worse_than_refused(data: st.DataObject) -> None:
    """Sound files with some bytes changed, cut out or doubled."""
    kind = data.draw(st.sampled_from(["png", "jpeg", "webp"]))
    content = bytearray(file_of(kind, colors(24, 24)))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        pixels = read_image(bytes(content), 10_000)
    except ValueError as error:
        assert str(error)
    else:
        assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
        assert pixels.size <= 30_000


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({}, "image", "required"),
        ({"image": 5}, "image", "data URL"),
        ({"image": "https://example.com/a.png"}, "image", "fetches no URLs"),
        ({"image": "data:image/png,abc"}, "image", "base64"),
        ({"image": "data:image/png;base64,!!!"}, "image", "not base64"),
        ({"image": [url_of(file_of("png", colors()))] * 5}, "image", "allowed are 1 to 4"),
        ({"image": [url_of(file_of("png", colors()))] * 2}, "image", "at most 1"),
        ({"image": url_of(file_of("png", colors())), "mask": "x"}, "mask", "fills in masks"),
        ({"image": url_of(file_of("png", colors())), "strength": 0}, "strength", "above 0"),
        ({"image": url_of(file_of("png", colors())), "strength": 1.5}, "strength", "up to 1"),
        ({"image": url_of(file_of("png", colors())), "prompt": None}, "prompt", "required"),
        ({"image": url_of(file_of("png", colors())), "size": "65x64"}, "size", "multiple of 16"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], param: str, says: str) -> None:
    cell = cell_of()
    answer = ask(cell, "POST", URL, json={"prompt": "a star", **fields})
    assert says in check_error(answer, 400, "invalid_value", param)
    assert cell.requests == []


def test_models_that_draw_from_text_alone_say_so() -> None:
    answer = form(cell_of(INFO), ("image", file_of("png", colors())))
    assert "takes none" in check_error(answer, 400, "invalid_value", "image")
    answer = form(cell_of(LOOKS), ("image", file_of("png", colors())), strength="0.5")
    assert "does not start" in check_error(answer, 400, "invalid_value", "strength")
    answer = form(cell_of(LOOKS), ("image", file_of("png", colors(64, 600))))
    assert "8 times" in check_error(answer, 400, "invalid_value", "image")
    needs = cell_of(replace(LOOKS, editing=Editing(max_images=1, needs_image=True)))
    answer = ask(needs, "POST", "/v1/images/generations", json={"prompt": "a star"})
    assert "required" in check_error(answer, 400, "invalid_value", "image")


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("multipart/form-data", b"--x\r\n\r\n"),
        ("multipart/form-data; boundary=x", b"nothing of that"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n"),
        ("application/json", b"[1]"),
        ("text/plain", b"hello"),
    ],
)
def test_bodies_that_are_no_form(kind: str, content: bytes) -> None:
    answer = ask(cell_of(), "POST", URL, content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] in ("body", "image")


def test_a_form_that_is_too_large_is_not_read() -> None:
    limits = {"max_upload_bytes": 4096}
    answer = form(cell_of(), ("image", b"\0" * 5000), limits=limits)
    check_error(answer, 413, "body_too_large")
    answer = form(cell_of(), *[("image[]", file_of("png", colors(8, 8)))] * 9, limits={"max_images": 2})
    assert answer.status_code == 400


def test_repeating_with_the_same_key_needs_the_same_picture() -> None:
    """By its digest: the router tells the cell, which compares."""
    one, other = GenerateRequest("a", images=[colors()]), GenerateRequest("a", images=[colors() // 2])
    assert one == GenerateRequest("a", images=[Image.fromarray(colors())])
    assert one != other
    assert one.without_pixels() == one


def test_models_name_their_task() -> None:
    def task(info: Any) -> str:
        return str(ask(cell_of(info), "GET", "/v1/models").json()["data"][0]["task_type"])

    assert [task(INFO), task(STARTS)] == ["T2I", "TI2I"]
    assert task(replace(INFO, editing=Editing(max_images=1, needs_image=True))) == "I2I"
    info = ask(cell_of(), "GET", "/v1/model_info").json()
    assert info["editing"]["default_strength"] == 0.6


def test_streams_name_edits() -> None:
    cell = cell_of()
    cell.pause_s = 0.05
    with listening(ingress(cell)) as url:
        fields = {
            "prompt": "a star",
            "image": url_of(file_of("png", colors())),
            "stream": True,
            "progress": True,
        }
        with httpx.stream("POST", url + URL, json=fields) as answer:
            kinds = [
                json.loads(line[6:])["type"] for line in answer.iter_lines() if line.startswith("data: ")
            ]
    assert kinds == ["image_edit.progress", "image_edit.completed"]
