"""The HTTP contract, with a stand-in for the cell: every row of it, odd inputs, and OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from http_app import PICTURE, READY, STARTING, URL, Cell, ask, check_error, hang_up, ingress, listening, post
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.http.bodies import ImageRequest
from deployments.http.pictures import encode_image
from deployments.logs import logger
from deployments.router import MAX_RESUBMISSIONS
from tetriserve import errors
from tetriserve.request import GenerateRequest, GenerateResult, Progress


def sent(**fields: Any) -> GenerateRequest:
    """The request that reaches the cell."""
    cell = Cell()
    answer = post(cell, **{**PICTURE, **fields})
    assert answer.status_code == 200, answer.text
    return cell.requests[0]


def test_response_has_every_field_of_the_contract() -> None:
    body = post(**PICTURE, seed=5, slo_ms=2500).json()
    assert body["id"].startswith("img_")
    assert body["created"] == 1700000000
    assert (body["size"], body["output_format"], body["model"]) == ("64x96", "png", "lab/tiny")
    assert body["inference_time_s"] == 0.9
    metrics = body["metrics"]
    assert metrics["stage_durations"] == {
        "queue": 0.1,
        "encode": 0.2,
        "denoise": 0.3,
        "decode": 0.4,
        "total": 1,
    }
    assert (metrics["slo_s"], metrics["slo_met"], metrics["seed"]) == (2.5, True, 5)
    assert metrics["steps"] == [
        {"steps": 6, "degree": 1, "gpus": [0]},
        {"steps": 2, "degree": 2, "gpus": [0, 1]},
    ]
    assert metrics["schedule"] == [
        {
            "kind": "denoise",
            "steps": 4,
            "gpus": [0],
            "start_s": 1700000000.0,
            "end_s": 1700000000.3,
            "others": 3,
            "shared_with": 0,
        }
    ]
    assert metrics["planned_with"] == {
        "encode_s": 0.2,
        "encode_image_s": 0.0,
        "step_s": {"1": 0.05, "2": 0.03},
        "decode_s": 0.4,
    }
    assert (metrics["ignored"], metrics["truncated"]) == ([], [])
    assert metrics["arrival_s"] == 1699999999.5
    assert metrics["lost"] == [{"kind": "denoise", "steps": 2, "gpus": [1], "noticed_s": 1700000000.1}]
    assert body["peak_memory_mb"] == metrics["peak_memory_mb"] == body["usage"]["peak_memory_mb"] == 3
    [item] = body["data"]
    assert item["revised_prompt"] is None
    assert item["metrics"] == metrics
    assert Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))).size == (64, 96)


@pytest.mark.parametrize(
    ("lora", "name", "scale"),
    [("ink", "ink", 1), ({"name": "ink"}, "ink", 1), ({"name": "pixel", "scale": -0.5}, "pixel", -0.5)],
)
def test_a_lora_is_chosen_by_name_and_scale(lora: Any, name: str, scale: float) -> None:
    request = sent(lora=lora)
    assert (request.lora, request.lora_scale) == (name, scale)


def test_a_lora_that_is_not_configured_is_told_the_others() -> None:
    message = check_error(post(**PICTURE, lora="oil"), 400, "invalid_value", "lora")
    assert message == "lora: 'oil' is not served, allowed are ink, pixel"


def test_no_deadline_is_reported_as_null() -> None:
    metrics = post(**PICTURE).json()["metrics"]
    assert metrics["slo_s"] is None
    assert metrics["slo_met"] is None
    assert 0 <= metrics["seed"] < 1 << 31


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, (1024, 1024)),
        ({"size": None}, (1024, 1024)),
        ({"size": "auto"}, (1024, 1024)),
        ({"size": "128x64"}, (128, 64)),
        ({"width": 128, "height": 64}, (128, 64)),
        ({"size": "256x256", "width": 128}, (128, 256)),
        ({"size": "256x256", "extra_body": {"size": "64x64", "height": 128}}, (256, 128)),
        ({"extra_body": '{"size": "64x128"}'}, (64, 128)),
    ],
)
def test_size(fields: dict[str, Any], size: tuple[int, int]) -> None:
    request = sent(**{"size": None, **fields})
    assert (request.width, request.height) == size


def test_fields_reach_the_cell() -> None:
    request = sent(
        num_inference_steps="12",
        guidance_scale=2.0,
        true_cfg_scale=4,
        negative_prompt="blur",
        user="me",
        seed=9,
        drop_late=True,
        priority=3,
        model="default",
        generator_device="cpu",
        stream=True,
    )
    assert (request.num_inference_steps, request.guidance_scale, request.true_cfg_scale) == (12, 2, 4)
    assert (request.negative_prompt, request.user, request.seed) == ("blur", "me", 9)
    assert (request.drop_late, request.priority, request.model) == (True, 3, "lab/tiny")


@pytest.mark.parametrize(
    ("fields", "slo_s"),
    [
        ({"slo_ms": 1500}, 1.5),
        ({"extra_body": {"slo_ms": 1500}}, 1.5),
        ({"extra_args": {"slo_ms": 1500}}, 1.5),
        ({"extra_args": '{"slo_ms": 1500}'}, 1.5),
        ({"extra_params": {"slo_ms": "1500"}}, 1.5),
        ({"extra_params": '{"slo_ms": 1500}'}, 1.5),
        ({"extra_body": {"extra_args": {"slo_ms": 1500}}}, 1.5),
        ({"slo_ms": 1, "extra_body": {"slo_ms": 2}}, 0.001),
        ({"extra_body": {"slo_ms": 2}, "extra_args": {"slo_ms": 3}}, 0.002),
        ({"extra_args": {"slo_ms": 3}, "extra_params": {"slo_ms": 4}}, 0.003),
        ({"slo_ms": None, "extra_params": {"slo_ms": 4}}, 0.004),
        ({"extra_args": {"runtime_v2_arrival_ms": 5000, "runtime_v2_deadline_ms": 7000}}, 2.0),
        ({"runtime_v2_arrival_ms": 5000, "runtime_v2_deadline_ms": 7000}, 2.0),
        ({"slo_ms": 1000, "runtime_v2_arrival_ms": 5000, "runtime_v2_deadline_ms": 7000}, 1.0),
        ({"runtime_v2_deadline_ms": 7000}, None),
        ({}, None),
    ],
)
def test_deadline_inputs(fields: dict[str, Any], slo_s: float | None) -> None:
    assert sent(**fields).slo_s == slo_s


def test_other_keys_of_extra_args() -> None:
    request = sent(extra_args={"num_steps": 20, "runtime_v2_priority": 2, "drop_late": True})
    assert (request.num_inference_steps, request.priority, request.drop_late) == (20, 2, True)
    assert sent().reject_infeasible is None  # the server's own setting
    assert sent(extra_args={"reject_infeasible": True}).reject_infeasible is True
    assert sent(reject_infeasible=False).reject_infeasible is False
    request = sent(num_inference_steps=10, priority=1, extra_args={"num_steps": 20, "runtime_v2_priority": 2})
    assert (request.num_inference_steps, request.priority) == (10, 1)


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_output_formats(name: str) -> None:
    body = post(**PICTURE, output_format=name, output_compression=80).json()
    image = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))
    assert (image.format, body["output_format"]) == (name.upper(), name)
    assert abs(int(np.asarray(image.convert("RGB")).mean()) - 128) < 3


def test_n_pictures_get_consecutive_seeds_and_their_own_metrics() -> None:
    cell = Cell(delay_s=0.01)
    body = post(cell, **PICTURE, n=3, seed=40).json()
    assert [request.seed for request in cell.requests] == [40, 41, 42]
    assert [item["metrics"]["seed"] for item in body["data"]] == [40, 41, 42]
    assert body["metrics"] == body["data"][2]["metrics"]  # the slowest
    assert len({request.request_id for request in cell.requests}) == 3


def test_first_failure_of_n_cancels_the_others() -> None:
    cell = Cell(error=errors.GenerationFailed("out of memory"), delay_s=0.2)
    message = check_error(post(cell, **PICTURE, n=4), 500, "generation_failed")
    assert message == "out of memory"
    assert len(cell.cancelled) == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 101}, "prompt"),
        ({"negative_prompt": "x" * 101}, "negative_prompt"),
        ({"size": "64"}, "size"),
        ({"size": "64x64x64"}, "size"),
        ({"size": "63x64"}, "size"),
        ({"size": "0x64"}, "size"),
        ({"size": "2048x2048"}, "size"),
        ({"width": -64}, "size"),
        ({"width": 10**30}, "width"),
        ({"width": True}, "width"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": 1.5}, "n"),
        ({"response_format": "file"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"output_quality": "best"}, "output_quality"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 201}, "num_inference_steps"),
        ({"num_inference_steps": True}, "num_inference_steps"),
        ({"guidance_scale": 21}, "guidance_scale"),
        ({"guidance_scale": True}, "guidance_scale"),
        ({"true_cfg_scale": -1}, "true_cfg_scale"),
        ({"guidance_scale_2": 2}, "guidance_scale_2"),
        ({"lora": "none"}, "lora"),
        ({"lora": {"scale": 1}}, "lora"),
        ({"lora": {"name": "ink", "scale": 11}}, "lora"),
        ({"lora": 5}, "lora"),
        ({"seed": -2}, "seed"),
        ({"background": "transparent"}, "background"),
        ({"seed": 2**63 - 1, "n": 2}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"slo_ms": 0}, "slo_ms"),
        ({"slo_ms": -5}, "slo_ms"),
        ({"slo_ms": "soon"}, "slo_ms"),
        ({"slo_ms": 10**400}, "slo_ms"),
        ({"drop_late": "perhaps"}, "drop_late"),
        ({"priority": 0.5}, "priority"),
        ({"extra_args": "{nope"}, "extra_args"),
        ({"extra_args": "[1]"}, "extra_args"),
        ({"extra_params": 5}, "extra_params"),
        ({"extra_body": [1]}, "extra_body"),
        ({"runtime_v2_arrival_ms": 9, "runtime_v2_deadline_ms": 9}, "runtime_v2_deadline_ms"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], param: str) -> None:
    message = check_error(post(**{**PICTURE, **fields}), 400, "invalid_value", param)
    assert message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"text"',
        b"[" * 5000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_malformed_bodies(body: bytes) -> None:
    check_error(ask(Cell(), "POST", URL, content=body), 400, "invalid_value", "body")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["guidance_scale", "slo_ms", "seed", "runtime_v2_deadline_ms"])
def test_numbers_that_are_none(field: str, number: str) -> None:
    body = json.dumps(PICTURE)[:-1] + f', "{field}": {number}}}'
    check_error(ask(Cell(), "POST", URL, content=body.encode()), 400, "invalid_value", field)


def test_body_limit_counts_what_is_read() -> None:
    cell, limits = Cell(), {"max_body_bytes": 2048}

    async def chunks() -> Any:  # no Content-Length
        for _ in range(100):
            yield b" " * 100

    check_error(ask(cell, "POST", URL, limits, content=chunks()), 413, "body_too_large")
    check_error(ask(cell, "POST", URL, limits, content=b" " * 2049), 413, "body_too_large")
    assert ask(cell, "POST", URL, limits, json=PICTURE).status_code == 200


def test_max_n_is_configurable() -> None:
    check_error(ask(Cell(), "POST", URL, {"max_n": 2}, json={**PICTURE, "n": 3}), 400, "invalid_value", "n")


def test_routes_that_do_not_exist() -> None:
    check_error(ask(Cell(), "GET", "/nope"), 404, "not_found")
    answer = ask(Cell(), "GET", URL)
    check_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "DELETE, POST"


def test_models() -> None:
    assert [entry["id"] for entry in ask(Cell(), "GET", "/v1/models").json()["data"]] == ["lab/tiny"]
    assert ask(Cell(), "GET", "/v1/models/lab/tiny").json()["object"] == "model"
    info = ask(Cell(), "GET", "/v1/model_info").json()
    assert (info["name"], info["task"], info["max_pixels"]) == ("lab/tiny", "image", 1024 * 1024)


def test_a_model_that_is_never_guided_says_so() -> None:
    cell = Cell()
    cell.info = replace(cell.info, cfg_above=None)
    assert ask(cell, "GET", "/v1/model_info").json()["cfg_above"] is None


def test_unknown_model() -> None:
    cell = Cell()
    check_error(post(cell, **PICTURE, model="dall-e-3"), 404, "model_not_found", "model")
    check_error(ask(cell, "GET", "/v1/models/dall-e-3"), 404, "model_not_found", "model")
    assert not cell.requests


def by_ray(error: Exception) -> Exception:
    """The error as it arrives through Ray."""
    return RayTaskError("generate", "Traceback ...", error).as_instanceof_cause()


@pytest.mark.parametrize("wrap", [lambda error: error, by_ray, lambda e: RayTaskError("generate", "...", e)])
@pytest.mark.parametrize(
    ("error", "status", "code", "headers"),
    [
        (errors.Overloaded("256 open", retry_after_s=4), 503, "queue_full", {"retry-after": "4"}),
        (errors.NotReady("a GPU is lost"), 503, "not_ready", {"retry-after": "1"}),
        (errors.DeadlineInfeasible("too late"), 503, "deadline_infeasible", {"x-should-retry": "false"}),
        (errors.GenerationFailed("out of memory"), 500, "generation_failed", {}),
    ],
)
def test_errors_of_the_cell(
    wrap: Callable[[Exception], Exception],
    error: errors.TetriserveError,
    status: int,
    code: str,
    headers: dict[str, str],
) -> None:
    cell = Cell(error=wrap(error))
    answer = post(cell, **PICTURE)
    assert check_error(answer, status, code) == error.message
    assert headers.items() <= dict(answer.headers).items()
    cell.error = None
    assert post(cell, **PICTURE).status_code == 200  # later requests are unaffected


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BackPressureError(9, 8), 503, "queue_full"),
        (DeploymentUnavailableError(None), 503, "not_ready"),
        (by_ray(ValueError("boom")), 500, "generation_failed"),
        (asyncio.CancelledError(), 500, "generation_failed"),
    ],
)
def test_errors_of_ray(error: BaseException, status: int, code: str) -> None:
    check_error(post(Cell(error=error), **PICTURE), status, code)


def test_a_refusal_names_the_deadline_that_could_be_kept() -> None:
    answer = post(Cell(error=by_ray(errors.DeadlineInfeasible("too late", 2.5))), **PICTURE)
    assert answer.status_code == 503 and answer.json()["error"]["earliest_slo_ms"] == 2500


def test_an_answer_counts_from_the_edge_to_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell had it in time and did not know how long the file takes: the answer does, and so do the next plans."""

    def slow(*about: Any) -> bytes:
        time.sleep(0.3)
        return encode_image(*about)

    monkeypatch.setattr("deployments.http.routes.encode_image", slow)
    cell = Cell()
    cell.created_s = time.time
    front = ingress(cell).__serve_build_asgi_app__()

    async def run() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://test") as client:
            asked = PICTURE | {"slo_ms": 200}
            return [(await client.post(URL, json=asked)).json()["metrics"] for _ in range(2)]

    first, second = asyncio.run(run())
    assert first["slo_met"] is False and 0.3 <= first["response_s"] < 5
    assert second["slo_met"] is False
    unknown_s, known_s = (request.way_back_s for request in cell.requests)
    assert unknown_s == 0 and 0.3 <= known_s < 5


