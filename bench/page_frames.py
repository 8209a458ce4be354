"""Is the page smooth with a full board? 64 GPUs, 500 open requests, in a real browser without a GPU of its own.

    python bench/page_frames.py [--seconds 10]

Opens the page in Chromium (`apt-get install chromium`), answers `/v1/board` with a made-up board as a cell makes it,
new at every question, and prints how long frames took and how long the board's drawing took of them. Writes
`page_frames.md` to --out.
"""

from __future__ import annotations

import argparse
import json
import mimetypes
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import Route, sync_playwright
from policy_report import markdown_table

from tetriserve.request import Execution, Shape
from tetriserve.scheduler.history import History, Plan, Run

PAGE = Path(__file__).parents[1] / "deployments" / "page"
URL = "http://page.test/"
N_GPUS, OPEN, PAST_S, AHEAD_S = 64, 500, 30, 2.0

WATCH = """
async ms => {
  const board = (await import("/page/board.js")).Board.prototype, draw = board.draw, drawn = [], frames = [];
  board.draw = function () {
    const begin = performance.now();
    draw.call(this);
    drawn.push(performance.now() - begin);
  };
  const end = performance.now() + ms;
  await new Promise(resolve => {
    const frame = now => { frames.push(now); now < end ? requestAnimationFrame(frame) : resolve(); };
    requestAnimationFrame(frame);
  });
  return {drawn, frames, rectangles: window.tetriserve.rectangles().length};
}
"""


def full_board(now_s: float) -> str:
    """What a cell says whose GPUs were never idle and that has `OPEN` requests."""
    choice = random.Random(0)
    history = History(N_GPUS, now_s - 1000)
    names = [f"r{number}" for number in range(OPEN)]
    for name in names:
        arrival_s = now_s - choice.uniform(0, PAST_S)
        shape, deadline_s = Shape(1024, 1024), arrival_s + choice.uniform(5, 60)
        history.arrived(name, name, None, shape, 28, arrival_s, deadline_s)
    ahead = []
    for first in range(0, N_GPUS, 4):
        start_s = now_s - PAST_S
        while start_s < now_s + AHEAD_S:
            end_s = start_s + choice.uniform(0.2, 1.5)
            gpus = tuple(range(first, first + choice.choice((1, 2, 4))))
            run = Run(choice.choice(names), Execution("denoise", 5, gpus, start_s, end_s))
            if end_s < now_s:
                history.ran(*run)
            else:
                ahead.append(run)
            start_s = end_s
    for number in range(400):
        history.planned(Plan(now_s - number / 14, 0.01, False, now_s - number / 14))
    board = history.board(now_s, PAST_S, None, ahead, ["ready"] * N_GPUS)
    return json.dumps({"seconds": PAST_S, "cells": [{"cell": 0, **board}]})


def answer(route: Route) -> None:
    """The page's files, and a board; nothing else is there."""
    path = route.request.url.removeprefix(URL).split("?")[0]
    file = PAGE / (path.removeprefix("page/") or "index.html")
    if path == "v1/board":
        route.fulfill(content_type="application/json", body=full_board(time.time()))
    elif file.is_file():
        route.fulfill(content_type=mimetypes.guess_type(file.name)[0], body=file.read_bytes())
    else:
        route.fulfill(status=404, json={"error": {"message": "not here"}})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"))
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("no chromium here: apt-get install chromium")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--disable-gpu"], chromium_sandbox=False
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.route("**/*", answer)
        page.goto(URL)
        page.wait_for_function("window.tetriserve?.rectangles().length > 0")
        seen = page.evaluate(WATCH, 1000 * options.seconds)
        browser.close()

    frames_ms = np.diff(seen["frames"])
    rows = [
        [name, *(f"{value:.1f}" for value in (np.median(ms), np.quantile(ms, 0.99), np.max(ms)))]
        for name, ms in (("frame", frames_ms), ("drawing the board", np.array(seen["drawn"])))
    ]
    table = markdown_table(["ms", "median", "p99", "longest"], rows)
    text = (
        f"`python bench/page_frames.py --seconds {options.seconds:g}`: {N_GPUS} GPUs, {OPEN} open requests, "
        f"{seen['rectangles']} rectangles, {1000 / frames_ms.mean():.0f} frames a second\n\n{table}\n"
    )
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "page_frames.md").write_text(text)


if __name__ == "__main__":
    main()
