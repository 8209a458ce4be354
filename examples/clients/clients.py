"""Python clients against a running server: `python clients.py openai|litellm|langchain URL`."""

from __future__ import annotations

import base64
import os
import sys
from typing import Any

PROMPT = "a small red circle"
WISHES: dict[str, Any] = {"num_inference_steps": 4, "slo_ms": 20000}
KEY = os.environ.get("OPENAI_API_KEY", "none")


def openai(url: str) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key=KEY)
    answer = client.images.generate(prompt=PROMPT, size="256x256", extra_body=WISHES)
    models = [model.id for model in client.models.list()]
    assert answer.data and answer.data[0].b64_json
    picture = base64.b64decode(answer.data[0].b64_json)
    edited = client.images.edit(image=("picture.png", picture), prompt=PROMPT, extra_body=WISHES)
    assert edited.data and edited.data[0].b64_json
    return f"{len(answer.data[0].b64_json)} characters, edited, usage {answer.usage}, models {models}"


def litellm(url: str) -> str:
    import litellm

    answer: Any = litellm.image_generation(
        PROMPT, "openai/default", size="256x256", api_base=f"{url}/v1", api_key=KEY, extra_body=WISHES
    )
    return f"{len(answer.data[0].b64_json)} characters"


def langchain(url: str) -> str:
    from langchain_openai import ChatOpenAI

    wishes = {"size": "256x256", **WISHES}
    chat: Any = ChatOpenAI(model="default", base_url=f"{url}/v1", api_key=KEY, extra_body=wishes)
    (part,) = chat.invoke(PROMPT).content
    assert part["image_url"]["url"].startswith("data:image/png;base64,")
    return f"{len(part['image_url']['url'])} characters"


if __name__ == "__main__":
    print(globals()[sys.argv[1]](sys.argv[2]))
