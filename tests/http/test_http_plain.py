"""Plain HTTP/1.1 as proxies, monitors, browsers and other languages' standard clients speak it."""

from __future__ import annotations

import gzip
import http.client
import json
import zlib
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from http_app import PICTURE, URL, Cell, ask, check_error, ingress, listening, post
from ray._common.utils import import_attr
from uvicorn import config

from deployments.cluster_file import check_port
from deployments.config import AppArgs
from deployments.local import PROXY_CALLBACK
from tetriserve.errors import ConfigError, GenerationFailed

BODY = json.dumps(PICTURE).encode()
OFFER = {
    "Connection": "Upgrade, HTTP2-Settings",
    "Upgrade": "h2c",
    "HTTP2-Settings": "AAMAAABkAAQCAAAAAAIAAAAA",
}
"""What Java's HttpClient sends with every request, its body included."""


def offered(url: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request("POST", URL, BODY, {"Content-Type": "application/json", **OFFER})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_an_offer_of_http2_is_not_taken_and_the_request_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "HTTP_PROTOCOLS", dict(config.HTTP_PROTOCOLS))
    with listening(ingress(Cell())) as url:
        assert offered(url)[0] == 400  # what becomes of it without us
    assert import_attr(PROXY_CALLBACK)() == []
    with listening(ingress(Cell())) as url:
        status, body = offered(url)
        assert (status, body["size"]) == (200, "64x96")
        assert httpx.post(url + URL, json=PICTURE).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/", "/v1/nothing"])
def test_head_is_get_without_a_body(path: str) -> None:
    with listening(ingress(Cell())) as url:
        get, head = httpx.get(url + path), httpx.head(url + path)
    assert head.status_code == get.status_code
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]


def test_pages_of_other_origins_may_call_when_they_are_named() -> None:
    page = {"Origin": "https://studio.example"}
    asks = {
        **page,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    allowed = ingress(Cell(), cors_allow_origins=["https://studio.example"])
    assert ask(allowed, "OPTIONS", URL, headers=asks).status_code == 200
    for answer in (
        ask(allowed, "POST", URL, json=PICTURE, headers=page),
        ask(allowed, "POST", URL, json={**PICTURE, "stream": True}, headers=page),
        ask(allowed, "POST", URL, json={**PICTURE, "size": "1x1"}, headers=page),
        ask(allowed, "GET", "/v1/nothing", headers=page),
    ):
        assert answer.headers["Access-Control-Allow-Origin"] == "https://studio.example"
    for front, origin in ((allowed, "https://other.example"), (ingress(Cell()), "https://studio.example")):
        answer = ask(front, "POST", URL, json=PICTURE, headers={"Origin": origin})
        assert "Access-Control-Allow-Origin" not in answer.headers


def sent(body: bytes, **headers: str) -> httpx.Response:
    return ask(
        ingress(Cell()),
        "POST",
        URL,
        content=body,
        headers={k.replace("_", "-"): v for k, v in headers.items()},
    )


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (gzip.compress(BODY), {"Content_Encoding": "gzip"}),
        (zlib.compress(BODY), {"Content_Encoding": "deflate"}),
        (BODY, {"Content_Encoding": "identity"}),
        (BODY.decode().encode("utf-16"), {"Content_Type": "application/json; charset=utf-16"}),
        (BODY, {"Content_Type": 'application/json; charset="UTF-8"'}),
        (BODY, {"Content_Type": "text/plain"}),
    ],
)
def test_bodies_are_read_as_they_are_written(body: bytes, headers: dict[str, str]) -> None:
    assert sent(body, **headers).status_code == 200


