"""Calls of a server's HTTP API: pictures written to files, and what a running cell knows of its step times."""

from __future__ import annotations

import base64
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tetriserve.errors import TetriserveError
from tetriserve.profile import Profile

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""Output formats of the server, by file suffix."""

CONNECT_TIMEOUT_S = 10.0

KEY_VARIABLE = "TETRISERVE_API_KEY"


def key_headers() -> dict[str, str]:
    """The headers with the caller's API key, from the environment: arguments show in process lists."""
    key = os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


class ServerError(TetriserveError):
    """The server could not be reached or answered with an error; one line says which."""


def generate(url: str, body: dict[str, Any], out: Path) -> list[str]:
    """Ask the server at `url` for pictures and write them.

    Args:
        url: base URL, without /v1.
        body: of `POST /v1/images/generations`, without `output_format`.
        out: file of the picture; several pictures get "-0", "-1", ... before the suffix, which must be one
            of `FORMATS`.

    Returns the lines to print. Raises `ServerError`.
    """
    start_s = time.monotonic()
    with _spinner("waiting for the picture"):
        answer = _ask(
            "POST", url, "/v1/images/generations", body | {"output_format": FORMATS[out.suffix.lower()]}
        )
    if not isinstance(answer, dict) or "data" not in answer:
        raise ServerError(f"{url} is not a tetriserve server")
    elapsed_s = time.monotonic() - start_s
    lines = []
    for index, item in enumerate(answer["data"]):
        file = out if len(answer["data"]) == 1 else out.with_stem(f"{out.stem}-{index}")
        try:
            file.write_bytes(base64.b64decode(item["b64_json"]))
        except OSError as error:
            raise ServerError(f"cannot write {file}: {error.strerror}") from None
        lines += describe(str(file), answer["size"], elapsed_s, item["metrics"])
    return lines


def describe(file: str, size: str, elapsed_s: float, metrics: dict[str, Any]) -> list[str]:
    """What became of one picture: file, seconds seen from here, deadline, and its path over the GPUs."""
    deadline = "no deadline"
    if metrics["slo_s"] is not None:
        outcome = "met" if metrics["slo_met"] else "missed"
        deadline = f"deadline {metrics['slo_s']:.3g} s {outcome}"
    path = " -> ".join(
        f"{part['steps']} steps SP{part['degree']} [{','.join(map(str, part['gpus']))}]"
        for part in metrics["steps"]
    )
    return [f"{file}  {size}  seed {metrics['seed']}  {elapsed_s:.2f} s  {deadline}", f"  {path}"]


def live_profile(url: str) -> Profile:
    """The step times that the server at `url` has measured. Raises `ServerError`."""
    try:
        return Profile.from_body(_ask("GET", url, "/v1/profile"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(f"{url} is not a tetriserve server: {error!r}") from None


def _ask(method: str, url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The server's JSON answer. Raises `ServerError`."""
    # a request without a deadline may wait as long as the queue is: no read timeout
    timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
    try:
        response = httpx.request(
            method, f"{url.rstrip('/')}{path}", json=body, headers=key_headers(), timeout=timeout
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"no answer from {url}: {str(error) or type(error).__name__}") from None
    try:
        answer = response.json()
    except ValueError:
        raise ServerError(f"{url} answered {response.status_code}, not with JSON") from None
    if response.status_code != 200:
        detail = answer.get("error", {}).get("message") if isinstance(answer, dict) else None
        raise ServerError(f"{url} answered {response.status_code}: {detail or response.reason_phrase}")
    return answer


@contextmanager
def _spinner(label: str) -> Iterator[None]:
    """Seconds counting up on stderr while the block runs; nothing when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    start_s = time.monotonic()

    def spin() -> None:
        for mark in itertools.cycle("|/-\\"):
            print(f"\r{mark} {label} {time.monotonic() - start_s:.1f} s", end="", file=sys.stderr, flush=True)
            if done.wait(0.1):
                return

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
