"""What it costs a request to be watched: latency with board, metrics and previews asked for, against nobody looking.

    python bench/watching.py [--sizes 512x512 1024x1024] [--pairs 41 5]

Starts the server with policy `sp1`, so that a core is left for what is not the model's work, and sends the same
request twice in turn: alone as a plain POST, and as a stream with progress and three previews while the live board is
asked for every second, as the page does, and `/metrics` too. Prints the median of the ratios of the pairs.
Writes `watching.md` and `.json` to --out. What the server records for board and metrics it records in both.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from policy_report import markdown_table
from server import CONFIG, running_server
from tqdm import tqdm

from tetriserve.simulation.result import write_json

PROMPT = "a small red circle above a large blue square"
BOARD_EVERY_S = 1.0
METRICS_EVERY_S = 1.0


@contextmanager
def watchers(url: str) -> Iterator[None]:
    """Somebody has the page open, and Prometheus scrapes."""
    over = threading.Event()

    def look(client: httpx.Client, path: str, every_s: float) -> None:
        while not over.wait(every_s):
            client.get(path).raise_for_status()

    looks = {"/v1/board?seconds=30": BOARD_EVERY_S, "/metrics": METRICS_EVERY_S}
    with ExitStack() as clients:
        threads = []
        for path, every_s in looks.items():
            # making a client takes this process 20 ms, in which it reads no answer
            client = clients.enter_context(httpx.Client(base_url=url, timeout=60))
            threads.append(threading.Thread(target=look, args=(client, path, every_s)))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--sizes", nargs="+", default=["512x512", "1024x1024"], help="WIDTHxHEIGHT")
    parser.add_argument(
        "--pairs", nargs="+", type=int, default=[9], help="one number for each size, or for all"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"))
    options = parser.parse_args()
    if len(options.pairs) not in (1, len(options.sizes)):
        parser.error("--pairs: one number for all sizes or one for each")
    repeated = options.pairs * (len(options.sizes) // len(options.pairs))
    pairs_of = dict(zip(options.sizes, repeated, strict=True))

    rows: list[dict[str, Any]] = []
    with (
        running_server(options.config, "sp1") as server,
        httpx.Client(base_url=server.url, timeout=600) as client,
    ):

        def alone(body: dict[str, Any]) -> float:
            begin = time.perf_counter()
            client.post("/v1/images/generations", json=body).raise_for_status()
            return time.perf_counter() - begin

        def watched(body: dict[str, Any]) -> tuple[float, int]:
            """Seconds until all is there, and the number of previews."""
            stream = {"stream": True, "progress": True, "partial_images": 3}
            with watchers(server.url):
                begin = time.perf_counter()
                with client.stream("POST", "/v1/images/generations", json=body | stream) as answer:
                    events = [line for line in answer.iter_lines() if line.startswith("event: ")]
                seconds = time.perf_counter() - begin
            assert events[-1].endswith("image_generation.completed"), events
            return seconds, sum(event.endswith("partial_image") for event in events)

        for size in options.sizes:
            pairs = []
            for seed in tqdm(range(pairs_of[size] + 1), desc=size):
                body = {"prompt": PROMPT, "size": size, "seed": seed, "num_inference_steps": options.steps}
                alone_s = 0.0 if seed % 2 else alone(body)
                watched_s, previews = watched(body)
                alone_s = alone_s or alone(body)
                pairs.append({"alone_s": alone_s, "watched_s": watched_s, "previews": previews})
            rows.append({"size": size, "steps": options.steps, "pairs": pairs[1:]})  # the first one warms up

    head = ["size", "steps", "alone s", "watched s", "ratio (median)", "ratios", "previews"]
    body_rows = []
    for row in rows:
        ratios = [pair["watched_s"] / pair["alone_s"] for pair in row["pairs"]]
        median = {key: statistics.median(pair[key] for pair in row["pairs"]) for key in row["pairs"][0]}
        body_rows.append(
            [
                row["size"],
                str(row["steps"]),
                f"{median['alone_s']:.3f}",
                f"{median['watched_s']:.3f}",
                f"{statistics.median(ratios):.3f}",
                " ".join(f"{ratio:.3f}" for ratio in ratios),
                f"{median['previews']:g}",
            ]
        )
    table = markdown_table(head, body_rows)
    print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    asked = " ".join(map(str, options.pairs))
    (options.out / "watching.md").write_text(
        f"`python bench/watching.py --config {options.config} --pairs {asked}`\n\n{table}\n"
    )
    write_json(options.out / "watching.json", rows)


if __name__ == "__main__":
    main()
