"""OpenAI's own Python client against a tetriserve server, with a deadline.

    python examples/openai_client.py "a small red circle" --slo 5 --out circle.png

`OPENAI_BASE_URL` says where the server is (default http://127.0.0.1:8000/v1), `OPENAI_API_KEY` is its API key if it
asks for one.
"""

from __future__ import annotations

import argparse
import base64
import os
from pathlib import Path

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("prompt")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--slo", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    options = parser.parse_args()

    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    answer = client.images.generate(
        prompt=options.prompt, size=options.size, extra_body={"slo_ms": 1000 * options.slo}
    )
    assert answer.data and answer.data[0].b64_json
    options.out.write_bytes(base64.b64decode(answer.data[0].b64_json))
    metrics = answer.model_dump()["metrics"]  # what OpenAI's types do not know is kept
    outcome = "met" if metrics["slo_met"] else "missed"
    print(f"{options.out}: {metrics['stage_durations']['total']:.2f} s, deadline {outcome}")
    for part in metrics["steps"]:
        print(f"  {part['steps']} steps at SP {part['degree']} on GPUs {part['gpus']}")


if __name__ == "__main__":
    main()
