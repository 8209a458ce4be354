"""The HTTP contract in types: what a request body may hold, what a response body holds, which error is which.

Only types and what is purely HTTP is checked here; whether the model can serve a request is the cell's
knowledge (`ModelInfo.check`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from deployments.config import HTTPArgs
from tetriserve.errors import InvalidRequest
from tetriserve.request import GenerateRequest
from tetriserve.reuse import QUALITIES

if TYPE_CHECKING:
    from typing_extensions import Self

ENCODER_QUALITIES = {"default": 75, "low": 35, "medium": 55, "high": 90, "maximum": 100}
"""Words of `output_quality`, as an encoder's quality in percent."""

OTHER_QUALITIES = ("auto", "standard", "hd", "low", "medium")
"""OpenAI's words for `quality` that mean nothing here."""

ANYWHERE = (
    "slo_ms",
    "drop_late",
    "reject_infeasible",
    "priority",
    "num_steps",
    "runtime_v2_arrival_ms",
    "runtime_v2_deadline_ms",
    "runtime_v2_priority",
)
"""Keys also looked for inside `extra_args` and `extra_params`."""


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):  # to pydantic a boolean is a number
        raise ValueError("Input should be a number, not a boolean")
    return value


NO_BOOLEAN = BeforeValidator(_no_boolean)
# 64 bits, so that no later arithmetic meets an integer that no float can hold
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63), NO_BOOLEAN]
Count = Annotated[int, Field(ge=1, lt=2**63), NO_BOOLEAN]
Percent = Annotated[int, Field(ge=0, le=100), NO_BOOLEAN]
Number = Annotated[float, Field(allow_inf_nan=False), NO_BOOLEAN]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), NO_BOOLEAN]


COPIED = (
    "model",
    "negative_prompt",
    "guidance_scale",
    "guidance_scale_2",
    "true_cfg_scale",
    "quality",
    "user",
    "drop_late",
    "reject_infeasible",
)
"""Fields that mean the same in a `GenerateRequest`."""


MAX_NAMED = 32
"""So many ignored fields are named."""

SIZE = "[0-9]{1,6}x[0-9]{1,6}"


def _document_nested(schema: dict[str, Any]) -> None:
    """Name the places for nested fields, which are not fields of the model themselves."""
    schema["properties"] |= {
        name: {
            "type": ["object", "string", "null"],
            "description": "An object, or a string holding its JSON.",
        }
        for name in ("extra_body", "extra_args", "extra_params")
    }


class Lora(BaseModel):
    """A configured LoRA, and how much of it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    scale: Number = Field(1.0, ge=-10, le=10)


LoraChoice = Annotated[
    str | Lora | None,
    # in one piece: a reference would point nowhere in the OpenAPI document
    WithJsonSchema({"anyOf": [{"type": "string"}, Lora.model_json_schema(), {"type": "null"}]}),
]


class ImageRequest(BaseModel):
    """Body of `POST /v1/images/generations`. Unknown fields are ignored, and named in `metrics.ignored`; null means
    absent.

    Every field may also stand inside `extra_body`; deadline fields inside `extra_args` and `extra_params`
    too (objects, or strings holding JSON). The outermost one wins.
    """

    # what else there is only gets a name in the answer
    model_config = ConfigDict(extra="allow", frozen=True, json_schema_extra=_document_nested)

    events: ClassVar[str] = "image_generation"
    """What those of a stream are called before the dot."""

    prompt: str = Field(json_schema_extra={"minLength": 1})
    model: str | None = None
    n: Count = 1
    size: str | None = Field(
        None,
        description='"WIDTHxHEIGHT" or "auto"; default 1024x1024.',
        json_schema_extra={"pattern": f"^({SIZE}|auto)$"},
    )
    width: Integer | None = None
    height: Integer | None = None
    response_format: Literal["b64_json", "url"] | None = Field(None, description="Default: as configured.")
    output_format: Literal["png", "jpeg", "webp"] = "png"
    background: Literal["auto", "opaque", "transparent"] = "auto"
    output_compression: Percent | None = Field(
        None, description="Quality of jpeg and webp in percent; wins over output_quality."
    )
    output_quality: Literal["default", "low", "medium", "high", "maximum"] = "default"
    negative_prompt: str | None = None
    num_inference_steps: Integer | None = Field(None, json_schema_extra={"minimum": 1, "maximum": 200})
    num_steps: Integer | None = Field(None, description="Used when num_inference_steps is absent.")
    guidance_scale: Number | None = Field(None, json_schema_extra={"minimum": 0, "maximum": 20})
    guidance_scale_2: Number | None = Field(
        None,
        description="Of a second transformer that takes over at low noise; default: guidance_scale.",
        json_schema_extra={"minimum": 0, "maximum": 20},
    )
    true_cfg_scale: Number | None = Field(None, json_schema_extra={"minimum": 0, "maximum": 20})
    quality: str | None = Field(
        None,
        description="How much may be saved, where the server is set up for it: lossless, high (some steps are "
        "extrapolated), fast (most of them). OpenAI's other words are taken, and change nothing.",
        json_schema_extra={"enum": [*QUALITIES, *OTHER_QUALITIES, None]},
    )
    seed: Integer | None = Field(
        None, description="-1 and null: a random one.", json_schema_extra={"minimum": -1}
    )
    lora: LoraChoice = Field(None, description="A configured LoRA: its name, or {name, scale}.")
    user: str | None = None
    slo_ms: Positive | None = Field(None, description="Deadline, milliseconds from arrival.")
    drop_late: bool | None = Field(
        None, description="End with an error once the deadline cannot be met; null: as configured."
    )
    reject_infeasible: bool | None = Field(
        None, description="Answer 503 at once if the first plan misses the deadline; null: as configured."
    )
    priority: Integer | None = Field(None, description="Tie-break, larger first.")
    runtime_v2_arrival_ms: Number | None = None
    runtime_v2_deadline_ms: Number | None = None
    runtime_v2_priority: Integer | None = None
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: Annotated[int, Field(ge=0, le=3), NO_BOOLEAN] = Field(
        0, description="Rough pictures on the way, at most; only with stream."
    )
    progress: bool = Field(False, description="Also send an event after every step range; only with stream.")

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        fields = _present(body)
        fields = _nested(fields, "extra_body") | fields
        fields.pop("extra_body", None)
        for key in ("extra_args", "extra_params"):
            inner = _nested(fields, key)
            fields.pop(key, None)
            named = {name if name in ANYWHERE else f"{key}.{name}": value for name, value in inner.items()}
            fields = named | fields
        return fields

    @model_validator(mode="after")
    def _stream_only(self) -> ImageRequest:
        for name in ("partial_images", "progress"):
            if getattr(self, name) and not self.stream:
                raise InvalidRequest(name, "needs stream: true")
        if self.stream and self.response_format == "url":
            raise InvalidRequest("response_format", "url cannot be streamed, allowed is b64_json")
        return self

    @field_validator("size")
    @classmethod
    def _size(cls, size: str | None) -> str | None:
        if size is None or size == "auto":
            return None
        if not re.fullmatch(SIZE, size):
            raise ValueError('must look like "WIDTHxHEIGHT", for example "1024x1024", or be "auto"')
        return size

    @field_validator("seed")
    @classmethod
    def _seed(cls, seed: int | None) -> int | None:
        return None if seed == -1 else seed

    @field_validator("quality")
    @classmethod
    def _quality(cls, quality: str | None) -> str | None:
        if quality not in (*QUALITIES, *OTHER_QUALITIES, None):
            raise ValueError(f"allowed are {', '.join((*QUALITIES, *OTHER_QUALITIES))}")
        return quality

    @field_validator("background")
    @classmethod
    def _background(cls, background: str) -> str:
        if background == "transparent":
            raise ValueError("pictures have none that is transparent, allowed are auto and opaque")
        return background

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of fields that change nothing here."""
        names = {name[:64] for name in self.model_extra or {}}
        if self.quality in OTHER_QUALITIES:
            names.add("quality")
        return tuple(sorted(names))[:MAX_NAMED]

    @property
    def encoder_quality(self) -> int:
        """Of jpeg and webp, percent."""
        return (
            ENCODER_QUALITIES[self.output_quality]
            if self.output_compression is None
            else self.output_compression
        )

    @classmethod
    def parse(cls, body: bytes, http: HTTPArgs) -> Self:
        """Read a request body. Raises `InvalidRequest` naming the first wrong field."""
        return cls.checked(json_object(body), http)

    @classmethod
    def checked(cls, fields: dict[str, Any], http: HTTPArgs) -> Self:
        """The same of fields."""
        try:
            request = cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = str(first["loc"][0]) if first["loc"] else "body"
            raise InvalidRequest(field, first["msg"].removeprefix("Value error, ")) from None
        if request.n > http.max_n:
            raise InvalidRequest("n", f"{request.n}, allowed are 1 to {http.max_n}")
        if request.response_format is None:  # a stream has nothing else
            default = "b64_json" if request.stream else http.response_format
            request = request.model_copy(update={"response_format": default})
        return request

    def generate_requests(self, request_id: str) -> list[GenerateRequest]:
        """One request per picture; with a seed, picture i gets seed + i.

        Raises `InvalidRequest` if the absolute deadline does not lie after its arrival time.
        """
        fields: dict[str, Any] = {
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.num_steps
            if self.num_inference_steps is None
            else self.num_inference_steps,
            "priority": self.runtime_v2_priority if self.priority is None else self.priority,
            "slo_s": self._slo_s(),
            "previews": self.partial_images,
        }
        for name in COPIED:
            fields[name] = getattr(self, name)
        if self.quality in OTHER_QUALITIES:
            fields["quality"] = None
        if self.lora is not None:
            lora = Lora(name=self.lora) if isinstance(self.lora, str) else self.lora
            fields |= {"lora": lora.name, "lora_scale": lora.scale}
        fields = _present(fields | self._more())
        if self.size is not None:
            width, height = self.size.split("x")
            fields = {"width": int(width), "height": int(height)} | fields
        return [
            GenerateRequest(
                prompt=self.prompt,
                seed=None if self.seed is None else self.seed + picture,
                request_id=one_id,
                **fields,
            )
            for picture, one_id in enumerate(picture_ids(request_id, self.n))
        ]

    def _more(self) -> dict[str, Any]:
        """Fields of a `GenerateRequest` that only some requests have."""
        return {}

    def _slo_s(self) -> float | None:
        """Seconds from arrival: `slo_ms`, else the budget between two times on the sender's clock."""
        if self.slo_ms is not None:
            return self.slo_ms / 1000
        if self.runtime_v2_arrival_ms is None or self.runtime_v2_deadline_ms is None:
            return None
        budget_ms = self.runtime_v2_deadline_ms - self.runtime_v2_arrival_ms
        if budget_ms <= 0:
            raise InvalidRequest("runtime_v2_deadline_ms", "must be later than runtime_v2_arrival_ms")
        return budget_ms / 1000


def json_object(body: bytes, otherwise: str = "Invalid JSON") -> dict[str, Any]:
    """The object in a body. Raises `InvalidRequest`; `otherwise` is what it says of a body that is no JSON."""
    try:
        fields = from_json(body)
    except ValueError as error:
        raise InvalidRequest("body", f"{otherwise}: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("body", "Input should be an object")
    return fields


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _nested(fields: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under `key`, written as one or as a string holding JSON; empty when absent."""
    value = fields.get(key, {})
    if isinstance(value, str):
        try:
            value = from_json(value)
        except ValueError as error:
            raise InvalidRequest(key, f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(key, "must be an object or a string holding a JSON object")
    return _present(value)


def picture_ids(response_id: str, n: int) -> list[str]:
    """The ids of the `n` requests behind one HTTP request."""
    return [response_id] if n == 1 else [f"{response_id}-{picture}" for picture in range(n)]
