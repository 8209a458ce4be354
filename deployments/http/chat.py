"""`POST /v1/chat/completions`, as vLLM-Omni serves pictures by it: the last words of the user are the prompt."""

from __future__ import annotations

import base64
from typing import Any

from deployments.config import HTTPArgs
from deployments.http.bodies import ImageRequest, json_object
from deployments.http.responses import metrics_body
from tetriserve.errors import InvalidRequest
from tetriserve.request import GenerateResult

OF_CHATS = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "stop")
"""Clients send them with every chat; none is about pictures."""


_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"type": "string"}, "content": {"type": ["string", "array"]}},
}
_OF_PICTURES = {k: v for k, v in ImageRequest.model_json_schema()["properties"].items() if k != "prompt"}
CHAT_SCHEMA = {
    "type": "object",
    "required": ["messages"],
    "properties": {"messages": {"type": "array", "minItems": 1, "items": _MESSAGE}, **_OF_PICTURES},
}
"""Of the body, for the OpenAPI document."""


def parse_chat(body: bytes, http: HTTPArgs) -> ImageRequest:
    """The request for pictures in a chat; its fields are those of `ImageRequest`. Raises `InvalidRequest` naming the
    first wrong one."""
    chat = json_object(body)
    fields = {name: value for name, value in chat.items() if name not in ("messages", *OF_CHATS)}
    if fields.get("stream"):
        raise InvalidRequest("stream", "pictures are streamed by /v1/images/generations only")
    for place in (fields, fields.get("extra_body")):
        if isinstance(place, dict) and place.pop("num_frames", 1) not in (1, None):
            raise InvalidRequest("num_frames", "pictures only, 1 is allowed")
    fields |= {"prompt": _last_words(chat.get("messages")), "response_format": "b64_json"}
    return ImageRequest.checked(fields, http)


def _last_words(messages: Any) -> str:
    """Of the user."""
    if not isinstance(messages, list):
        raise InvalidRequest("messages", "must be a list of {role, content}")
    for message in reversed(messages):
        if not isinstance(message, dict):
            raise InvalidRequest("messages", "must be a list of {role, content}")
        if message.get("role") == "user":
            return _text(message.get("content"))
    raise InvalidRequest("messages", "none has the role user")


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(
            "messages", "content of the user must be text: a string, or a list of text parts"
        )
    return "\n".join(map(str, texts))


def chat_response(
    request: ImageRequest,
    response_id: str,
    results: list[GenerateResult],
    slowest: GenerateResult,
    contents: list[bytes],
) -> dict[str, Any]:
    """Body of the answer: a choice for each picture, a data URL in it."""

    def choice(index: int, result: GenerateResult, content: bytes) -> dict[str, Any]:
        metrics = metrics_body(result.metrics)
        data = base64.b64encode(content).decode()
        part = {
            "type": "image_url",
            "image_url": {"url": f"data:image/{request.output_format};base64,{data}"},
            "stage_durations": metrics["stage_durations"],
            "peak_memory_mb": metrics["peak_memory_mb"],
        }
        return {"index": index, "message": {"role": "assistant", "content": [part]}, "finish_reason": "stop"}

    return {
        "id": response_id,
        "object": "chat.completion",
        "created": int(slowest.created_s),
        "model": slowest.model,
        "choices": [choice(i, *one) for i, one in enumerate(zip(results, contents, strict=True))],
        "metrics": metrics_body(slowest.metrics),
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }
