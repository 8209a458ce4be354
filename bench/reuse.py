"""What reuse of steps saves and costs: pictures of the embedded model with steps extrapolated, against all of them
computed and against simply asking for fewer steps.

    python bench/reuse.py [--cells 256x256:12:100 512x512:12:20 ...] [--every 2 3 4] [--out bench/results/reuse]

A cell is SIZE:STEPS:PROMPTS; prompts are those of bench/quality.py, `bench/adherence.py` judges. Every picture's row
is kept in `reuse.json` under --out, so a run that was cut goes on. Prints, and writes to `reuse.md`: the share of
steps that are not computed, PSNR to the picture with all of them (median and worst), CPU seconds as a share of its,
and pictures that show what was asked; "N steps" is the plain model with as many steps as the level computes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adherence import complaints
from quality import TEXT_TOKENS, held_out_scenes
from tqdm import tqdm

from tetriserve.engine.adapter import ModelAdapter, ModelLimits
from tetriserve.engine.engine import Engine
from tetriserve.engine.groups import GroupTable
from tetriserve.engine.kernels import attention_kernel
from tetriserve.models.embedded.grammar import write
from tetriserve.models.load import load_model
from tetriserve.request import GenerateRequest
from tetriserve.reuse import computed_steps

CELLS = ("256x256:8:100", "256x256:12:100", "256x256:28:100", "512x512:12:40", "1024x1024:12:6")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", default=CELLS, metavar="SIZE:STEPS:PROMPTS")
    parser.add_argument("--every", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("bench/results/reuse"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "reuse.json"
    rows: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path.exists() else {}
    device = torch.device("cpu")
    adapter = load_model(
        "embedded",
        ModelLimits("embedded", max_sequence_length=TEXT_TOKENS),
        attention_kernel("auto", device),
        dtype=torch.float32,
        device=device,
    )
    engine = Engine(adapter, GroupTable(0, device, options.out))
    for cell in options.cells:
        size, steps, prompts = cell.split(":")
        name = f"{size} {steps}"
        measure(engine, size, int(steps), int(prompts), options.every, rows.setdefault(name, []), path, rows)
    table = report(rows)
    print(table)
    (options.out / "reuse.md").write_text(f"`python bench/reuse.py`\n\n{table}\n")


def measure(
    engine: Engine,
    size: str,
    steps: int,
    prompts: int,
    every: list[int],
    kept: list[dict[str, Any]],
    path: Path,
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    """Append a row for each prompt that `kept` does not have yet."""
    width, height = map(int, size.split("x"))
    scenes = held_out_scenes((prompts + 1) // 2)[:prompts]
    for index in tqdm(range(len(kept), len(scenes)), desc=f"{size}, {steps} steps", unit="prompt"):
        scene = scenes[index]

        def picture(number: int, reuse: int = 1, seed: int = index, prompt: str = write(scene)) -> Any:
            return made(
                engine,
                GenerateRequest(prompt, height, width, number, seed=seed, reuse_every=reuse),
            )

        whole, whole_s = picture(steps)
        row: dict[str, Any] = {"all": {"right": not complaints(whole, scene), "cpu_s": whole_s}}
        for k in every:
            number = len(computed_steps(steps, k))
            for way, (image, cpu_s) in {
                f"every {k}": picture(steps, k),
                f"{number} steps": picture(number),
            }.items():
                right = not complaints(image, scene)
                row[way] = {"right": right, "cpu_s": cpu_s, "psnr": psnr(image, whole), "computed": number}
        kept.append(row)
        path.write_text(json.dumps(rows, indent=0) + "\n")


def made(engine: Engine, request: GenerateRequest) -> tuple[np.ndarray, float]:
    """The picture, and the CPU seconds of its denoising."""
    adapter: ModelAdapter = engine.adapter
    engine.encode("r", request)
    began_s = time.process_time()
    engine.denoise("r", (0,), 0, len(adapter.info.computed_steps(request)))
    cpu_s = time.process_time() - began_s
    _, image = engine.decode("r")
    engine.release("r")
    return image, cpu_s


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """dB of uint8 pictures; 99 for equal ones."""
    error = float(((image.astype(float) - reference) ** 2).mean())
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def report(rows: dict[str, list[dict[str, Any]]]) -> str:
    head = "| size, steps | way | not computed | PSNR, dB (worst) | CPU time of all | shows what was asked |"
    lines = [head, "|---" * 6 + "|"]
    for name, kept in rows.items():
        steps = int(name.split()[1])
        for way in kept[0] if kept else ():
            found = [row[way] for row in kept]
            right = f"{sum(one['right'] for one in found)} of {len(found)}"
            if way == "all":
                lines.append(f"| {name} | all computed | - | - | 1 | {right} |")
                continue
            saved = 1 - found[0]["computed"] / steps
            decibels = [one["psnr"] for one in found]
            share = statistics.median(row[way]["cpu_s"] / row["all"]["cpu_s"] for row in kept)
            psnrs = f"{statistics.median(decibels):.1f} ({min(decibels):.1f})"
            lines.append(f"| | {way} | {100 * saved:.0f} % | {psnrs} | {share:.2f} | {right} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
