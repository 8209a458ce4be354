"""What the routes answer, for the OpenAPI document.

The bodies themselves are made in `api` and `ingress`; the tests hold both against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tetriserve.model_info import ModelInfo
from tetriserve.request import CellStatus


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(_Answer):
    message: str
    type: Literal["invalid_request_error", "authentication_error", "server_error"]
    param: str | None = Field(description="The field that is wrong, where there is one.")
    code: str
    request_id: str = Field("", description="`id` of the generation, where one was begun.")
    earliest_slo_ms: int | None = Field(
        None, description="With `deadline_infeasible`: the request would be accepted with this `slo_ms`."
    )


class ErrorAnswer(_Answer):
    """OpenAI's error object."""

    error: ErrorDetail


Kind = Literal["encode", "encode_image", "denoise", "decode"]


class StageDurations(_Answer):
    """Seconds; queue is all the time in which nothing ran."""

    queue: float
    encode: float = Field(description="Of the text and of pictures.")
    denoise: float
    decode: float
    total: float


class Range(_Answer):
    """Denoising steps that ran on the same GPUs."""

    steps: int
    degree: int
    gpus: list[int]


class Run(_Answer):
    """One step range as it ran; Unix seconds."""

    kind: Kind
    steps: int
    gpus: list[int]
    start_s: float
    end_s: float
    others: int = Field(description="Other requests that were open when it was planned.")
    shared_with: int = Field(description="Other requests that ran in the same steps.")


class LostRun(_Answer):
    """A step range that had to be run again; Unix seconds."""

    kind: Kind
    steps: int
    gpus: list[int]
    noticed_s: float


class PlannedWithAnswer(_Answer):
    """Seconds that the plans of this request reckoned with; of a step, by the degrees that it could run at."""

    encode_s: float
    step_s: dict[int, float]
    decode_s: float
    encode_image_s: float


class MetricsAnswer(_Answer):
    stage_durations: StageDurations
    slo_s: float | None
    slo_met: bool | None
    steps: list[Range]
    schedule: list[Run]
    lost: list[LostRun]
    arrival_s: float = Field(description="Unix seconds.")
    planned_with: PlannedWithAnswer
    seed: int
    peak_memory_mb: float
    predicted_s: float | None = Field(description="Arrival to end, as the first plan had it.")
    response_s: float | None = Field(description="Arrival to this answer; `slo_met` goes by it.")
    degraded: list[str] = Field(description="What was not computed as by the model as published.")
    ignored: list[str] = Field(description="Fields of the request that changed nothing.")
    reused_steps: int = Field(description="Steps that were extrapolated, beside those of `steps`.")
    truncated: list[Literal["prompt", "negative_prompt"]] = Field(
        description="Fields that were too long: their ends no text encoder saw."
    )


class PictureAnswer(_Answer):
    """One of `b64_json` and `url`, as `response_format` asked."""

    b64_json: str = Field("", description="The file in base64.")
    url: str = Field("", description="Where the file is for a while; no key is needed there.")
    revised_prompt: str | None
    metrics: MetricsAnswer


class InputTokens(_Answer):
    image_tokens: int
    text_tokens: int


class Usage(_Answer):
    """OpenAI's counts, all zero: nothing is counted in tokens here."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int
    peak_memory_mb: float


class ImagesAnswer(_Answer):
    """The pictures, and the metrics of the slowest."""

    id: str
    created: int
    model: str
    data: list[PictureAnswer]
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    metrics: MetricsAnswer
    inference_time_s: float
    peak_memory_mb: float
    usage: Usage


class ImageUrl(_Answer):
    url: str = Field(description="A data URL.")


class ChatPart(_Answer):
    type: Literal["image_url"]
    image_url: ImageUrl
    stage_durations: StageDurations
    peak_memory_mb: float


class ChatMessage(_Answer):
    role: Literal["assistant"]
    content: list[ChatPart]


class ChatChoice(_Answer):
    index: int
    message: ChatMessage
    finish_reason: Literal["stop"]


class ChatUsage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(_Answer):
    """A choice for each picture."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    metrics: MetricsAnswer
    usage: ChatUsage


class DeletedAnswer(_Answer):
    id: str
    object: Literal["image.generation.deleted"]
    deleted: Literal[True]


