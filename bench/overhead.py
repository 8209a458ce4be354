"""Latency through the whole stack against a plain diffusers loop of the same model, side by side.

    python bench/overhead.py [--config cluster_configs/cpu_local.yaml] [--sizes 512x512 1024x1024] [--pairs 7]

Starts the server with policy `sp1`, then alternates: the plain pipeline in this process (one thread on CPU),
the same request over HTTP. Prints the median ratio of the pairs, how long the replica stood idle between the
step ranges of a request, and whether both pictures are equal.

Then the stack's own milliseconds: one request of 128x128 and one step at a time on the idle cell, over HTTP and
over the Python handle, from the call to the picture less what the replica computed, and where they go. Writes
`overhead.md` and `.json` to --out.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from server import running_server
from tqdm import tqdm

from tetriserve.models.embedded import EMBEDDED, embedded_folder

PROMPT = "a small red circle above a large blue square"


def plain_pipeline(model: dict[str, Any], device: str) -> Any:
    """The pipeline as anyone would load it."""
    folder = embedded_folder(model["path"]) if model["path"] in EMBEDDED else model["path"]
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, model["dtype"])).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PARTS = ("to the scheduler", "to the first range", "between ranges", "behind the decode")


def where_it_goes(sent_s: float, got_s: float, metrics: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of one request, Unix seconds given: the replica's own, and the others by `PARTS`.

    `metrics` as HTTP has them.
    """
    ranges = sorted(metrics["schedule"], key=lambda part: part["start_s"])
    computed_s = sum(part["end_s"] - part["start_s"] for part in ranges)
    first_s, last_s = ranges[0]["start_s"], ranges[-1]["end_s"]
    parts = (
        metrics["arrival_s"] - sent_s,
        first_s - metrics["arrival_s"],
        last_s - first_s - computed_s,
        got_s - last_s,
    )
    return {
        "total": 1e3 * (got_s - sent_s),
        "added": 1e3 * (got_s - sent_s - computed_s),
        **{name: 1e3 * seconds for name, seconds in zip(PARTS, parts, strict=True)},
    }


def over_http(client: httpx.Client, size: str, steps: int, requests: int) -> dict[str, float]:
    """Medians of `where_it_goes`, one request at a time; the first two are not counted."""
    rows = []
    for seed in range(2 + requests):
        body = {"prompt": PROMPT, "size": size, "num_inference_steps": steps, "seed": seed}
        sent_s = time.time()
        response = client.post("/v1/images/generations", json=body).raise_for_status()
        got_s = time.time()
        metrics = response.json()["metrics"]
        rows.append({**where_it_goes(sent_s, got_s, metrics), "peak_memory_mb": metrics["peak_memory_mb"]})
    return medians(rows[2:])


