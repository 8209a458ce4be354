"""Pictures by URL: what a link gives, to whom, for how long, and with several front processes."""

from __future__ import annotations

import asyncio
import io
import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from http_app import PICTURE, URL, Call, Cell, Method, Store, check_error, ingress, listening
from PIL import Image
from ray.exceptions import ActorDiedError

from deployments.config import AppArgs
from deployments.http.pictures import Picture, Pictures


def urls_of(base: str, **fields: Any) -> list[str]:
    answer = httpx.post(base + URL, json={**PICTURE, "response_format": "url", **fields}, timeout=30)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert all(item.keys() == {"url", "revised_prompt", "metrics"} for item in data)
    return [item["url"] for item in data]


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_a_url_gives_the_picture(output_format: str) -> None:
    with listening(ingress(Cell())) as base:
        urls = urls_of(base, n=2, output_format=output_format)
        assert len(set(urls)) == 2
        for url in urls:
            answer = httpx.get(url)
            assert (answer.status_code, answer.headers["content-type"]) == (200, f"image/{output_format}")
            assert answer.headers["cache-control"] == "private"
            image = Image.open(io.BytesIO(answer.content))
            assert (image.size, image.format) == ((64, 96), output_format.upper())


def test_a_url_is_good_without_a_key_and_only_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEYS", "first-key-0123456789")
    with listening(ingress(Cell(), api_keys_env="TEST_KEYS")) as base:
        headers = {"Authorization": "Bearer first-key-0123456789", "Idempotency-Key": "order"}
        body = {**PICTURE, "response_format": "url", "n": 2}
        posts = [httpx.post(base + URL, json=body, headers=headers).json()["data"] for _ in range(2)]
        urls = [urlsplit(item["url"]) for data in posts for item in data]
        tokens = [parse_qs(url.query)["token"][0] for url in urls]
        assert len(set(tokens)) == 4 and min(map(len, tokens)) >= 43  # 256 bits, new each time
        assert urls[0].path == urls[2].path
        assert all(httpx.get(url.geturl()).status_code == 200 for url in urls)
        for path in (
            urls[0].path,
            f"{urls[0].path}?token=",
            f"{urls[0].path}?token={tokens[1]}",  # of another picture
            f"{urls[0].path}?token={tokens[0][:-1]}",
            f"/v1/images/other/content?token={tokens[0]}",
        ):
            check_error(httpx.get(base + path), 404, "not_found", "token")


def test_a_url_expires() -> None:
    with listening(ingress(Cell(), url_ttl_s=0.5)) as base:
        (url,) = urls_of(base)
        assert httpx.get(url).status_code == 200
        time.sleep(0.6)
        check_error(httpx.get(url), 404, "not_found", "token")


def test_any_front_process_answers_for_any_url() -> None:
    """The store is one for all of them."""
    store = Store(AppArgs.parse({}))
    first, second = ingress(Cell(), store), ingress(Cell(), store, public_url="https://pictures.example/api/")
    with listening(first) as one, listening(second) as two:
        (url,) = urls_of(one)
        assert url.startswith(one) and httpx.get(url.replace(one, two)).status_code == 200
        (url,) = urls_of(two)
        assert url.startswith("https://pictures.example/api/v1/images/")
        assert httpx.get(url.replace("https://pictures.example/api", one)).status_code == 200


def test_the_oldest_go_first() -> None:
    async def run() -> None:
        pictures = Pictures(AppArgs.parse({"http": {"url_max_bytes": 1 << 20}}).http)
        half = Picture(b"x" * (1 << 19), "image/png")
        for number in range(5):
            await pictures.keep("p", str(number), half)
        held = [await pictures.get("p", str(number)) for number in range(5)]
        assert held == [None, None, None, half, half]
        await pictures.keep("p", "tiny", Picture(b"x", "image/png"))
        assert await pictures.get("p", "3") is None and await pictures.get("p", "4") is half

    asyncio.run(run())


def test_pictures_that_never_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.http.routes.encode_image", lambda *_: b"x" * 600_000)
    with listening(ingress(Cell(), url_max_bytes=1 << 20)) as base:
        answer = httpx.post(base + URL, json={**PICTURE, "response_format": "url", "n": 2})
        message = check_error(answer, 400, "invalid_value", "response_format")
        assert "1200000 bytes" in message and "1048576" in message and "b64_json" in message
        assert httpx.post(base + URL, json={**PICTURE, "response_format": "url"}).status_code == 200


def test_a_store_that_is_gone_or_silent_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.http.routes.STORE_TIMEOUT_S", 0.2)

    async def die(*_: Any) -> None:
        raise ActorDiedError()

    async def hang(*_: Any) -> None:
        await asyncio.sleep(60)

    for behaviour, status, code in ((die, 500, "generation_failed"), (hang, 503, "not_ready")):
        store = Store(AppArgs.parse({}))
        store.keep = store.get = Method(lambda *about, act=behaviour: Call(act(*about), lambda: None))
        with listening(ingress(Cell(), store)) as base:
            answer = httpx.post(base + URL, json={**PICTURE, "response_format": "url"})
            check_error(answer, status, code)
            check_error(httpx.get(f"{base}/v1/images/x/content?token=y"), status, code)
            assert httpx.post(base + URL, json=PICTURE).status_code == 200