class ModelAnswer(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str = Field(description="The model that the id is a name of.")
    num_gpus: int = Field(description="Of one cell.")
    task_type: Literal["T2I", "TI2I", "I2I"]
    dtype: str
    sizes: list[str] = Field(description="Whose step times were measured; others are served too.")
    degrees: list[int] = Field(description="Sequence-parallel degrees that a step may run at.")


class ModelsAnswer(_Answer):
    object: Literal["list"]
    data: list[ModelAnswer]


@dataclass(frozen=True, kw_only=True)
class ModelInfoAnswer(ModelInfo):
    """Task, name and limits of the model."""

    task: Literal["image"]
    model_path: str


class ProfileAnswer(_Answer):
    """Seconds by "HxW"; `step_seconds` by sequence-parallel degree too."""

    model: str
    device: str
    source: str
    degrees: list[int]
    step_seconds: dict[str, dict[int, float]]
    encode_seconds: dict[str, float] = {}
    decode_seconds: dict[str, float] = {}


class BoardRange(_Answer):
    """A rectangle of the board."""

    request: str | None = Field(description="A label; null for a request of somebody else.")
    colour: int | None = Field(description="0 to 11, the same for all ranges of a request.")
    late: bool
    kind: Kind | Literal["busy"] = Field(description='"busy": of somebody else.')
    steps: int
    ranges: int = Field(description="Step ranges in it: more where they are too narrow to be told apart.")
    gpus: list[tuple[int, int]] = Field(description="(first, count) of neighbouring GPUs.")
    share: tuple[int, int] = Field(description="(which, of how many) it is of those who share its steps.")
    start_s: float
    end_s: float = Field(description="Predicted while it runs.")
    state: Literal["done", "running", "planned"]


class BoardRequest(_Answer):
    """An open request, or one that has ranges on the board. Those of others are not listed."""

    request: str
    colour: int
    shape: str
    steps: int
    steps_done: int
    arrival_s: float
    deadline_s: float | None
    outcome: str = Field(description='"open", "met", "late", "no_deadline" or the code of an error.')
    late: bool = Field(description="Missed its deadline, or is open behind it.")


class BoardRate(_Answer):
    """Over the last `seconds` and all clients; requests without deadline and cancelled ones do not count."""

    seconds: int
    met: int
    missed: int
    slo_attainment: float | None
    gpu_use: float


class LeftOut(_Answer):
    """What was too narrow to be seen, or too much."""

    ranges: int
    requests: int
    rounds: int


class CellBoard(_Answer):
    """GPU x time of one cell. Times are seconds from `now_s`, which is Unix time: the past is negative."""

    cell: int
    now_s: float
    from_s: float = Field(description="What was before is not known, or too much.")
    gpus: list[Literal["ready", "lost", "cordoned"]]
    ranges: list[BoardRange]
    requests: list[BoardRequest]
    rounds_s: list[float] = Field(description="Where rounds end.")
    open_requests: int
    waiting_requests: int
    rates: list[BoardRate]
    left_out: LeftOut


class BoardAnswer(_Answer):
    seconds: int
    cells: list[CellBoard]


class TimelineAnswer(_Answer):
    """Trace events, microseconds of Unix time; two processes for each cell, its GPUs and its requests."""

    traceEvents: list[dict[str, Any]]
    displayTimeUnit: Literal["ms"]


class HealthAnswer(_Answer):
    status: Literal["ready", "not_ready"]
    reason: str
    cells: list[CellStatus]


Responses = dict[int | str, dict[str, Any]]

_FILE = {"schema": {"type": "string", "format": "binary"}}
_RETRY = {
    "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds; absent when it will not help."}
}

_EVENTS = {
    "schema": {  # of each event
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
        "required": ["event", "data"],
    },
    "example": 'event: image_generation.progress\ndata: {"type": "image_generation.progress", "steps_done": 4, ...}',
}
_SECONDS = {"schema": {"type": "number"}}
_RESULT_HEADERS = {
    "X-Generation-Id": {"schema": {"type": "string"}, "description": "`id` of the body."},
    "X-Predicted-Finish-S": {**_SECONDS, "description": "Arrival to end in seconds, as first predicted."},
    "X-Finish-S": {**_SECONDS, "description": "What it took; not with stream."},
    "X-Inference-Time-S": {**_SECONDS, "description": "`inference_time_s` of the body; not with stream."},
    "X-SLO-S": {**_SECONDS, "description": "The deadline, where there is one."},
    "Server-Timing": {
        "schema": {"type": "string"},
        "description": "Milliseconds: total, queue, encode, denoise, decode; not with stream.",
    },
    "X-Truncated": {
        "schema": {"type": "string"},
        "description": "`metrics.truncated`, where there is some; not with stream.",
    },
    "X-SLO-Met": {"schema": {"type": "boolean"}, "description": "The same; not with stream."},
}

