"""The compiled model against the same one as it is, on CPU processes, side by side in one run.

    python bench/compiled.py [--model embedded] [--sizes 256x256 512x512 1024x1024] [--gpus 2] [--pairs 5]

Each process holds both. First the compiled one is warmed at degree 1 for all sizes, as a replica does before it
says that it is ready; then every size runs at every degree, turn by turn. Prints the step times, how far the latents
differ, and how many graphs there were. Writes `compiled.md` and, row by row, `compiled.jsonl` to --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from solver.placement import group_sets
from tetriserve.engine.adapter import ModelLimits
from tetriserve.engine.compiled import compile_blocks
from tetriserve.engine.engine import Engine
from tetriserve.engine.groups import GroupTable
from tetriserve.engine.kernels import attention_kernel
from tetriserve.models.load import load_model
from tetriserve.request import GenerateRequest, Shape

CPU = torch.device("cpu")
STEPS = 4


def engine(options: argparse.Namespace, groups: GroupTable) -> Engine:
    adapter = load_model(
        options.model,
        ModelLimits("bench", max_sequence_length=options.text_tokens),
        attention_kernel("auto", CPU),
        dtype=torch.float32,
        device=CPU,
    )
    return Engine(adapter, groups)


def graphs() -> dict[str, int]:
    counters = torch._dynamo.utils.counters
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


def run(which: Engine, shape: Shape, gpus: tuple[int, ...], seq: int) -> tuple[float, torch.Tensor]:
    """Seconds of a step, and the latents behind the last."""
    request = GenerateRequest("a small red circle", shape.height, shape.width, STEPS, seed=seq)
    which.encode("r", request)
    which.denoise("r", gpus, 0, 1, seq=seq)
    report = which.denoise("r", gpus, 1, STEPS - 1, seq=seq)
    latents = which.pack("r").tensor.array
    which.release("r")
    return (report.ended_s - report.started_s) / (STEPS - 1), torch.from_numpy(latents.copy())


def rank(gpu: int, folder: Path, options: argparse.Namespace) -> None:
    """Every process runs the same ranges in the same order; the first one tells of them."""
    torch.set_num_threads(1)
    groups = GroupTable(gpu, CPU, folder)
    groups.warm(group_sets(options.gpus), -1)
    plain, compiled = engine(options, groups), engine(options, groups)
    for transformer in compiled.adapter.transformers():
        compile_blocks(transformer)

    def tell(**row: Any) -> None:
        if gpu == 0:
            print(json.dumps(row), flush=True)
            with (options.out / "compiled.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    shapes = [Shape(*map(int, reversed(size.split("x")))) for size in options.sizes]
    for shape in shapes:
        start_s = time.monotonic()
        run(compiled, shape, (gpu,), 0)
        tell(warmed=str(shape), seconds=round(time.monotonic() - start_s, 1), **graphs())
    for shape in shapes:
        for degree in (degree for degree in (1, 2, 4, 8) if degree <= options.gpus):
            gpus = tuple(range(degree))
            if gpu not in gpus:
                continue
            pairs = []
            for pair in range(options.pairs):
                order = (plain, compiled) if pair % 2 else (compiled, plain)
                made = {id(which): run(which, shape, gpus, pair) for which in order}
                (plain_s, latents), (compiled_s, others) = made[id(plain)], made[id(compiled)]
                error = ((latents - others).abs().max() / latents.abs().max()).item()
                pairs.append((plain_s, compiled_s, error))
            plain_s, compiled_s, _ = (statistics.median(column) for column in zip(*pairs, strict=True))
            tell(
                size=str(shape),
                degree=degree,
                plain_ms=round(1e3 * plain_s, 2),
                compiled_ms=round(1e3 * compiled_s, 2),
                ratio=round(compiled_s / plain_s, 3),
                latents_differ=max(error for *_, error in pairs),
                **graphs(),
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument(
        "--sizes", nargs="+", default=["256x256", "512x512", "1024x1024"], help="WIDTHxHEIGHT"
    )
    parser.add_argument("--gpus", type=int, default=2, help="processes")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "compiled.jsonl").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (Path(folder), options), nprocs=options.gpus)
    rows = [json.loads(line) for line in (options.out / "compiled.jsonl").read_text().splitlines()]
    columns = ("size", "degree", "plain_ms", "compiled_ms", "ratio", "latents_differ", "graphs", "breaks")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(str(row[column]) for column in columns)} |" for row in rows if "size" in row]
    warmed = ", ".join(
        f"{row['warmed']} {row['seconds']} s ({row['graphs']} graphs)" for row in rows if "warmed" in row
    )
    text = (
        f"`python bench/compiled.py`, torch {torch.__version__}\n\nWarmed: {warmed}.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    (options.out / "compiled.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
