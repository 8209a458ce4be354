"""How often the embedded model draws what it is asked, by resolution, steps and variant.

    python bench/quality.py [--variants full light] [--sizes 256x256 1024x1024] [--steps 4 12] [--prompts 100]

Prompts are of combinations that training never saw, --prompts with one thing and as many with two;
`bench/adherence.py` judges. Every picture's verdict is kept in `quality.json` under --out, so a run that was cut
goes on and more cells can be added later; `quality.md` and the contact sheet cover all cells measured so far.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adherence import complaints
from diffusers import FluxPipeline
from PIL import Image, ImageDraw
from tqdm import tqdm

from tetriserve.models.embedded import embedded_folder
from tetriserve.models.embedded.grammar import Scene, random_scene, write

TEXT_TOKENS = 64  # as in cluster_configs/cpu_local.yaml
NAMES = {"full": "embedded", "light": "embedded-light"}
ROW = 10  # pictures a cell has on the contact sheet
THUMBNAIL = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument(
        "--sizes", nargs="+", default=["256x256", "512x512", "512x1024", "1024x1024"], help="WIDTHxHEIGHT"
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[12])
    parser.add_argument("--prompts", type=int, default=100, help="with one thing, and as many with two")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    scenes = held_out_scenes(options.prompts)
    path = options.out / "quality.json"
    cells: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path.exists() else {}
    (options.out / "rows").mkdir(parents=True, exist_ok=True)
    for variant in options.variants:
        pipeline: Any = FluxPipeline.from_pretrained(embedded_folder(NAMES[variant]))
        pipeline.set_progress_bar_config(disable=True)
        for size, steps in itertools.product(options.sizes, options.steps):
            name = f"{variant} {size} {steps}"
            measure(pipeline, name, size, steps, scenes, cells.setdefault(name, []), options.out)
            path.write_text(json.dumps(cells, indent=0) + "\n")
    table = report(cells)
    print(table)
    (options.out / "quality.md").write_text(
        "`python bench/quality.py`: pictures of held-out prompts that show what was asked, "
        f"judged by `bench/adherence.py`\n\n{table}\n"
    )
    contact_sheet(cells, options.out)


def held_out_scenes(count: int) -> list[Scene]:
    """`count` distinct scenes with one thing and as many with two, in turn; more begin with the same ones."""
    kinds = []
    for things in (1, 2):
        choice = random.Random(f"quality {things}")
        scenes: dict[Scene, None] = {}
        while len(scenes) < count:
            scenes[random_scene(choice, things, held_out=True)] = None
        kinds.append(scenes)
    return [scene for pair in zip(*kinds, strict=True) for scene in pair]


def measure(
    pipeline: Any,
    name: str,
    size: str,
    steps: int,
    scenes: list[Scene],
    results: list[dict[str, Any]],
    out: Path,
) -> None:
    """Append the verdicts of the scenes that `results` does not have yet."""
    width, height = map(int, size.split("x"))
    row: list[Image.Image] = []
    for index in tqdm(range(len(results), len(scenes)), desc=name, unit="picture"):
        scene = scenes[index]
        image = pipeline(
            write(scene),
            height=height,
            width=width,
            num_inference_steps=steps,
            max_sequence_length=TEXT_TOKENS,
            generator=torch.Generator("cpu").manual_seed(index),
        ).images[0]
        wrong = complaints(np.asarray(image), scene)
        results.append({"prompt": write(scene), "things": len(scene.things), "wrong": wrong})
        if index < ROW:
            row.append(thumbnail(image, bool(wrong)))
    if len(row) == ROW:
        side_by_side(row).save(out / "rows" / f"{name.replace(' ', '-')}.png")


def report(cells: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| variant | size | steps | one thing | two things | both |", "|---" * 6 + "|"]
    for name, results in cells.items():
        shares = []
        for kind in ((1,), (2,), (1, 2)):
            right = [not result["wrong"] for result in results if result["things"] in kind]
            shares.append(f"{100 * sum(right) // len(right)} % of {len(right)}" if right else "-")
        lines.append("| " + " | ".join(name.split() + shares) + " |")
    return "\n".join(lines)


def thumbnail(image: Image.Image, wrong: bool) -> Image.Image:
    """At most THUMBNAIL high and wide, with a magenta corner where the checker objected."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    if wrong:
        ImageDraw.Draw(small).polygon([(0, 0), (14, 0), (0, 14)], fill="magenta", outline="white")
    return small


def side_by_side(images: list[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (sum(image.width + 4 for image in images), THUMBNAIL), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + 4
    return row


def contact_sheet(cells: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """One row per cell: the first prompts, each in the same column; a magenta corner marks what was refused."""
    files = {name: out / "rows" / f"{name.replace(' ', '-')}.png" for name in cells}
    rows = {name: Image.open(path) for name, path in files.items() if path.exists()}
    if not rows:
        return
    width = max(row.width for row in rows.values())
    sheet = Image.new("RGB", (width, len(rows) * (THUMBNAIL + 20)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (name, row) in enumerate(rows.items()):
        top = index * (THUMBNAIL + 20)
        pen.text((2, top + 4), f"{name} steps", fill="black")
        sheet.paste(row, (0, top + 18))
    sheet.save(out / "contact_sheet.png")


if __name__ == "__main__":
    main()