ERRORS: Responses = {
    401: {"model": ErrorAnswer, "description": "No API key of this server."},
    500: {"model": ErrorAnswer, "description": "This request failed; later ones are not affected."},
    503: {
        "model": ErrorAnswer,
        "description": "Full, not ready, or too late by its own wish.",
        "headers": _RETRY,
    },
    "4XX": {"model": ErrorAnswer, "description": "Any other fault of the request."},
}
_SAME_KEY = {"Idempotency-Key": "$request.header.Idempotency-Key"}

IMAGES: Responses = ERRORS | {
    200: {
        "model": ImagesAnswer,
        "links": {"forget": {"operationId": "delete_images", "parameters": _SAME_KEY}},
        "content": {"text/event-stream": _EVENTS},
        "description": "With `stream` events: `image_generation.partial_image` and `image_generation.completed` in "
        "OpenAI's form, each with `id`, `picture`, `steps_done`, `steps`, `predicted_finish_s`, the last also with "
        "`metrics`; with `progress` also `image_generation.progress`; `error`, with an error body, ends the stream.",
        "headers": _RESULT_HEADERS,
    },
    400: {"model": ErrorAnswer, "description": "`param` names the field, the message what is allowed."},
    404: {"model": ErrorAnswer, "description": "A model that is not served here."},
    409: {"model": ErrorAnswer, "description": "Cancelled by a DELETE with the same Idempotency-Key."},
    413: {"model": ErrorAnswer, "description": "The body is too large."},
    415: {"model": ErrorAnswer, "description": "Compressed or written in a way that is not taken."},
}
EDITS: Responses = {
    **IMAGES,
    200: {
        **IMAGES[200],
        "description": "As of generations; events are called `image_edit.partial_image`, `image_edit.completed`, "
        "`image_edit.progress`.",
    },
}
CHAT: Responses = {
    **IMAGES,
    200: {
        "model": ChatAnswer,
        "headers": _RESULT_HEADERS,
        "links": {"forget": {"operationId": "delete_images", "parameters": _SAME_KEY}},
    },
}
DELETED: Responses = ERRORS | {
    200: {"model": DeletedAnswer},
    404: {
        "model": ErrorAnswer,
        "description": "Nothing was asked for under this Idempotency-Key, or long ago.",
    },
}
MODELS: Responses = ERRORS | {
    200: {
        "model": ModelsAnswer,
        "links": {
            "model": {
                "operationId": "get_model",
                "parameters": {"model_id": "$response.body#/data/0/id"},
            }
        },
    }
}
MODEL: Responses = ERRORS | {
    200: {"model": ModelAnswer},
    404: {"model": ErrorAnswer, "description": "A model that is not served here."},
}
MODEL_INFO: Responses = ERRORS | {200: {"model": ModelInfoAnswer}}
PROFILE: Responses = ERRORS | {200: {"model": ProfileAnswer}}
PICTURE: Responses = {
    200: {"content": {"image/png": _FILE, "image/jpeg": _FILE, "image/webp": _FILE}},
    404: {"model": ErrorAnswer, "description": "Nothing has this URL, or it has expired."},
    500: ERRORS[500],
    503: ERRORS[503],
    "4XX": ERRORS["4XX"],
}
METRICS: Responses = ERRORS | {
    200: {
        "content": {"text/plain": {"schema": {"type": "string"}}},
        "description": "Prometheus' text format.",
    },
}
BOARD: Responses = ERRORS | {200: {"model": BoardAnswer}}
TIMELINE: Responses = ERRORS | {200: {"model": TimelineAnswer}}
HEALTH: Responses = {
    200: {"model": HealthAnswer},
    503: {"model": HealthAnswer, "description": "No cell can run steps.", "headers": _RETRY},
    "4XX": ERRORS["4XX"],
}