def test_bodies_that_cannot_be_read_are_named() -> None:
    for body, headers, named in (
        (BODY, {"Content_Encoding": "br"}, "br"),
        (BODY, {"Content_Type": "application/json; charset=klingon"}, "klingon"),
    ):
        assert named in check_error(sent(body, **headers), 415, "unsupported_media_type")
    for body, headers, named in (
        (BODY, {"Content_Encoding": "gzip"}, "gzip"),
        (b"\xff\xfe\xff", {"Content_Type": "application/json; charset=utf-16"}, "utf-16"),
    ):
        assert named in check_error(sent(body, **headers), 400, "invalid_value", "body")
    bomb = gzip.compress(b" " * (1 << 25))
    check_error(sent(bomb, Content_Encoding="gzip"), 413, "body_too_large")


def test_what_changes_nothing_is_named() -> None:
    def ignored(**fields: Any) -> list[str]:
        answer = post(**PICTURE, **fields)
        return list(answer.json()["metrics"]["ignored"])

    assert ignored() == ignored(background="opaque", user="anna") == []
    nested = {"extra_body": {"sampler": 1, "slo_ms": 900}, "extra_args": {"num_steps": 3, "cache": True}}
    assert ignored(quality="hd", layers=4, **nested) == ["extra_args.cache", "layers", "quality", "sampler"]
    assert len(ignored(**{f"field{i}": i for i in range(100)})) == 32


def test_a_random_seed_may_be_asked_for_by_a_number() -> None:
    seeds = {post(**PICTURE, seed=-1).json()["metrics"]["seed"] for _ in range(3)}
    assert len(seeds) == 3 and min(seeds) >= 0


def test_the_form_of_results_may_be_configured() -> None:
    front = ingress(Cell(), response_format="url")
    assert "url" in ask(front, "POST", URL, json=PICTURE).json()["data"][0]
    assert (
        "b64_json"
        in ask(front, "POST", URL, json={**PICTURE, "response_format": "b64_json"}).json()["data"][0]
    )
    assert ask(front, "POST", URL, json={**PICTURE, "stream": True}).status_code == 200


def test_timings_are_in_the_header_of_the_standard() -> None:
    timing = post(**PICTURE).headers["Server-Timing"]
    stages = dict(entry.split(";dur=") for entry in timing.split(", "))
    assert list(stages) == ["total", "queue", "encode", "denoise", "decode"]
    assert (stages["queue"], stages["denoise"]) == ("100.0", "300.0")


def test_the_text_of_an_error_is_the_same_for_every_request() -> None:
    answers = [post(Cell(error=GenerationFailed("no luck")), **PICTURE) for _ in range(2)]
    assert len({check_error(answer, 500, "generation_failed") for answer in answers}) == 1
    assert len({answer.headers["X-Generation-Id"] for answer in answers}) == 2


def test_a_model_has_aliases() -> None:
    front = ingress(Cell())
    front.args = AppArgs.parse(
        {"model": {"path": "embedded", "aliases": ["gpt-image-1"]}, "cell": {"gpus": 2}}
    )
    models = ask(front, "GET", "/v1/models").json()["data"]
    assert [(model["id"], model["root"]) for model in models] == [
        ("lab/tiny", "lab/tiny"),
        ("gpt-image-1", "lab/tiny"),
    ]
    assert (models[0]["num_gpus"], models[0]["degrees"], models[0]["task_type"]) == (2, [1, 2], "T2I")
    assert ask(front, "GET", "/v1/models/gpt-image-1").json() | {"created": 0} == models[1] | {"created": 0}
    assert ask(front, "POST", URL, json={**PICTURE, "model": "gpt-image-1"}).json()["model"] == "lab/tiny"
    check_error(
        ask(front, "POST", URL, json={**PICTURE, "model": "dall-e-2"}), 404, "model_not_found", "model"
    )
    assert ask(front, "GET", "/v1/model_info").json()["model_path"] == "embedded"


def test_addresses_of_both_kinds_are_listened_on() -> None:
    check_port("::1", 0)
    check_port("127.0.0.1", 0)
    with pytest.raises(ConfigError, match="cannot listen on 2001:db8::1:80"):
        check_port("2001:db8::1", 80)
