"""Latency through the whole stack against a plain diffusers loop of the same model, side by side.

    python bench/overhead.py [--config cluster_configs/cpu_local.yaml] [--sizes 512x512 1024x1024] [--pairs 7]

Starts the server with policy `sp1`, then alternates: the plain pipeline in this process (one thread on CPU),
the same request over HTTP. Prints the median ratio of the pairs, how long the replica stood idle between the
step ranges of a request, and whether both pictures are equal. Writes `overhead.md` and `.json` to --out.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("cluster_configs/cpu_local.yaml"))
    parser.add_argument("--sizes", nargs="+", default=["512x512", "1024x1024"], help="WIDTHxHEIGHT")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
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
    table = "\n".join(lines)
    print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "overhead.md").write_text(
        f"`python bench/overhead.py --config {options.config}`, torch {torch.__version__}, {device}\n\n{table}\n"
    )
    (options.out / "overhead.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
