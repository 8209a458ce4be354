"""The server against its own OpenAPI document: what the document allows and what it does not, over real HTTP.

More cases than by default: `make fuzz`, or TETRISERVE_FUZZ_CASES cases for each route.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from http_app import PICTURE, URL, Cell, ingress, listening
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from schemathesis.config import SchemathesisConfig

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
KEYED = {"api_keys_env": "TETRISERVE_FUZZ_KEYS"}
HEADERS = {"Authorization": f"Bearer {KEY}"}
API = schemathesis.openapi.from_dict(
    ingress(Cell(), **KEYED).__serve_build_asgi_app__().openapi(), config=CONFIG
)


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    """A server that is sound before and after."""
    with listening(ingress(Cell(), **KEYED)) as url:
        check_healthy(url)
        yield url
        check_healthy(url)


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
    paths = ingress(Cell()).__serve_build_asgi_app__().openapi()["paths"]
    assert set(paths) == {
        "/v1/images/generations",
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
