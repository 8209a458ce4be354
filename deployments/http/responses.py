"""What answers hold: bodies, headers, and which error is which status."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from deployments.config import AppArgs
from deployments.http.bodies import ImageRequest
from tetriserve.errors import (
    Cancelled,
    DeadlineInfeasible,
    InvalidRequest,
    NotFound,
    Overloaded,
    TetriserveError,
    Unauthorized,
)
from tetriserve.model_info import ModelInfo
from tetriserve.request import GenerateResult, Metrics

NO_TOKENS = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""OpenAI's clients expect token counts; nothing is counted in tokens here."""


def metrics_body(metrics: Metrics) -> dict[str, Any]:
    """`metrics` of a response. Durations in seconds; `schedule` in Unix seconds by the replicas' clock, `lost` and
    `arrival_s` by the scheduler's."""
    return {
        "stage_durations": {
            "queue": metrics.queue_s,
            "encode": metrics.encode_s,
            "denoise": metrics.denoise_s,
            "decode": metrics.decode_s,
            "total": metrics.total_s,
        },
        "slo_s": metrics.slo_s,
        "slo_met": metrics.slo_met,
        "steps": [
            {"steps": steps, "degree": degree, "gpus": list(gpus)} for steps, degree, gpus in metrics.steps
        ],
        "schedule": [execution._asdict() for execution in metrics.schedule],
        "lost": [lost._asdict() for lost in metrics.lost],
        "arrival_s": metrics.arrival_s,
        "planned_with": dataclasses.asdict(metrics.planned_with),
        "seed": metrics.seed,
        "peak_memory_mb": round(metrics.peak_memory_bytes / 2**20, 1),
        "predicted_s": metrics.predicted_s,
        "response_s": metrics.response_s,
        "degraded": list(metrics.degraded),
        "ignored": list(metrics.ignored),
        "truncated": list(metrics.truncated),
        "reused_steps": metrics.reused_steps,
    }


def generation_headers(response_id: str, seconds: Mapping[str, float | None]) -> dict[str, str]:
    """Which generation it is, and the headers in seconds whose values are known."""
    known = {name: f"{value:.6g}" for name, value in seconds.items() if value is not None}
    return {"X-Generation-Id": response_id, **known}


def result_headers(response_id: str, metrics: Metrics) -> dict[str, str]:
    """Headers of a generation response: what logs and load balancers want to know without reading the body."""
    seconds = {
        "X-Inference-Time-S": metrics.inference_s,
        "X-Predicted-Finish-S": metrics.predicted_s,
        "X-Finish-S": metrics.response_s,
        "X-SLO-S": metrics.slo_s,
    }
    headers = generation_headers(response_id, seconds)
    stages = {
        "total": metrics.response_s,
        "queue": metrics.queue_s,
        "encode": metrics.encode_s,
        "denoise": metrics.denoise_s,
        "decode": metrics.decode_s,
    }
    headers["Server-Timing"] = ", ".join(
        f"{name};dur={1000 * seconds:.1f}" for name, seconds in stages.items() if seconds is not None
    )
    if metrics.truncated:
        headers["X-Truncated"] = ", ".join(metrics.truncated)
    if metrics.slo_met is not None:
        headers["X-SLO-Met"] = "true" if metrics.slo_met else "false"
    return headers


def image_response(
    request: ImageRequest,
    response_id: str,
    results: list[GenerateResult],
    slowest: GenerateResult,
    pictures: list[dict[str, str]],
) -> dict[str, Any]:
    """Body of a generation response; `pictures` are `{"b64_json": ...}` or `{"url": ...}`.

    Each `data` item carries the `metrics` of its own picture; those at top level are the slowest picture's.
    """
    metrics = metrics_body(slowest.metrics)
    height, width = slowest.image.shape[:2]
    return {
        "id": response_id,
        "created": int(slowest.created_s),
        "model": slowest.model,
        "data": [
            {**picture, "revised_prompt": None, "metrics": metrics_body(result.metrics)}
            for result, picture in zip(results, pictures, strict=True)
        ],
        "output_format": request.output_format,
        "size": f"{width}x{height}",
        "metrics": metrics,
        "inference_time_s": slowest.metrics.inference_s,
        "peak_memory_mb": metrics["peak_memory_mb"],
        "usage": {**NO_TOKENS, "peak_memory_mb": metrics["peak_memory_mb"]},
    }


def _task_type(info: ModelInfo) -> str:
    """As SGLang names tasks: from text, from text and pictures, from pictures."""
    return "I2I" if info.editing.needs_image else "TI2I" if info.editing.max_images else "T2I"


def model_body(info: ModelInfo, args: AppArgs, name: str, created_s: int) -> dict[str, Any]:
    """One entry of OpenAI's model list, with what vLLM-Omni's and SGLang's lists have beside it.

    Args:
        name: the model's or one of its aliases.
    """
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "tetriserve",
        "root": info.name,
        "num_gpus": args.cell.gpus,
        "task_type": _task_type(info),
        "dtype": args.model.dtype,
        "sizes": [f"{shape.width}x{shape.height}" for shape in args.profile.all_shapes],
        "degrees": list(args.cell.all_degrees),
    }


def error_body(message: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe_error(
    error: TetriserveError, generation_id: str | None = None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of the answer to a failed request.

    Args:
        generation_id: where one was begun. It is not part of the message, by which load testers count.
    """
    status, body, headers = _described(error)
    if generation_id is not None:
        body["error"]["request_id"] = generation_id
        headers["X-Generation-Id"] = generation_id
    return status, body, headers


def _described(error: TetriserveError) -> tuple[int, dict[str, Any], dict[str, str]]:
    if isinstance(error, InvalidRequest):
        status = 404 if isinstance(error, NotFound) else 400
        body = error_body(error.message, "invalid_request_error", error.code, error.field)
        return status, body, {}
    if isinstance(error, Unauthorized):
        body = error_body(error.message, "authentication_error", error.code)
        return 401, body, {"WWW-Authenticate": "Bearer"}
    body = error_body(error.message, "server_error", error.code)
    if isinstance(error, Overloaded):
        return 503, body, {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, Cancelled):
        # OpenAI's client repeats a 409 too
        return 409, body, {"x-should-retry": "false"}
    if isinstance(error, DeadlineInfeasible):
        # OpenAI's client repeats a 503 by itself; a deadline that is lost stays lost
        if error.earliest_slo_s is not None:
            body["error"]["earliest_slo_ms"] = round(1000 * error.earliest_slo_s)
        return 503, body, {"x-should-retry": "false"}
    return 500, body, {}