def over_handle(size: str, steps: int, requests: int) -> dict[str, float]:
    """The same by a Python handle on the same Ray; the picture comes as pixels, not as PNG."""
    import ray
    from ray import serve

    from tetriserve.request import GenerateRequest

    width, height = map(int, size.split("x"))
    ray.init(address="auto", namespace="serve", log_to_driver=False, logging_level=logging.ERROR)
    try:
        handle, rows = serve.get_app_handle("tetriserve"), []
        for seed in range(2 + requests):
            request = GenerateRequest(PROMPT, height, width, steps, seed=seed)
            sent_s = time.time()
            result = handle.generate.remote(request).result()
            got_s = time.time()
            ran = [{"start_s": run.start_s, "end_s": run.end_s} for run in result.metrics.schedule]
            metrics = {"schedule": ran, "arrival_s": result.metrics.arrival_s}
            rows.append(where_it_goes(sent_s, got_s, metrics))
    finally:
        ray.shutdown()
    return medians(rows[2:])


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("cluster_configs/cpu_local.yaml"))
    parser.add_argument("--sizes", nargs="+", default=["512x512", "1024x1024"], help="WIDTHxHEIGHT")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--requests", type=int, default=40, help="for the stack's own milliseconds")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"))
    options = parser.parse_args()

    args = yaml.safe_load(options.config.read_text())["applications"][0]["args"]
    model, device = args["model"], args["cell"]["device"]
    if device == "cpu":
        torch.set_num_threads(1)
    pipeline = plain_pipeline(model, device)
    text_tokens = (
        {"max_sequence_length": model["max_sequence_length"]} if "max_sequence_length" in model else {}
    )

    def plain(width: int, height: int, seed: int) -> tuple[float, np.ndarray]:
        begin = time.perf_counter()
        image = pipeline(
            PROMPT,
            width=width,
            height=height,
            num_inference_steps=options.steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            **text_tokens,
        ).images[0]
        return time.perf_counter() - begin, np.asarray(image)

    with (
        running_server(options.config, "sp1") as server,
        httpx.Client(base_url=server.url, timeout=600) as client,
    ):

        def stack(width: int, height: int, seed: int) -> tuple[float, np.ndarray, dict[str, Any]]:
            body = {
                "prompt": PROMPT,
                "size": f"{width}x{height}",
                "seed": seed,
                "num_inference_steps": options.steps,
            }
            begin = time.perf_counter()
            answer = client.post("/v1/images/generations", json=body).raise_for_status().json()
            seconds = time.perf_counter() - begin
            picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
            return seconds, np.asarray(picture), answer

        rows = []
        for size in options.sizes:
            width, height = map(int, size.split("x"))
            plain(width, height, 0)
            stack(width, height, 0)
            pairs = []
            for seed in tqdm(range(1, options.pairs + 1), desc=size):
                if seed % 2:
                    plain_s, expected = plain(width, height, seed)
                    stack_s, got, answer = stack(width, height, seed)
                else:
                    stack_s, got, answer = stack(width, height, seed)
                    plain_s, expected = plain(width, height, seed)
                stages = answer["metrics"]["stage_durations"]
                working_s = stages["encode"] + stages["denoise"] + stages["decode"]
                pairs.append(
                    {
                        "plain_s": plain_s,
                        "stack_s": stack_s,
                        "ratio": stack_s / plain_s,
                        "idle_share": 1 - working_s / answer["inference_time_s"],
                        "max_pixel_difference": int(np.abs(expected.astype(int) - got).max()),
                    }
                )
            rows.append({"size": size, "steps": options.steps, "pairs": pairs})
        own = {"HTTP": over_http(client, "128x128", 1, options.requests)}
        own["handle"] = over_handle("128x128", 1, options.requests)

    lines = [
        "| size | steps | plain s | whole stack s | ratio (median) | ratios | idle between ranges | pictures |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        pairs = row["pairs"]
        median = {key: statistics.median(pair[key] for pair in pairs) for key in pairs[0]}
        ratios = " ".join(f"{pair['ratio']:.3f}" for pair in pairs)
        same = "equal" if all(pair["max_pixel_difference"] <= 1 for pair in pairs) else "DIFFER"
        lines.append(
            f"| {row['size']} | {row['steps']} | {median['plain_s']:.3f} | {median['stack_s']:.3f} "
            f"| {median['ratio']:.3f} | {ratios} | {100 * median['idle_share']:.2f} % | {same} |"
        )
    columns = ("total", "added", *PARTS)
    lines += ["", f"| ms, medians of {options.requests} | {' | '.join(columns)} |", "|---" * 7 + "|"]
    lines += [f"| {way} | {' | '.join(f'{ms[key]:.1f}' for key in columns)} |" for way, ms in own.items()]
    table = "\n".join(lines)
    print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "overhead.md").write_text(
        f"`python bench/overhead.py --config {options.config}`, torch {torch.__version__}, {device}\n\n{table}\n"
    )
    (options.out / "overhead.json").write_text(json.dumps({"pairs": rows, "own_ms": own}, indent=1) + "\n")


if __name__ == "__main__":
    main()
