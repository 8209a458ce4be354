"""A batch of pictures until a time of day, beside others who are in a hurry.

    python examples/batch_job.py prompts.txt --until 300 --out pictures/

One prompt a line. Every picture gets the time that is left as its deadline, so the packer fits the batch in where it
costs others least; what would be too late is not made at all (`drop_late`). Each request has an `Idempotency-Key`:
one that is sent again after a broken connection joins the one that runs. A job that was cut off can be started
again: pictures that are there are not asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm


async def make(client: httpx.AsyncClient, prompt: str, file: Path, end_s: float, size: str) -> str:
    """What became of one prompt: "made", or why not."""
    if file.exists():
        return "made"
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    body: dict[str, Any] = {
        "prompt": prompt,
        "size": size,
        "slo_ms": 1000 * max(end_s - time.time(), 0.001),
        "drop_late": True,
        "priority": -1,
    }
    while time.time() < end_s:
        try:
            answer = await client.post("/v1/images/generations", json=body, headers=headers)
        except httpx.TransportError:
            await asyncio.sleep(1.0)
            continue
        if answer.status_code == 200:
            file.write_bytes(base64.b64decode(answer.json()["data"][0]["b64_json"]))
            return "made"
        if "retry-after" not in answer.headers:
            return str(answer.json()["error"]["code"])
        await asyncio.sleep(float(answer.headers["retry-after"]))
    return "out of time"


async def run(options: argparse.Namespace) -> int:
    prompts = [line.strip() for line in options.prompts.read_text().splitlines() if line.strip()]
    options.out.mkdir(parents=True, exist_ok=True)
    end_s = time.time() + options.until
    key = os.environ.get("TETRISERVE_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    at_once = asyncio.Semaphore(options.at_once)
    bar = tqdm(total=len(prompts), unit="picture")

    async def one(client: httpx.AsyncClient, number: int, prompt: str) -> str:
        async with at_once:
            outcome = await make(client, prompt, options.out / f"{number:04d}.png", end_s, options.size)
        bar.update()
        return outcome

    async with httpx.AsyncClient(base_url=options.url, headers=headers, timeout=None) as client:
        outcomes = await asyncio.gather(*(one(client, *item) for item in enumerate(prompts)))
    bar.close()
    for number, (prompt, outcome) in enumerate(zip(prompts, outcomes, strict=True)):
        if outcome != "made":
            print(f"{number:04d} {outcome}: {prompt}")
    print(f"{outcomes.count('made')} of {len(prompts)} pictures in {options.out}")
    return 0 if outcomes.count("made") == len(prompts) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--until", type=float, default=300.0, metavar="SECONDS", help="from now")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    raise SystemExit(main())
