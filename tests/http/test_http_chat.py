"""Pictures by the chat route."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import pytest
from http_app import Cell, ask, check_error, ingress, listening
from openai import OpenAI
from PIL import Image

CHAT = "/v1/chat/completions"
SAID = [{"role": "system", "content": "paint"}, {"role": "user", "content": "a red circle"}]


def chat(cell: Cell | None = None, messages: Any = SAID, **fields: Any) -> httpx.Response:
    return ask(cell or Cell(), "POST", CHAT, json={"messages": messages, "size": "64x96", **fields})


def test_the_last_words_of_the_user_become_a_picture_in_the_answer() -> None:
    cell = Cell()
    parts = [{"type": "text", "text": "a blue"}, {"type": "text", "text": "star"}]
    messages = [*SAID, {"role": "assistant", "content": "done"}, {"role": "user", "content": parts}]
    wishes = {"num_inference_steps": 4, "seed": 7, "slo_ms": 1500, "negative_prompt": "grey", "fps": 8}
    answer = chat(cell, messages, extra_body=wishes, temperature=0.5, max_tokens=9)
    assert answer.status_code == 200, answer.text
    request = cell.requests[0]
    assert (request.prompt, request.num_inference_steps, request.seed) == ("a blue\nstar", 4, 7)
    assert (request.slo_s, request.negative_prompt) == (1.5, "grey")
    body = answer.json()
    assert (body["object"], body["model"], body["metrics"]["ignored"]) == (
        "chat.completion",
        "lab/tiny",
        ["fps"],
    )
    (choice,) = body["choices"]
    (part,) = choice["message"]["content"]
    assert part["stage_durations"] == body["metrics"]["stage_durations"]
    assert part["peak_memory_mb"] == body["metrics"]["peak_memory_mb"]
    head, data = part["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 96)
    assert answer.headers["X-Generation-Id"] == body["id"]


def test_several_pictures_are_several_choices() -> None:
    answer = chat(n=3, seed=5, output_format="webp").json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice in answer["choices"]:
        assert choice["message"]["content"][0]["image_url"]["url"].startswith("data:image/webp;base64,")


@pytest.mark.parametrize(
    ("messages", "fields", "named"),
    [
        (None, {}, "messages"),
        ([], {}, "messages"),
        (["x"], {}, "messages"),
        ([{"role": "system", "content": "x"}], {}, "messages"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], {}, "messages"),
        ([{"role": "user", "content": 5}], {}, "messages"),
        ([{"role": "user", "content": ""}], {}, "prompt"),
        (SAID, {"stream": True}, "stream"),
        (SAID, {"extra_body": {"num_frames": 17}}, "num_frames"),
        (SAID, {"size": "1x1"}, "size"),
    ],
)
def test_what_is_wrong_is_named(messages: Any, fields: dict[str, Any], named: str) -> None:
    check_error(chat(messages=messages, **fields), 400, "invalid_value", named)


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff"])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    check_error(ask(Cell(), "POST", CHAT, content=body), 400, "invalid_value", "body")


def test_the_openai_client_chats() -> None:
    messages: Any = SAID
    with listening(ingress(Cell())) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="unused")
        answer: Any = client.chat.completions.create(
            model="lab/tiny", messages=messages, extra_body={"size": "64x96", "slo_ms": 900}
        )
    assert answer.choices[0].message.content[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert answer.metrics["slo_s"] == 0.9
