"""The README's pictures of the page, from a real run on this machine.

    python docs/take_pictures.py [--out docs]

Starts `cluster_configs/cpu_local.yaml`, opens the page in Debian's Chromium (Playwright comes with the dev extra),
plays a few requests beside the one in the form, and writes `board.png`, the page while they run, and `run.gif`, the
picture of the form coming into being.
"""

from __future__ import annotations

import argparse
import io
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tetriserve.models.embedded.grammar import random_scene, write

PORT = 8017
URL = f"http://127.0.0.1:{PORT}"
PROMPT = "a large yellow ring above a small blue square on a green background"
CROWD = (("256x256", 6.0), ("512x512", 8.0), ("256x256", 6.0), ("512x512", 1.5), ("256x256", 6.0))
"""Size and deadline, s, of what runs beside; one cannot be met."""
FRAME_S = 0.5
FRAMES = 60
FRAME_WIDTH = 760


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    command = [str(Path(sys.executable).parent / "tetriserve"), "serve", "--port", str(PORT)]
    server = subprocess.Popen(
        [*command, "--config", "cluster_configs/cpu_local.yaml"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        if not any("tetriserve is ready" in line for line in server.stdout):
            raise SystemExit("the server did not start")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
            page = browser.new_page(viewport={"width": 1180, "height": 760})
            page.goto(URL)
            page.get_by_text("Live", exact=True).wait_for()
            board, frames = watch(page)
            browser.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
    (options.out / "board.png").write_bytes(board)
    small = [frame.resize((FRAME_WIDTH, frame.height * FRAME_WIDTH // frame.width)) for frame in frames]
    palette = small[-1].quantize(64)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in small]
    shown_ms = [int(1000 * FRAME_S)] * len(others) + [4000]
    first.save(options.out / "run.gif", save_all=True, append_images=others, duration=shown_ms, loop=0)


def watch(page: Page) -> tuple[bytes, list[Image.Image]]:
    """The page in mid-run, and all of the run."""
    crowd = [threading.Thread(target=ask, args=(i, *one)) for i, one in enumerate(CROWD)]
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Size").select_option("1024x1024")
    page.get_by_label("Steps", exact=True).fill("12")
    page.get_by_label("Deadline, s", exact=True).fill("40")
    page.get_by_role("button", name="Generate").click()
    frames: list[Image.Image] = []
    board = b""
    while len(frames) < FRAMES:
        if len(frames) % 3 == 0 and crowd:
            crowd.pop().start()
        shot = page.screenshot()
        frames.append(Image.open(io.BytesIO(shot)).convert("RGB"))
        if page.locator(".card .path").count():
            break
        if page.locator(".card img.preview").count():
            board = shot
        time.sleep(FRAME_S)
    return board, frames


def ask(number: int, size: str, slo_s: float) -> None:
    prompt = write(random_scene(random.Random(number), 2, held_out=False))
    body = {"prompt": prompt, "size": size, "num_inference_steps": 8, "seed": number, "slo_ms": 1000 * slo_s}
    httpx.post(f"{URL}/v1/images/generations", json=body, timeout=120).raise_for_status()


if __name__ == "__main__":
    main()
