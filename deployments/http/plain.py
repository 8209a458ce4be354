"""Plain HTTP/1.1, as proxies, monitors and the standard clients of all languages speak it: HEAD, offers to go on in
another protocol, bodies that are compressed or not in UTF-8."""

from __future__ import annotations

import codecs
import re
import zlib
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import config

from deployments.router import Router
from tetriserve.errors import InvalidRequest


def take_offers_as_requests() -> list[Any]:
    """Read requests with h11. uvicorn's other parser loses the body of a request that offers to go on in another
    protocol, as Java's standard client does with every one (`Upgrade: h2c`).

    Ray Serve's proxy, none of our deployments, calls this when it starts, where the environment says so
    (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH): `tetriserve serve` sets it, whoever runs a cluster does before
    `ray start`. Returns no middleware, for which Serve asks here.
    """
    config.HTTP_PROTOCOLS["auto"] = config.HTTP_PROTOCOLS["h11"]
    return []


class Counted:
    """Counts the requests that are being answered, for `Router.drain`."""

    def __init__(self, app: ASGIApp, router: Router) -> None:
        self._app, self._router = app, router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        one = int(scope["type"] == "http")  # and not the life of the whole app
        self._router.answering += one
        try:
            await self._app(scope, receive, send)
        finally:
            self._router.answering -= one


class HeadAsGet:
    """Answers HEAD as GET without its body, as HTTP has it and monitors ask."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, send_head)


async def read_body(http: Request, limit: int) -> bytes:
    """The whole body, in UTF-8 and as it was before it was compressed. Stops reading at `limit` bytes, whatever the
    Content-Length header claims."""
    too_large = HTTPException(413, f"the body is larger than {limit} bytes")
    claimed = http.headers.get("content-length", "")
    if claimed.isdecimal() and int(claimed[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async for chunk in http.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
    except ClientDisconnect:
        raise InvalidRequest("body", "the client went away while sending it") from None
    plain = _decompressed(bytes(body), http.headers.get("content-encoding", "identity"), limit)
    if plain is None:
        raise too_large
    kind, _, parameters = http.headers.get("content-type", "").partition(";")
    if kind.strip().lower() == "multipart/form-data":  # each part has its own
        return plain
    found = re.search(r"charset\s*=\s*\"?([\w.:-]+)", parameters, re.IGNORECASE)
    charset = "utf-8" if found is None else found[1]
    try:
        return plain if codecs.lookup(charset).name == "utf-8" else plain.decode(charset).encode()
    except LookupError:
        raise HTTPException(415, f"charset {charset[:40]} is not known, utf-8 is") from None
    except ValueError:
        raise InvalidRequest("body", f"is not {charset[:40]}, as Content-Type says") from None


def _decompressed(body: bytes, encoding: str, limit: int) -> bytes | None:
    """None when there are more than `limit` bytes in it."""
    if encoding.lower() in ("identity", ""):
        return body
    if encoding.lower() not in ("gzip", "x-gzip", "deflate"):
        raise HTTPException(
            415, f"Content-Encoding {encoding[:40]} is not taken, gzip, deflate and identity are"
        )
    unzip = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # by its head: gzip or zlib
    try:
        plain = unzip.decompress(body, limit + 1)
    except zlib.error:
        raise InvalidRequest("body", f"is not {encoding}, as Content-Encoding says") from None
    return plain if len(plain) <= limit else None
