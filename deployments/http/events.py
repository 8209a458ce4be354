"""Server-sent events of a streamed generation: OpenAI's, and how far the steps are."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

import numpy as np
from PIL import Image
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments.http.bodies import ImageRequest
from deployments.http.pictures import encode_image
from deployments.http.responses import NO_TOKENS, describe_error, metrics_body
from deployments.router import as_tetriserve_error
from tetriserve.errors import GenerationFailed
from tetriserve.request import GenerateRequest, GenerateResult, Progress

KEEPALIVE_S = 10.0
"""Nothing is silent for longer; proxies close connections that are, some after 30 s."""

KEEPALIVE = b": still there\n\n"

SQUARE = 4
"""Pixels along a side of what previews are made of; half of what a latent stands for."""

Said = tuple[int, Progress | GenerateResult | None]
"""Index of a picture and the news of it; None is a sign of life."""


async def newest(
    streams: Sequence[AsyncGenerator[Progress | GenerateResult, None]],
) -> AsyncGenerator[Said, None]:
    """What the streams of several pictures yield, as it comes; who is slow to take it gets the newest of each.

    A stream that fails ends all of them with its error. Closing this closes all of them.
    """
    unsaid: dict[int, Progress | GenerateResult] = {}
    changed = asyncio.Event()

    async def follow(picture: int, stream: AsyncGenerator[Progress | GenerateResult, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    before = unsaid.get(picture)
                    if isinstance(before, Progress) and isinstance(item, Progress) and item.preview is None:
                        item = dataclasses.replace(item, preview=before.preview)
                    unsaid[picture] = item
                    changed.set()
        finally:
            changed.set()

    tasks = [asyncio.create_task(follow(picture, stream)) for picture, stream in enumerate(streams)]
    try:
        while True:
            changed.clear()
            ended = [task for task in tasks if task.done()]
            for task in ended:
                if task.cancelled():  # not by us: the client still listens
                    raise GenerationFailed("the cell was stopped while it worked on this request")
                task.result()
            while unsaid:
                picture = next(iter(unsaid))
                yield picture, unsaid.pop(picture)
            if len(ended) == len(tasks):
                return
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), KEEPALIVE_S)
            if not changed.is_set():
                yield 0, None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def events(
    request: ImageRequest,
    response_id: str,
    requests: Sequence[GenerateRequest],
    first: Said,
    rest: AsyncGenerator[Said, None],
    answered: Callable[[int, GenerateResult], GenerateResult],
) -> AsyncGenerator[bytes, None]:
    """The body of a streamed answer.

    Args:
        requests: those of the single pictures.
        first, rest: what `newest` says of them.
        answered: the result of a picture as it leaves now.
    """
    sent = [0] * len(requests)
    shown_steps = [0] * len(requests)
    said: Said | None = first
    try:
        while said is not None:
            picture, item = said
            shape = requests[picture].shape
            about = {"id": response_id, "picture": picture}
            if isinstance(item, Progress):
                about |= _steps(item)
                # where a request had to start anew, its previews only go on where they had been
                if item.preview is not None and item.steps_done > shown_steps[picture]:
                    pixels = await asyncio.to_thread(_enlarged, item.preview, shape.width, shape.height)
                    more = about | {"partial_image_index": sent[picture]}
                    content = await _encoded(request, pixels)
                    yield _picture_event("partial_image", request, pixels.shape, content, more)
                    sent[picture] += 1
                    shown_steps[picture] = item.steps_done
                if request.progress:
                    more = {"phase": item.phase, "ahead": item.ahead}
                    yield _event(f"{request.events}.progress", about | more)
            elif isinstance(item, GenerateResult):
                steps = sum(part.steps for part in item.metrics.steps)
                about |= _steps(Progress(item.request_id, "decode", steps, steps, predicted_finish_s=0.0))
                content = await _encoded(request, item.image)
                more = about | {"usage": NO_TOKENS, "metrics": metrics_body(answered(picture, item).metrics)}
                yield _picture_event("completed", request, item.image.shape, content, more)
            else:
                yield KEEPALIVE
            said = await anext(rest, None)
    except Exception as error:
        _, body, _ = describe_error(as_tetriserve_error(error), response_id)
        yield _event("error", body)


class EventResponse(StreamingResponse):
    """An answer of events. When the client goes away, what is still made for it is given up at once."""

    media_type = "text/event-stream"

    def __init__(
        self, news: AsyncGenerator[Said, None], body: AsyncGenerator[bytes, None], headers: Mapping[str, str]
    ) -> None:
        # nginx holds answers back unless told
        super().__init__(body, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        self._news = news
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._news), aclosing(self._body):
            await super().__call__(scope, receive, send)


def _steps(progress: Progress) -> dict[str, Any]:
    finish_s = progress.predicted_finish_s
    return {"steps_done": progress.steps_done, "steps": progress.steps, "predicted_finish_s": finish_s}


async def _encoded(request: ImageRequest, pixels: np.ndarray) -> bytes:
    return await asyncio.to_thread(encode_image, pixels, request.output_format, request.encoder_quality)


def _picture_event(
    kind: str, request: ImageRequest, shape: tuple[int, ...], content: bytes, more: dict[str, Any]
) -> bytes:
    """One of OpenAI's two events, of a picture of `shape` [height, width, 3] as a file."""
    height, width = shape[:2]
    body = {
        "b64_json": base64.b64encode(content).decode(),
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": request.output_format,
        "quality": "auto",
        "size": f"{width}x{height}",
    }
    return _event(f"{request.events}.{kind}", body | more)


def _enlarged(preview: np.ndarray, width: int, height: int) -> np.ndarray:
    """At the picture's size, in squares of a few pixels: as a file that takes a third of the time and a fifth of the
    bytes of a smooth one."""
    smooth = Image.fromarray(preview).resize((width // SQUARE, height // SQUARE), Image.Resampling.BICUBIC)
    return np.asarray(smooth.resize((width, height), Image.Resampling.NEAREST))


def _event(kind: str, body: dict[str, Any]) -> bytes:
    # load testers (AIPerf) read what an error says from a comment beside it
    comment = f": {' '.join(body['error']['message'].split())}\n" if kind == "error" else ""
    return f"event: {kind}\n{comment}data: {json.dumps({'type': kind, **body})}\n\n".encode()
