"""Streamed answers, with a stand-in for the cell: OpenAI's events, ours beside them, errors, hanging up."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from http_app import PICTURE, URL, Cell, check_error, hang_up, ingress, listening, post
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image
from ray.exceptions import ActorDiedError

from deployments.http import events
from tetriserve import errors
from tetriserve.request import GenerateRequest, GenerateResult, Progress

STREAM = {**PICTURE, "stream": True}


def preview(grey: int) -> np.ndarray:
    return np.full((12, 8, 3), grey, np.uint8)


def watched() -> Cell:
    """A cell with two previews on the way, slowly enough for all of it to be seen."""
    cell = Cell()
    cell.progress = [
        Progress("", "queue", 0, 8, 2.5),
        Progress("", "encode", 0, 8, 2.0),
        Progress("", "denoise", 3, 8, 1.5, preview(40)),
        Progress("", "denoise", 5, 8, 1.0),
        Progress("", "denoise", 8, 8, 0.5, preview(80)),
    ]
    cell.pause_s = 0.1
    return cell


def said(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of an answer."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    bodies = []
    for block in answer.text.split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        kind, *comment, data = block.split("\n")
        bodies.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {bodies[-1]['type']}"
        error = bodies[-1].get("error")  # load testers read its text from a comment
        assert comment == ([f": {error['message']}"] if error else [])
    return bodies


def opened(event: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(event["b64_json"])))


def test_events_are_those_of_openai_and_say_how_far_it_is() -> None:
    answer = post(watched(), **STREAM, partial_images=2, seed=5, slo_ms=2500, output_format="webp")
    first, second, done = said(answer)
    for event, model in ((first, ImageGenPartialImageEvent), (second, ImageGenPartialImageEvent)):
        model.model_validate(event, strict=True)
        assert abs(int(np.asarray(opened(event))[0, 0, 0]) - (40, 80)[event["partial_image_index"]]) < 3
    ImageGenCompletedEvent.model_validate(done, strict=True)
    assert [event["partial_image_index"] for event in (first, second)] == [0, 1]
    ours = [
        [event[name] for name in ("picture", "steps_done", "steps", "predicted_finish_s")]
        for event in (first, second, done)
    ]
    assert ours == [[0, 3, 8, 1.5], [0, 8, 8, 0.5], [0, 8, 8, 0.0]]
    assert {event["id"] for event in (first, second, done)} == {answer.headers["x-generation-id"]}
    for event in (first, second, done):
        assert (event["size"], event["output_format"]) == ("64x96", "webp")
        assert (opened(event).size, opened(event).format) == ((64, 96), "WEBP")
    alone = post(**PICTURE, seed=5, slo_ms=2500).json()
    for answer_s in (done["metrics"].pop("response_s"), alone["metrics"].pop("response_s")):
        assert 0 < answer_s < 60
    assert done["metrics"] == alone["metrics"]
    assert alone["metrics"]["predicted_s"] == 1.5


def test_progress_is_sent_when_asked_for() -> None:
    cell = watched()
    cell.progress = [Progress("", "denoise", 3, 8)]
    assert [event["type"] for event in said(post(cell, **STREAM))] == ["image_generation.completed"]
    cell = watched()
    progress = [
        e for e in said(post(cell, **STREAM, progress=True)) if e["type"] == "image_generation.progress"
    ]
    assert [(e["phase"], e["steps_done"], e["predicted_finish_s"]) for e in progress] == [
        ("queue", 0, 2.5),
        ("encode", 0, 2.0),
        ("denoise", 3, 1.5),
        ("denoise", 5, 1.0),
        ("denoise", 8, 0.5),
    ]
    assert cell.requests[0].previews == 0
    assert not any("b64_json" in event for event in progress)


def test_several_pictures_share_a_stream() -> None:
    cell = watched()
    done = said(post(cell, **STREAM, n=3, seed=1, partial_images=2))
    for picture in range(3):
        indexes = [event.get("partial_image_index") for event in done if event["picture"] == picture]
        assert indexes in ([0, None], [0, 1, None])  # three at once may be too many to show all of them
    seeds = {e["picture"]: e["metrics"]["seed"] for e in done if e["type"] == "image_generation.completed"}
    assert seeds == {0: 1, 1: 2, 2: 3}
    assert len({event["id"] for event in done}) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"partial_images": 1}, "partial_images"),
        ({"progress": True}, "progress"),
        ({"stream": True, "response_format": "url"}, "response_format"),
        ({"stream": True, "partial_images": 4}, "partial_images"),
        ({"stream": True, "partial_images": True}, "partial_images"),
        ({"stream": True, "partial_images": -1}, "partial_images"),
        ({"stream": "often"}, "stream"),
        ({"stream": True, "progress": 7}, "progress"),
        ({"extra_body": {"stream": True, "partial_images": 9}}, "partial_images"),
        ({"stream": True, "size": "63x64"}, "size"),
    ],
)
def test_what_makes_no_sense_is_refused_without_a_stream(fields: dict[str, Any], param: str) -> None:
    check_error(post(**{**PICTURE, **fields}), 400, "invalid_value", param)


def test_fields_in_extra_body() -> None:
    cell = watched()
    more = {"stream": True, "partial_images": 2, "progress": True}
    kinds = [event["type"][17:] for event in said(post(cell, **PICTURE, extra_body=more))]
    assert kinds.count("progress") == 5 and kinds.count("partial_image") == 2 and kinds[-1] == "completed"
    assert cell.requests[0].previews == 2


def test_an_error_before_the_stream_is_answered_and_one_in_it_is_an_event() -> None:
    cell = Cell(error=errors.DeadlineInfeasible("too late"))
    cell.progress = []
    check_error(post(cell, **STREAM), 503, "deadline_infeasible")
    cell = Cell(error=errors.GenerationFailed("out of memory"))
    cell.pause_s = 0.05
    (event,) = said(post(cell, **STREAM))
    assert event["error"].pop("request_id").startswith("img_")
    assert event == {
        "type": "error",
        "error": {
            "message": "out of memory",
            "type": "server_error",
            "param": None,
            "code": "generation_failed",
        },
    }


def test_the_first_failure_of_n_ends_the_stream_and_the_others() -> None:
    cell = Cell(error=errors.GenerationFailed("out of memory"), delay_s=0.2)
    done = said(post(cell, **STREAM, n=4))
    assert [event["type"] for event in done][-1] == "error"
    assert len(cell.cancelled) == 3


def test_a_lost_cell_shows_no_preview_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.router.RESUBMIT_PAUSE_S", 0.01)
    cell = watched()
    cell.losses = [ActorDiedError()]
    done = said(post(cell, **STREAM, partial_images=2, progress=True))
    indexes = [e["partial_image_index"] for e in done if "partial_image_index" in e]
    assert indexes == [0, 1]
    assert [e["steps_done"] for e in done if e["type"].endswith("progress")] == 2 * [0, 0, 3, 5, 8]


def test_headers_of_every_answer() -> None:
    headers = post(**PICTURE, slo_ms=1500).headers
    names = ("x-inference-time-s", "x-predicted-finish-s", "x-finish-s", "x-slo-s", "x-slo-met")
    said_s = [headers[name] for name in names]
    assert 0 < float(said_s.pop(2)) < 1.5  # the clock of the test, the others are the cell's
    assert said_s == ["0.9", "1.5", "1.5", "true"]
    answer = post(**PICTURE)
    assert answer.headers["x-generation-id"] == answer.json()["id"]
    assert "x-slo-s" not in answer.headers and "x-slo-met" not in answer.headers
    headers = post(watched(), **STREAM, slo_ms=1500).headers
    assert headers["x-slo-s"] == "1.5" and float(headers["x-predicted-finish-s"]) >= 2.5
    assert headers["cache-control"] == "no-cache" and "x-finish-s" not in headers


def test_silence_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEEPALIVE_S", 0.05)
    cell = Cell(delay_s=0.3)
    text = post(cell, **STREAM).text
    assert text.count(events.KEEPALIVE.decode()) >= 2
    cell = Cell(delay_s=0.3, error=errors.GenerationFailed("late"))
    cell.progress = []  # the stream begins with a sign of life
    cell.requests.append(GenerateRequest("x"))  # the first request of a slow cell goes well
    answer = post(cell, **STREAM)
    assert answer.text.startswith(events.KEEPALIVE.decode())
    assert said(answer)[-1]["error"]["message"] == "late"


def test_hanging_up_cancels_all_pictures() -> None:
    cell = Cell(delay_s=100)
    with listening(ingress(cell)) as base:
        with httpx.stream("POST", base + URL, json={**STREAM, "n": 2, "progress": True}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data:") and len(cell.requests) == 2:
                    break
        wait_for(lambda: len(cell.cancelled) == 2)
        assert set(cell.cancelled) == {request.request_id for request in cell.requests}


def test_hanging_up_before_the_first_event_cancels() -> None:
    cell = Cell(delay_s=100)
    cell.progress = []
    hang_up(cell, {**STREAM, "n": 2}, calls=2)
    assert len(cell.cancelled) == 2


def wait_for(condition: Any) -> None:
    end_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_slow_reader_gets_the_newest_and_no_preview_is_lost() -> None:
    async def run() -> None:
        gate = asyncio.Event()

        async def stream() -> Any:
            yield Progress("r", "encode", 0, 8)
            await gate.wait()
            for done in range(1, 8):
                yield Progress("r", "denoise", done, 8, None, preview(done) if done == 5 else None)
            await asyncio.sleep(0.05)
            yield GenerateResult("r", preview(0), 0.0, "m", None)  # type: ignore[arg-type]

        news = events.newest([stream()])
        got = [(await anext(news))[1]]
        gate.set()
        await asyncio.sleep(0.02)
        got += [item async for _, item in news]
        progress = [item for item in got if isinstance(item, Progress)]
        assert [item.steps_done for item in progress] == [0, 7]
        assert progress[1].preview is not None and progress[1].preview[0, 0, 0] == 5
        assert isinstance(got[-1], GenerateResult)

    asyncio.run(run())


def test_openai_client_streams() -> None:
    cell = watched()
    with listening(ingress(cell)) as base:
        client = openai.OpenAI(base_url=base + "/v1", api_key="none", max_retries=0)
        got = list(
            client.images.generate(
                prompt="a red circle",
                size="256x256",
                stream=True,
                partial_images=2,
                extra_body={"slo_ms": 5000, "seed": 1},
            )
        )
        assert [type(event) for event in got] == [ImageGenPartialImageEvent] * 2 + [ImageGenCompletedEvent]
        for event in got:
            assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).size == (256, 256)
        assert [event.partial_image_index for event in got[:2]] == [0, 1]
        assert got[-1].to_dict()["metrics"]["seed"] == 1
        with pytest.raises(openai.BadRequestError) as bad:
            list(client.images.generate(prompt="", size="256x256", stream=True))
        assert bad.value.param == "prompt"
        cell.error = errors.GenerationFailed("boom")
        with pytest.raises(openai.APIError, match="boom"):
            list(client.images.generate(prompt="x", size="256x256", stream=True))
