"""HTTP in OpenAI's form over the router: which route leads where, and how requests, answers and errors look there."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import secrets
import time
import uuid
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match

from deployments.cell.meters import exposition
from deployments.config import AppArgs
from deployments.http import answers
from deployments.http.bodies import ImageRequest, picture_ids
from deployments.http.chat import CHAT_SCHEMA, chat_response, parse_chat
from deployments.http.edits import EDIT_BODY, parse_edit
from deployments.http.events import EventResponse, events, newest
from deployments.http.keys import Keys
from deployments.http.pictures import Picture, encode_image
from deployments.http.plain import Counted, HeadAsGet, read_body
from deployments.http.responses import (
    describe_error,
    error_body,
    generation_headers,
    image_response,
    model_body,
    result_headers,
)
from deployments.router import Router, as_tetriserve_error, translate, why_not_ready
from tetriserve import __version__
from tetriserve.errors import GenerationFailed, InvalidRequest, NotFound, NotReady, TetriserveError
from tetriserve.request import GenerateRequest, GenerateResult, Progress
from tetriserve.scheduler.history import KEPT_S
from tetriserve.simulation.timeline import timeline

STORE_TIMEOUT_S = 10.0

MAX_KEY_CHARS = 255

IDEMPOTENCY_KEY: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARS},
}

BoardSeconds = Annotated[int, Query(ge=1, le=300, description="How far back.")]
TimelineSeconds = Annotated[int, Query(ge=1, le=int(KEPT_S), description="How far back.")]

PAGE = StaticFiles(directory=Path(__file__).parent / "page")
PAGE_HEADERS = {
    "Cache-Control": "no-cache",  # a browser asks every time, with the ETag, whether it is still the same
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}


class Endpoints:
    """Turns HTTP requests into calls of the router and what comes back into responses."""

    def __init__(self, router: Router, pictures: DeploymentHandle, keys: Keys) -> None:
        self._router = router
        self._pictures = pictures
        self._keys = keys
        self._started_s = int(time.time())

    @property
    def _args(self) -> AppArgs:
        """As they are now: some of them change while this runs."""
        return self._router.args

    @property
    def has_keys(self) -> bool:
        return self._args.http.has_keys

    async def authorize(self, http: Request) -> None:
        """Let those with an API key in, everybody where none are configured; remember who it is and when it came."""
        http.state.client = None
        http.state.arrived_s = time.time()
        if self.has_keys:
            http.state.client = self._keys.owner(http.headers.get("authorization", ""))

    async def post_images(self, http: Request) -> Response:
        """`POST /v1/images/generations`."""
        body = await read_body(http, self._args.http.max_body_bytes)
        return await self._answer_with_images(ImageRequest.parse(body, self._args.http), http)

    async def post_edits(self, http: Request) -> Response:
        """`POST /v1/images/edits`."""
        body = await read_body(http, self._args.http.max_upload_bytes)
        request = await parse_edit(body, http.headers, self._args.http)
        info = await self._router.model_named(request.model)
        return await self._answer_with_images(request.like_its_picture(info), http)

    async def _answer_with_images(self, request: ImageRequest, http: Request) -> Response:
        response_id, requests = self._begun(request, http)
        if request.stream:
            return await self._streamed_images(request, response_id, requests)
        results, contents = await self._finished(request, requests)
        if request.response_format == "url":
            urls = await self._keep(results, contents, f"image/{request.output_format}", str(http.base_url))
            pictures = [{"url": url} for url in urls]
        else:
            pictures = [{"b64_json": base64.b64encode(content).decode()} for content in contents]
        results, slowest = self._leaving(request, requests, results)
        answer = image_response(request, response_id, results, slowest, pictures)
        return JSONResponse(answer, headers=result_headers(response_id, slowest.metrics))

    async def post_chat(self, http: Request) -> Response:
        """`POST /v1/chat/completions`."""
        request = parse_chat(await read_body(http, self._args.http.max_body_bytes), self._args.http)
        response_id, requests = self._begun(request, http)
        results, contents = await self._finished(request, requests)
        results, slowest = self._leaving(request, requests, results)
        answer = chat_response(request, response_id, results, slowest, contents)
        return JSONResponse(answer, headers=result_headers(response_id, slowest.metrics))

    def _begun(self, request: ImageRequest, http: Request) -> tuple[str, list[GenerateRequest]]:
        """The id of the response and its requests, with who sent them and when."""
        response_id, requests = self._identified(request, http)
        http.state.generation_id = response_id
        way_back_s = self._router.way_back.predict(request.output_format, requests[0].shape.pixels)
        edge = {"client": http.state.client, "arrived_s": http.state.arrived_s, "way_back_s": way_back_s}
        return response_id, [dataclasses.replace(one, **edge) for one in requests]

    async def _finished(
        self, request: ImageRequest, requests: list[GenerateRequest]
    ) -> tuple[list[GenerateResult], list[bytes]]:
        """Results and their files."""
        results = await self._generate_all(requests)
        contents = await asyncio.gather(
            *(
                asyncio.to_thread(encode_image, result.image, request.output_format, request.encoder_quality)
                for result in results
            )
        )
        return results, contents

    def _leaving(
        self, request: ImageRequest, requests: list[GenerateRequest], results: list[GenerateResult]
    ) -> tuple[list[GenerateResult], GenerateResult]:
        """The results as they leave now, and the slowest of them."""
        last = max(results, key=lambda result: result.created_s)
        left = [
            self._answered(request, one, result, is_last=result is last)
            for result, one in zip(results, requests, strict=True)
        ]
        return left, max(left, key=lambda result: result.metrics.total_s)

    def _answered(
        self, request: ImageRequest, one: GenerateRequest, result: GenerateResult, *, is_last: bool = True
    ) -> GenerateResult:
        """A result as it leaves here now, with all that changed nothing."""
        result = self._router.answered(result, one, request.output_format, is_last=is_last)
        ignored = (*result.metrics.ignored, *request.ignored)
        return dataclasses.replace(result, metrics=dataclasses.replace(result.metrics, ignored=ignored))

    async def _streamed_images(
        self, request: ImageRequest, response_id: str, requests: list[GenerateRequest]
    ) -> EventResponse:
        """Events, once there are any: what goes wrong before them is answered without a stream."""
        start_s = time.monotonic()
        news = newest([self._router.stream(one) for one in requests])
        first = await anext(news)
        finish_s: float | None = None
        if isinstance(first[1], Progress) and first[1].predicted_finish_s is not None:
            finish_s = time.monotonic() - start_s + first[1].predicted_finish_s
        seconds = {"X-SLO-S": requests[0].slo_s, "X-Predicted-Finish-S": finish_s}
        headers = generation_headers(response_id, seconds)

        def answered(picture: int, result: GenerateResult) -> GenerateResult:
            return self._answered(request, requests[picture], result)

        body = events(request, response_id, requests, first, news, answered)
        return EventResponse(news, body, headers)

    async def _keep(
        self, results: list[GenerateResult], encoded: list[bytes], media_type: str, base_url: str
    ) -> list[str]:
        """URLs of pictures; each is its own permission, which nobody can guess."""
        limit, size = self._args.http.url_max_bytes, sum(map(len, encoded))
        if size > limit:
            raise InvalidRequest(
                "response_format", f"{size} bytes of pictures, `url` holds {limit}: ask for b64_json"
            )
        urls = []
        for result, content in zip(results, encoded, strict=True):
            token = secrets.token_urlsafe()
            await self._stored(
                self._pictures.keep.remote(result.request_id, token, Picture(content, media_type))
            )
            base = (self._args.http.public_url or base_url).rstrip("/")
            urls.append(f"{base}/v1/images/{result.request_id}/content?token={token}")
        return urls

    async def _stored(self, call: Any) -> Any:
        """What the picture store answers. Raises `NotReady` when it does not."""
        try:
            return await asyncio.wait_for(call, STORE_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise NotReady("the store of pictures does not answer") from None
        except Exception as error:
            raise translate(error) from error

    async def get_picture(self, picture_id: str, token: str = "") -> Response:
        """`GET /v1/images/{id}/content`: the picture of a `url` result."""
        picture: Picture | None = await self._stored(self._pictures.get.remote(picture_id, token))
        if picture is None:
            raise NotFound("token", "no picture has this URL, or it has expired")
        return Response(picture.content, media_type=picture.media_type, headers={"Cache-Control": "private"})

    def _identified(self, request: ImageRequest, http: Request) -> tuple[str, list[GenerateRequest]]:
        """The id of the response and its requests. An `Idempotency-Key` makes both, and a missing seed, its own.

        So a repeated POST finds what it asked for, and where no cell remembers it gets an equal picture.
        """
        response_id, seed = _keyed(http)
        if response_id is None:
            response_id = f"img_{uuid.uuid4().hex}"
            return response_id, request.generate_requests(response_id)
        if request.seed is None:
            request = request.model_copy(update={"seed": seed})
        requests = request.generate_requests(response_id)
        return response_id, [dataclasses.replace(one, repeatable=True) for one in requests]

    async def delete_images(self, http: Request) -> JSONResponse:
        """`DELETE /v1/images/generations`: cancel what was posted under an `Idempotency-Key`, or forget it."""
        response_id, _ = _keyed(http)
        if response_id is None:
            raise InvalidRequest("Idempotency-Key", "required: it says which request to cancel")
        ids = {response_id, *picture_ids(response_id, self._args.http.max_n)}
        if not await self._router.delete(*ids):
            raise NotFound("Idempotency-Key", "no request under this key is running or kept")
        return JSONResponse({"id": response_id, "object": "image.generation.deleted", "deleted": True})

    async def get_models(self) -> JSONResponse:
        """`GET /v1/models`."""
        info = await self._router.model_info()
        names = (info.name, *self._args.model.aliases)
        data = [model_body(info, self._args, name, self._started_s) for name in names]
        return JSONResponse({"object": "list", "data": data})

    async def get_model(self, model_id: str) -> JSONResponse:
        """`GET /v1/models/{id}`."""
        info = await self._router.model_named(model_id)
        name = info.name if model_id == "default" else model_id
        return JSONResponse(model_body(info, self._args, name, self._started_s))

    async def get_model_info(self) -> JSONResponse:
        """`GET /v1/model_info`: name, task and limits of the model."""
        of_model = dataclasses.asdict(await self._router.model_info())
        return JSONResponse({"task": "image", "model_path": self._args.model.path, **of_model})

    async def get_metrics(self) -> Response:
        """`GET /metrics`: every cell that answers, as Prometheus reads it."""
        return Response(exposition(await self._router.numbered("metrics")), media_type=CONTENT_TYPE_LATEST)

    async def get_board(self, http: Request, seconds: BoardSeconds = 30) -> JSONResponse:
        """`GET /v1/board`: GPU x time of every cell that answers, as the owner of the key may see it."""
        cells = await self._router.numbered("board", seconds, http.state.client)
        return JSONResponse({"seconds": seconds, "cells": [{"cell": cell, **board} for cell, board in cells]})

    async def get_timeline(self, http: Request, seconds: TimelineSeconds = 60) -> JSONResponse:
        """`GET /debug/timeline`: the same past as trace events, for ui.perfetto.dev."""
        cells = await self._router.numbered("record", seconds, http.state.client)
        # tens of thousands of events
        return JSONResponse(await asyncio.to_thread(timeline, dict(cells)))

    async def get_page(self, http: Request, name: str = "index.html") -> Response:
        """`GET /` and `GET /page/{name}`: the form and the live board. They need no key, their data does."""
        response = await PAGE.get_response(name, http.scope)
        response.headers.update(PAGE_HEADERS)
        return response

    async def get_profile(self) -> JSONResponse:
        """`GET /v1/profile`: step times of a cell, corrected by what it measured, in the profile contract's form."""
        return JSONResponse((await self._router.profile()).to_body())

    async def get_health(self) -> JSONResponse:
        """`GET /health`: 200 when a cell can run steps."""
        try:
            statuses, reason = await self._router.statuses(), ""
        except TetriserveError as error:
            statuses, reason = [], error.message
        ready = any(status.ready for status in statuses)
        body = {
            "status": "ready" if ready else "not_ready",
            "reason": "" if ready else reason or why_not_ready(statuses),
            "cells": [dataclasses.asdict(status) for status in statuses],
        }
        headers = {} if ready else {"Retry-After": "1"}
        return JSONResponse(body, status_code=200 if ready else 503, headers=headers)

    async def _generate_all(self, requests: list[GenerateRequest]) -> list[GenerateResult]:
        """All pictures of one HTTP request at once. The first failure cancels the others."""
        tasks = [asyncio.create_task(self._router.generate(request)) for request in requests]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            failed = [task for task in tasks if task.done() and (task.cancelled() or task.exception())]
            if failed and failed[0].cancelled():  # not by us: the client still waits for an answer
                raise GenerationFailed("the cell was stopped while it worked on this request")
            return [task.result() for task in failed or tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def build_http(router: Router, pictures: DeploymentHandle, keys: Keys) -> FastAPI:
    """The HTTP app over a router; every error leaves it in OpenAI's shape.

    Args:
        pictures: handle of the Pictures deployment.
        keys: the allowed API keys; asked where some are configured.
    """
    endpoints = Endpoints(router, pictures, keys)
    app = FastAPI(
        title="tetriserve", version=__version__, generate_unique_id_function=lambda route: route.name
    )
    keyed = [Depends(endpoints.authorize)]
    if endpoints.has_keys:  # only to say so in the document
        keyed.append(Depends(HTTPBearer(auto_error=False)))
    of_images = {"application/json": {"schema": ImageRequest.model_json_schema()}}
    of_chat = {"application/json": {"schema": CHAT_SCHEMA}}
    for path, post, content, responses in (
        ("/v1/images/generations", endpoints.post_images, of_images, answers.IMAGES),
        ("/v1/images/edits", endpoints.post_edits, EDIT_BODY, answers.EDITS),
        ("/v1/chat/completions", endpoints.post_chat, of_chat, answers.CHAT),
    ):
        body = {"content": content, "required": True}
        app.add_api_route(
            path,
            post,
            methods=["POST"],
            response_model=None,
            openapi_extra={"requestBody": body, "parameters": [IDEMPOTENCY_KEY]},
            dependencies=keyed,
            responses=responses,
        )
    app.add_api_route(
        "/v1/images/generations",
        endpoints.delete_images,
        methods=["DELETE"],
        response_model=None,
        openapi_extra={"parameters": [IDEMPOTENCY_KEY | {"required": True}]},
        dependencies=keyed,
        responses=answers.DELETED,
    )
    for path, endpoint, responses in (
        ("/v1/models", endpoints.get_models, answers.MODELS),
        ("/v1/models/{model_id:path}", endpoints.get_model, answers.MODEL),
        ("/v1/model_info", endpoints.get_model_info, answers.MODEL_INFO),
        ("/v1/profile", endpoints.get_profile, answers.PROFILE),
        ("/v1/board", endpoints.get_board, answers.BOARD),
        ("/debug/timeline", endpoints.get_timeline, answers.TIMELINE),
    ):
        app.add_api_route(
            path, endpoint, methods=["GET"], response_model=None, dependencies=keyed, responses=responses
        )
    app.add_api_route(
        "/metrics",
        endpoints.get_metrics,
        methods=["GET"],
        response_class=Response,
        response_model=None,
        dependencies=keyed,
        responses=answers.METRICS,
    )
    # browsers ask for a picture without a key: its URL is the permission
    app.add_api_route(
        "/v1/images/{picture_id}/content",
        endpoints.get_picture,
        methods=["GET"],
        response_class=Response,
        response_model=None,
        responses=answers.PICTURE,
    )
    for path in ("/", "/page/{name}"):
        app.add_api_route(path, endpoints.get_page, methods=["GET", "HEAD"], include_in_schema=False)
    # load balancers ask without a key; it says how the cells are, not what they do
    app.add_api_route(
        "/health", endpoints.get_health, methods=["GET"], response_model=None, responses=answers.HEALTH
    )
    app.add_middleware(HeadAsGet)
    app.add_middleware(Counted, router=router)
    if origins := router.args.http.cors_allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_exception_handler(TetriserveError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_wrong_parameter)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_error)
    return app


