"""Calls of a server's HTTP API: pictures written to files, and what a running cell knows of its step times."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx

from tetriserve.errors import TetriserveError
from tetriserve.profile import Profile

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""Output formats of the server, by file suffix."""

CONNECT_TIMEOUT_S = 10.0

SILENCE_TIMEOUT_S = 60.0
"""The server breaks its silence much sooner, however long the queue is."""

MAX_PREVIEWS = 3
"""What the API allows."""

KEY_VARIABLE = "TETRISERVE_API_KEY"

Explain = Callable[[Mapping[str, Any]], list[str]]
"""Lines about a picture's metrics. Raises KeyError for what is not in them."""


def key_headers() -> dict[str, str]:
    """The headers with the caller's API key, from the environment: arguments show in process lists."""
    key = os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def follows_environment(url: str) -> bool:
    """Whether a connection goes by the proxies and certificates of the environment: none within this machine does."""
    try:
        host = httpx.URL(url).host
        return host != "localhost" and not ip_address(host).is_loopback
    except (ValueError, httpx.InvalidURL):  # a name
        return True


class ServerError(TetriserveError):
    """The server could not be reached or answered with an error; one line says which."""


def generate(
    url: str, body: dict[str, Any], out: Path, preview: Path | None = None, *, explain: Explain | None = None
) -> list[str]:
    """Ask the server at `url` for pictures and write them; a bar of steps on stderr where that is a terminal.

    Args:
        url: base URL, without /v1.
        body: of `POST /v1/images/generations`, or with `image` of `POST /v1/images/edits`, without `output_format`
            and what concerns the stream.
        out: file of the picture; several pictures get "-0", "-1", ... before the suffix, which must be one
            of `FORMATS`.
        preview: file that each preview is written to as it comes, named in the same way; of the same format as `out`.
        explain: says of the metrics of a picture why each step range ran at its degree; None: nobody asked.

    Returns the lines to print. Raises `ServerError`.
    """
    from tqdm import tqdm

    start_s = time.monotonic()
    n = body.get("n", 1)
    stream = {"stream": True, "progress": True, "partial_images": MAX_PREVIEWS if preview else 0}
    lines: dict[int, list[str]] = {}
    steps_done = [0] * n
    with tqdm(desc="queue", unit="step", disable=None, leave=False) as bar:
        for event in _events(url, body | stream | {"output_format": FORMATS[out.suffix.lower()]}):
            picture = event["picture"]
            steps_done[picture] = event["steps_done"]
            bar.total = n * event["steps"]
            bar.n = sum(steps_done)
            finish_s = event["predicted_finish_s"]
            bar.set_postfix_str("" if finish_s is None else f"done in about {finish_s:.1f} s")
            kind = event["type"].partition(".")[2]
            if kind == "progress":
                bar.set_description(event["phase"])
            elif kind == "partial_image" and preview is not None:
                _write(_numbered(preview, picture, n), event)
            elif kind == "completed":
                file = _numbered(out, picture, n)
                _write(file, event)
                elapsed_s = time.monotonic() - start_s
                lines[picture] = describe(str(file), event["size"], elapsed_s, event["metrics"])
                if explain is not None:
                    try:
                        lines[picture] += explain(event["metrics"])
                    except KeyError as error:
                        raise ServerError(f"{url} does not say what --verbose needs: {error}") from None
    if len(lines) < n:
        raise ServerError(f"{url} ended the stream after {len(lines)} of {n} pictures")
    return [line for picture in range(n) for line in lines[picture]]


def _numbered(file: Path, picture: int, n: int) -> Path:
    return file if n == 1 else file.with_stem(f"{file.stem}-{picture}")


def _write(file: Path, event: dict[str, Any]) -> None:
    try:
        file.write_bytes(base64.b64decode(event["b64_json"]))
    except OSError as error:
        raise ServerError(f"cannot write {file}: {error.strerror}") from None


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
    lines = [f"{file}  {size}  seed {metrics['seed']}  {elapsed_s:.2f} s  {deadline}", f"  {path}"]
    cut = metrics.get("truncated")
    return [*lines, f"  too long, the end was not read: {', '.join(cut)}"] if cut else lines


def live_profile(url: str) -> Profile:
    """The step times that the server at `url` has measured. Raises `ServerError`."""
    with _answer("GET", url, "/v1/profile") as response:
        response.read()
    try:
        return Profile.from_body(response.json())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(f"{url} is not a tetriserve server: {error!r}") from None


def _events(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a streamed generation."""
    route = "/v1/images/edits" if "image" in body else "/v1/images/generations"
    with _answer("POST", url, route, body) as response:
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise ServerError(f"{url} is not a tetriserve server")
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ServerError(f"{url} gave up: {event['error']['message']}")
            if "picture" not in event:  # OpenAI's have none
                raise ServerError(f"{url} is not a tetriserve server")
            yield event


@contextmanager
def _answer(method: str, url: str, path: str, body: dict[str, Any] | None = None) -> Iterator[httpx.Response]:
    """The server's answer, not yet read. Raises `ServerError` when it is none or an error, and while it is read."""
    # a request may wait as long as the queue is, but even then the server gives signs of life
    timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S, read=SILENCE_TIMEOUT_S)
    route = f"{url.rstrip('/')}{path}"
    try:
        with httpx.stream(
            method,
            route,
            json=body,
            headers=key_headers(),
            timeout=timeout,
            trust_env=follows_environment(url),
        ) as response:
            if response.status_code != 200:
                response.read()
                raise ServerError(f"{url} answered {response.status_code}: {_reason(response)}")
            yield response
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        by = _named("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY") if follows_environment(url) else ""
        raise ServerError(f"no answer from {url}{by}: {str(error) or type(error).__name__}") from None
    except (OSError, ValueError) as error:  # what the environment names is not there, or no address
        names = ("SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        raise ServerError(f"cannot connect to {url}{_named(*names)}: {error}") from None


def _named(*names: str) -> str:
    """Those of the variables that are set, for whoever wonders why there is no connection."""
    found = [name for one in names for name in (one, one.lower()) if os.environ.get(name)]
    return f" (by way of {', '.join(found)})" if found else ""


def _reason(response: httpx.Response) -> str:
    """What an answer says of its error, in the server's words where it has some."""
    try:
        message: str = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase
    return message
