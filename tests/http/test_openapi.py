"""The server against its own OpenAPI document: what the document allows and what it does not, over real HTTP.

More cases than by default: `make fuzz`, or TETRISERVE_FUZZ_CASES cases for each route.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from hostile_pictures import HOSTILE, file_of
from http_app import INFO, PICTURE, URL, Cell, ingress, listening
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from schemathesis.config import SchemathesisConfig

from tetriserve.images import Editing

CASES = int(os.environ.get("TETRISERVE_FUZZ_CASES", "60"))
KEY = "fuzzing-key-0123456789"
TIMEOUT_S = 10.0
CONFIG = SchemathesisConfig.from_dict(
    {
        "generation": {"mode": "all"},
        "checks": {
            "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", 503]},
            # whether a picture can be made is the model's knowledge, so not all that the document allows is accepted
            "positive_data_acceptance": {"enabled": False},
            # and some of what it does not allow is: unknown fields, numbers written as text
            "negative_data_rejection": {"enabled": False},
        },
    }
)


os.environ["TETRISERVE_FUZZ_KEYS"] = KEY
KEYED = {"api_keys_env": "TETRISERVE_FUZZ_KEYS", "max_image_pixels": 1_000_000}
GROWTH_BYTES = 250 << 20
"""What a few thousand requests with pictures may leave in the server, most of it in caches of the first ones."""
HEADERS = {"Authorization": f"Bearer {KEY}"}


class Forgetful(Cell):
    """Its requests, with their pictures, are not kept."""

    async def _generate(self, request: Any) -> Any:
        result = await super()._generate(request)
        self.requests[:] = [replace(one, images=()) for one in self.requests[-50:]]
        return result


def cell() -> Cell:
    one = Forgetful()
    one.info = replace(INFO, editing=Editing(max_images=2, default_strength=0.6))
    return one


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    """Sound ones, hostile ones, and sound ones with some bytes changed."""
    content = draw(st.sampled_from([*HOSTILE.values(), *(file_of(kind) for kind in ("png", "jpeg", "webp"))]))
    if draw(st.booleans()) or not content:
        return content
    at = draw(st.integers(0, len(content) - 1))
    return content[:at] + draw(st.binary(max_size=4)) + content[at + draw(st.integers(0, 4)) :]


schemathesis.openapi.media_type("image/png", pictures(), aliases=["image/jpeg", "image/webp"])
schemathesis.openapi.format(
    "data-url", pictures().map(lambda one: "data:image/png;base64," + base64.b64encode(one).decode())
)
API = schemathesis.openapi.from_dict(
    ingress(cell(), **KEYED).__serve_build_asgi_app__().openapi(), config=CONFIG
)


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    """A server that is sound before and after."""
    patch = pytest.MonkeyPatch()
    patch.setattr(
        "deployments.router.ray.put", lambda pixels: pixels
    )  # the stand-in of a cell is in this process
    with listening(ingress(cell(), **KEYED)) as url:
        check_healthy(url)
        before = psutil.Process().memory_info().rss
        yield url
        check_healthy(url)
        assert psutil.Process().memory_info().rss - before < GROWTH_BYTES
    patch.undo()


def check_healthy(url: str) -> None:
    assert httpx.get(f"{url}/health").json()["status"] == "ready"
    assert httpx.post(url + URL, json=PICTURE, headers=HEADERS).status_code == 200


@API.parametrize()
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_server_is_what_its_document_says(base: str, case: schemathesis.Case) -> None:
    case.call_and_validate(base_url=base, headers=HEADERS, timeout=TIMEOUT_S)


def test_what_was_asked_can_be_forgotten_and_what_is_listed_is_there(base: str) -> None:
    """Requests in a row, along the document's links."""
    API.config.update(base_url=base)
    followed: set[str] = set()

    class Workflow(API.as_state_machine()):  # type: ignore[misc]
        def get_call_kwargs(self, case: schemathesis.Case) -> dict[str, Any]:
            return {"headers": HEADERS, "timeout": TIMEOUT_S}

        def before_call(self, case: schemathesis.Case) -> None:
            if isinstance(
                case.body, dict
            ):  # what this model does not have would let hardly any request through
                for field in ("lora", "guidance_scale_2"):
                    case.body.pop(field, None)

        def after_call(self, response: Any, case: schemathesis.Case) -> None:
            followed.add(f"{case.method} {case.path} {response.status_code}")

    run_state_machine_as_test(
        Workflow,
        settings=settings(
            max_examples=max(20, CASES // 20), deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert {f"DELETE {URL} 200", "GET /v1/models/{model_id} 200"} <= followed


def test_every_route_is_in_the_document_with_its_errors() -> None:
    paths = ingress(cell()).__serve_build_asgi_app__().openapi()["paths"]
    assert set(paths) == {
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/chat/completions",
        "/v1/images/{picture_id}/content",
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/model_info",
        "/v1/profile",
        "/v1/board",
        "/debug/timeline",
        "/metrics",
        "/health",
    }
    assert paths[URL]["post"]["responses"].keys() >= {"200", "400", "401", "404", "413", "500", "503"}
    assert paths[URL]["post"]["responses"]["200"]["content"].keys() == {
        "application/json",
        "text/event-stream",
    }
    assert paths[URL]["delete"]["responses"].keys() >= {"200", "401", "404", "500", "503"}
    for operations in paths.values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            for answer in operation["responses"].values():
                assert all(content["schema"] for content in answer["content"].values())