async def _on_error(http: Request, error: Exception) -> JSONResponse:
    generation_id = getattr(http.state, "generation_id", None)
    status, body, headers = describe_error(as_tetriserve_error(error), generation_id)
    return JSONResponse(body, status_code=status, headers=headers)


async def _on_wrong_parameter(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return await _on_error(http, InvalidRequest(str(first["loc"][-1]), first["msg"]))


async def _on_http_error(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message, headers = error.detail, error.headers
    if error.status_code == 404:
        message = f"no route {http.url.path}"
    elif error.status_code == 405:
        message = f"{http.method} is not allowed on {http.url.path}"
        # Starlette names only the methods of the first of a path's routes
        routes = [route for route in http.app.routes if route.matches(http.scope)[0] is not Match.NONE]
        headers = {"Allow": ", ".join(sorted({method for route in routes for method in route.methods}))}
    body = error_body(message, "invalid_request_error", HTTP_CODES.get(error.status_code, "bad_request"))
    return JSONResponse(body, status_code=error.status_code, headers=headers)


def _keyed(http: Request) -> tuple[str | None, int]:
    """(id of the response, seed) that belong to the `Idempotency-Key` of a request; (None, 0) without one."""
    key = http.headers.get("idempotency-key")
    if key is None:
        return None, 0
    if not 0 < len(key) <= MAX_KEY_CHARS:
        raise InvalidRequest("Idempotency-Key", f"must have 1 to {MAX_KEY_CHARS} characters")
    # the keys of one client mean nothing to another
    client = http.headers.get("authorization", "")
    digest = hashlib.sha256(f"{client}\n{key}".encode()).hexdigest()
    return f"img_{digest[:32]}", int(digest[32:39], 16)