def test_an_accepted_request_outlives_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell dies, the next one is still starting, then its scheduler fails: the fourth answers."""
    monkeypatch.setattr("deployments.router.RESUBMIT_PAUSE_S", 0.01)
    cell = Cell()
    cell.losses = [
        ActorDiedError(),
        by_ray(errors.NotReady("starting")),
        by_ray(errors.CellLost("no GPU is left")),
    ]
    assert post(cell, **PICTURE).status_code == 200
    assert len({(request.request_id, request.seed) for request in cell.requests}) == 1
    assert cell.requests[0].seed is not None
    assert [request.attempt for request in cell.requests] == [0, 1, 2, 3]
    assert len({request.arrived_s for request in cell.requests}) == 1  # its deadline does not move

    cell.losses = [errors.NotReady("starting")]  # never accepted: the client is told
    check_error(post(cell, **PICTURE), 503, "not_ready")

    async def streamed() -> list[Any]:
        request = GenerateRequest(prompt="x", height=64, width=64)
        return [type(item) async for item in ingress(cell).stream(request)]

    cell.losses = [ActorDiedError()]
    assert asyncio.run(streamed()) == [Progress, Progress, GenerateResult]


def test_a_request_that_takes_every_cell_with_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.router.RESUBMIT_PAUSE_S", 0.001)
    cell = Cell(error=ActorDiedError())
    check_error(post(cell, **PICTURE), 500, "generation_failed")
    assert len(cell.requests) == 1 + MAX_RESUBMISSIONS


def test_idempotency_key_names_the_request_and_its_seed() -> None:
    cell = Cell()

    def posted(key: str | None, **fields: Any) -> tuple[str, GenerateRequest]:
        headers = {} if key is None else {"Idempotency-Key": key}
        answer = ask(cell, "POST", URL, json={**PICTURE, **fields}, headers=headers)
        return answer.json()["id"], cell.requests[-1]

    first, again = posted("order-1"), posted("order-1")
    assert first[0] == again[0] and replace(again[1], arrived_s=0) == replace(first[1], arrived_s=0)
    assert first[1].repeatable and first[1].seed is not None
    assert posted("order-1", seed=5)[1].seed == 5
    assert posted("order-2")[0] != first[0]
    assert not posted(None)[1].repeatable
    posted("order-3", n=2)
    assert len({(r.request_id, r.seed) for r in cell.requests[-2:]}) == 2
    for key in ("", "k" * 256):
        headers = {"Idempotency-Key": key}
        check_error(
            ask(cell, "POST", URL, json=PICTURE, headers=headers), 400, "invalid_value", "Idempotency-Key"
        )


def test_delete_names_what_was_posted_under_a_key() -> None:
    cell = Cell()

    def delete(key: str | None, **headers: str) -> httpx.Response:
        return ask(
            cell, "DELETE", URL, headers=headers if key is None else {"Idempotency-Key": key, **headers}
        )

    for key, n in (("order-1", 1), ("order-2", 3)):
        assert delete(key).status_code == 404
        posted = ask(cell, "POST", URL, json={**PICTURE, "n": n}, headers={"Idempotency-Key": key})
        body = {"id": posted.json()["id"], "object": "image.generation.deleted", "deleted": True}
        assert (delete(key).status_code, delete(key).json()) == (200, body)
        check_error(delete(key, Authorization="Bearer another"), 404, "not_found", "Idempotency-Key")
    for nameless in (None, "", "k" * 256):
        check_error(delete(nameless), 400, "invalid_value", "Idempotency-Key")
    cell.deaf = [ConnectionError("gone")]
    assert delete("order-1").status_code == 200
    check_error(delete("order-3"), 500, "generation_failed")
    cell.deaf = [RayActorError()]
    check_error(delete("order-3"), 503, "not_ready")
    cell.silent = True
    check_error(delete("order-1"), 503, "not_ready")


KEYS = "first-key-0123456789, second-key-9876543210"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer first-key-0123456789", 200),
        ("bearer  second-key-9876543210 ", 200),
        ("Bearer first-key-012345678", 401),
        ("Bearer " + KEYS, 401),
        ("Bearer ", 401),
        ("Basic first-key-0123456789", 401),
        ("first-key-0123456789", 401),
        (b"Bearer \xff\xfe", 401),
    ],
)
def test_api_keys(monkeypatch: pytest.MonkeyPatch, header: str | bytes | None, status: int) -> None:
    monkeypatch.setenv("TEST_KEYS", KEYS)
    cell, http = Cell(), {"api_keys_env": "TEST_KEYS"}
    headers: Any = {} if header is None else {"Authorization": header}
    answer = ask(cell, "POST", URL, http, json=PICTURE, headers=headers)
    assert answer.status_code == status
    if status == 401:
        check_error(answer, 401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert not cell.requests
    assert ask(cell, "GET", "/v1/models", http, headers=headers).status_code == status
    assert ask(cell, "GET", "/health", http).status_code == 200


def test_the_cell_learns_whose_request_it_is_but_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEYS", KEYS)

    def client(header: str, **http: Any) -> str | None:
        cell = Cell()
        assert (
            ask(cell, "POST", URL, http, json=PICTURE, headers={"Authorization": header}).status_code == 200
        )
        assert header.split()[1] not in repr(cell.requests) + str(cell.requests[0].client)
        assert cell.requests[0].client is None or cell.requests[0].client not in repr(cell.requests)
        return cell.requests[0].client

    keyed = {"api_keys_env": "TEST_KEYS"}
    first, again, second = (
        client(header, **keyed)
        for header in (
            "Bearer first-key-0123456789",
            "bearer  first-key-0123456789 ",
            "Bearer second-key-9876543210",
        )
    )
    assert first == again and first is not None and second not in (None, first)
    assert client("Bearer first-key-0123456789") is None  # without keys all are one client


def test_keys_and_prompts_stay_out_of_logs_and_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LAB_KEYS", KEYS)
    secrets = ["first-key-0123456789", "second-key-9876543210", "wrong-key-0123456789", "a secret circle"]
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, logger.name):
        for error in (None, RuntimeError("boom"), errors.OutOfMemory("decode ran out of memory")):
            for key in secrets[:3]:
                answer = ask(
                    Cell(error=error),
                    "POST",
                    URL,
                    {"api_keys_env": "LAB_KEYS"},
                    headers={"Authorization": f"Bearer {key}", "Idempotency-Key": key},
                    json={**PICTURE, "prompt": "a secret circle"},
                )
                assert answer.status_code == (401 if key in secrets[2] else 500 if error else 200)
                assert not any(secret in answer.text for secret in secrets)
    assert "goes to a cell" in caplog.text and "is answered with out_of_memory" in caplog.text
    assert not any(secret in caplog.text for secret in secrets)


def test_api_keys_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# one per line\n\nfrom-the-file-0123456789\n")
    http = {"api_keys_file": str(file)}
    good = {"Authorization": "Bearer from-the-file-0123456789"}
    assert ask(Cell(), "POST", URL, http, json=PICTURE, headers=good).status_code == 200
    for text, why in (("# none\n", "no key"), ("short\n", "shorter than 16"), (b"\xff", "cannot read")):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(errors.ConfigError, match=why) as caught:
            ingress(Cell(), **http)
        assert "short\n" not in str(caught.value)
    monkeypatch.delenv("TEST_KEYS", raising=False)
    with pytest.raises(errors.ConfigError, match="api_keys_env"):
        ingress(Cell(), api_keys_env="TEST_KEYS")


def test_health() -> None:
    answer = ask(Cell(STARTING, READY), "GET", "/health")
    assert answer.status_code == 200
    assert [cell["ready"] for cell in answer.json()["cells"]] == [False, True]
    answer = ask(Cell(STARTING), "GET", "/health")
    assert (answer.status_code, answer.json()["reason"]) == (503, "measuring step times")
    assert "retry-after" in answer.headers


def test_requests_are_refused_while_no_cell_is_ready() -> None:
    cell = Cell(STARTING)
    answer = post(cell, **PICTURE)
    check_error(answer, 503, "not_ready")
    assert answer.headers["retry-after"] == "15"  # about what a cell takes to start
    assert not cell.requests
    for gone in (DeploymentUnavailableError(None), ActorDiedError()):
        cell = Cell()
        cell.unavailable = gone
        answer = post(cell, **PICTURE)
        check_error(answer, 503, "not_ready")
        assert answer.headers["retry-after"] == "15"
        assert ask(cell, "GET", "/health").status_code == 503


def test_when_to_come_again_goes_by_what_the_last_start_took() -> None:
    """Less what has passed since a cell was there."""

    async def run() -> list[int]:
        cell = Cell(replace(READY, started_in_s=40.0))
        front = ingress(cell)
        await front.statuses()
        cell.unavailable = DeploymentUnavailableError(None)
        after = []
        for passed_s in (0, 30, 100):
            front._seen_s -= passed_s
            front._made_s -= passed_s
            with pytest.raises(errors.NotReady) as caught:
                await front.statuses()
            after.append(caught.value.retry_after_s)
        return after

    assert asyncio.run(run()) == [40, 10, 1]


def test_a_cell_that_is_being_reconfigured_is_waited_for() -> None:
    """Serve counts it as none for a moment."""
    cell = Cell()
    cell.is_known_to_serve = True

    async def run() -> None:
        front = ingress(cell)
        for call_of in (
            lambda: front.generate(GenerateRequest("a", 64, 96)),
            lambda: front.statuses(),
            lambda: front.delete("r"),
        ):
            cell.unavailable = DeploymentUnavailableError(None)
            call = asyncio.ensure_future(call_of())
            await asyncio.sleep(0.3)
            assert not call.done()
            cell.unavailable = None
            await call
            front._checked_s = 0.0
        cell.is_known_to_serve = False
        cell.unavailable = DeploymentUnavailableError(None)
        with pytest.raises(errors.NotReady):
            await asyncio.wait_for(front.generate(GenerateRequest("a", 64, 96)), 0.3)

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_silent_cells_hold_nobody_up(path: str) -> None:
    cell = Cell()
    cell.silent = True
    start_s = time.monotonic()
    assert ask(cell, "GET", path).status_code == 503
    assert time.monotonic() - start_s < 3


def test_python_handle() -> None:
    async def run() -> None:
        front = ingress(Cell())
        request = GenerateRequest(prompt="x", height=64, width=64)
        result = await front.generate(request)
        assert result.image.shape == (64, 64, 3)
        items = [item async for item in front.stream(request)]
        assert [type(item) for item in items] == [Progress, GenerateResult]
        with pytest.raises(errors.InvalidRequest):
            await front.generate(GenerateRequest(prompt="x", height=63, width=64))

    asyncio.run(run())


def test_disconnect_cancels_the_call_of_the_cell() -> None:
    cell = Cell(delay_s=100)
    hang_up(cell, {**PICTURE, "n": 2}, calls=2)
    assert len(cell.cancelled) == 2


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**40), max_value=10**40)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["64x64", "auto", "png", "b64_json", "1e400", "NaN", "{}", '{"slo_ms": true}']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from([*ImageRequest.model_fields, "extra_body", "extra_args", "extra_params", "quality"])
BODIES = st.dictionaries(FIELDS, JSON, max_size=4)


@settings(max_examples=400, deadline=None)
@given(BODIES, st.sampled_from(["extra_body", "extra_args", "extra_params", None]), BODIES)
def test_no_input_is_a_server_error(body: dict[str, Any], place: str | None, nested: dict[str, Any]) -> None:
    whole = {**PICTURE, **body, **({place: nested} if place else {})}
    answer = ask(Cell(), "POST", URL, content=json.dumps(whole).encode())
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_are_a_server_error(body: bytes) -> None:
    assert ask(Cell(), "POST", URL, content=body).status_code == 400


def test_ingress_process_stays_light() -> None:
    """The front must not pay for torch: memory, and seconds at every start of a replica."""
    script = "import deployments.http.routes, sys; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture
def served() -> Iterator[Callable[[Cell], str]]:
    """Runs the app on a real socket; gives its base URL."""
    with ExitStack() as stack:
        yield lambda cell: stack.enter_context(listening(ingress(cell))) + "/v1"


def test_openai_client(served: Callable[[Cell], str]) -> None:
    cell = Cell()
    client = openai.OpenAI(base_url=served(cell), api_key="none", max_retries=0)
    images = client.images.generate(
        model="lab/tiny",
        prompt="a red circle",
        size="256x256",
        n=2,
        response_format="b64_json",
        quality="high",
        extra_body={"slo_ms": 5000, "seed": 1},
    )
    assert images.created == 1700000000
    assert images.data is not None
    png = base64.b64decode(images.data[1].b64_json or "")
    assert Image.open(io.BytesIO(png)).size == (256, 256)
    assert [request.slo_s for request in cell.requests] == [5, 5]
    assert images.to_dict()["metrics"]["seed"] == 1  # type: ignore[index]
    assert [model.id for model in client.models.list()] == ["lab/tiny"]
    assert client.models.retrieve("default").id == "lab/tiny"
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(prompt="", size="256x256")
    assert (bad.value.param, bad.value.code) == ("prompt", "invalid_value")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="x", model="dall-e-3")


def test_openai_client_retries_only_what_may_help(served: Callable[[Cell], str]) -> None:
    cell = Cell(error=errors.DeadlineInfeasible("too late"))
    client = openai.OpenAI(base_url=served(cell), api_key="none", max_retries=2)
    with pytest.raises(openai.InternalServerError):
        client.images.generate(prompt="x", size="256x256")
    assert len(cell.requests) == 1


@pytest.mark.parametrize(
    ("said", "reaches", "ignored"),
    [
        (None, None, []),
        ("lossless", "lossless", []),
        ("high", "high", []),
        ("fast", "fast", []),
        ("auto", None, ["quality"]),
        ("hd", None, ["quality"]),
    ],
)
def test_quality_is_how_much_may_be_saved(said: str | None, reaches: str | None, ignored: list[str]) -> None:
    cell = Cell()
    answer = post(cell, **PICTURE, quality=said)
    assert answer.status_code == 200, answer.text
    assert cell.requests[0].quality == reaches
    assert answer.json()["metrics"]["ignored"] == ignored


def test_an_unknown_quality_is_named_with_what_is_allowed() -> None:
    message = check_error(post(**PICTURE, quality="ultra"), 400, "invalid_value", "quality")
    assert "lossless, high, fast, auto" in message
    cell = Cell()
    with pytest.raises(errors.InvalidRequest, match="lossless, high, fast"):
        asyncio.run(ingress(cell).generate(GenerateRequest("a", 64, 96, quality="ultra")))
