"""What one GPU can show, in one command, without network and without a second try.

    python bench/gpu/run.py --out DIR [--minutes 9] [--small] [--only PART ...] [--again]

Parts run in the order of their worth, each in a process of its own under a time limit, and write rows to
`DIR/PART.jsonl` as they know them: a part that hangs or is cut loses nothing but itself, and a second call goes on
with the parts that did not end well. After each part `DIR/report.md` and `DIR/raw.json` are written anew, and once
steps are measured `flux_GPU_measured.yaml` too, a profile for `tetriserve simulate` (on CUDA also in bench/profiles).

Without a GPU everything runs on the CPU; --small is in a size for that and takes about two minutes. What to carry
where nothing can be downloaded: bench/gpu/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from models import FLUX_BYTES, write_flux
from record import ROOT, Place, Rows, roomy_folder, rows_of

from tetriserve.engine.environment import ENVIRONMENT
from tetriserve.profile import Profile

PROFILES = Path(__file__).parents[1] / "profiles"
KILL_S = 5.0
FOLDER_S = 120.0


@dataclass(frozen=True)
class Part:
    """`module` holds the function `name`; `cap_s` is what it may take on a GPU."""

    name: str
    module: str
    cap_s: float
    title: str
    needs_folder: bool = False


PARTS = (
    Part("machine", "run", 40, "The machine"),
    Part("gloo", "groups", 110, "Degrees over gloo: members equal, distance to SP 1"),
    Part("nccl", "groups", 120, "NCCL between two ranks of one GPU: exchange, hang, kill, rejoin"),
    Part("folder", "steps", 120, "Loading in FLUX.1-dev's dimensions, by component"),
    Part(
        "flux",
        "steps",
        170,
        "FLUX.1-dev's dimensions: steps, kernels, degrees without exchange, decode",
        True,
    ),
    Part("batches", "steps", 60, "Step batches of one shape, plain transformer", True),
    Part("stack", "stack", 150, "The whole Serve stack at 4 steps", True),
    Part("compiled", "steps", 90, "The same steps compiled", True),
    Part("errors", "errors", 60, "What the libraries say when they fail"),
    Part("families", "steps", 110, "Other families' dimensions: SD3.5 large, Z-Image, Qwen-Image"),
    Part("defaults", "groups", 110, "torch's own NCCL settings after a kill"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="for all of it; what does not fit is left out"
    )
    parser.add_argument("--small", action="store_true", help="in a size for CPU cores")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names)
    )
    parser.add_argument("--again", action="store_true", help="also parts that DIR has already")
    parser.add_argument(
        "--scratch", type=Path, help="folder for model weights; default: in memory if there is room"
    )
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)  # one of them, in this process
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        place = Place(options.out, device, options.small, options.scratch)
        run_part(place, next(part for part in PARTS if part.name == options.part))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up as after Ctrl-C
    end_s = time.monotonic() + 60 * options.minutes
    root = options.scratch or roomy_folder(1 << 30 if options.small else FLUX_BYTES)
    scratch = Path(tempfile.mkdtemp(prefix="tetriserve-gpu-", dir=root))
    try:
        for part in PARTS:
            done = {row["part"] for row in rows_of(options.out, "parts") if row["ended"] == "well"}
            if part.name not in options.only or (part.name in done and not options.again):
                continue
            if part.needs_folder and not (scratch / "flux").exists():  # its part ran in an earlier call
                child = multiprocessing.get_context("spawn").Process(
                    target=write_flux,
                    args=(Place(options.out, device, options.small, scratch), scratch / "flux"),
                )
                child.start()
                child.join(FOLDER_S)
                child.kill()
            supervise(options, part, scratch, end_s - time.monotonic())
            write_report(options.out, device, options.small)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"wrote {options.out / 'report.md'}")


def run_part(place: Place, part: Part) -> None:
    """In this process."""
    if not place.on_cuda:
        torch.set_num_threads(1)
    module = sys.modules[__name__] if part.module == "run" else __import__(part.module)
    run: Callable[[Place, Rows], None] = getattr(module, part.name)
    run(place, Rows(place.out, part.name))


def supervise(options: argparse.Namespace, part: Part, scratch: Path, left_s: float) -> None:
    """In a process of its own, ended with all its children when it takes too long."""
    limit_s = min(part.cap_s, left_s - KILL_S)
    ends = Rows(options.out, "parts")
    print(f"{part.name}: {part.title}, at most {limit_s:.0f} s", flush=True)
    if limit_s < part.cap_s / 4:
        ends.add(part=part.name, ended="left out", seconds=0.0, why=f"{left_s:.0f} s were left")
        return
    if part.name != "machine":  # rows of an earlier try
        (options.out / f"{part.name}.jsonl").unlink(missing_ok=True)
    command = [
        sys.executable,
        __file__,
        "--out",
        str(options.out),
        "--part",
        part.name,
        "--scratch",
        str(scratch),
    ]
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    start_s = time.monotonic()
    process = subprocess.Popen(
        [*command, *(["--small"] if options.small else [])],
        cwd=ROOT,
        env={**ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stderr=(options.out / f"{part.name}.log").open("w"),
        start_new_session=True,
    )
    try:
        code = process.wait(timeout=limit_s)
        ended = "well" if code == 0 else f"with exit code {code}"
    except subprocess.TimeoutExpired:
        ended = f"cut after {limit_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    log = options.out / f"{part.name}.log"
    why = "" if ended == "well" else " ".join(log.read_text(errors="replace").split())[-400:]
    ends.add(part=part.name, ended=ended, seconds=time.monotonic() - start_s, why=why)
    if ended == "well":
        log.unlink()


def machine(place: Place, rows: Rows) -> None:
    """Versions and the device."""
    versions = {}
    for name in ("torch", "diffusers", "transformers", "accelerate", "numpy", "ray"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    rows.add(python=sys.version.split()[0], cpus=os.cpu_count(), **versions)
    if not place.on_cuda:
        rows.add(device="CPU, one thread")
        return
    free, total = torch.cuda.mem_get_info()
    rows.add(
        device=torch.cuda.get_device_name(0),
        capability=torch.cuda.get_device_capability(0),
        memory_gib=total / 2**30,
        context_gib=(total - free) / 2**30,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        nccl=torch.cuda.nccl.version(),
    )
    asked = "name,driver_version,clocks.sm,clocks.mem,power.limit,mig.mode.current"
    said = subprocess.run(
        ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True
    )
    rows.add(nvidia_smi=said.stdout.strip())


def write_report(out: Path, device: str, small: bool) -> None:
    """All rows as one file of JSON and one of Markdown, and the profile that they hold."""
    raw = {part.name: rows_of(out, part.name) for part in PARTS}
    ends = {row["part"]: row for row in rows_of(out, "parts")}
    (out / "raw.json").write_text(json.dumps({"parts": ends, **raw}, indent=1) + "\n")
    name = next((row["device"] for row in raw["machine"] if "device" in row), device)
    sections = [f"# One GPU: {name}\n\n`python bench/gpu/run.py{' --small' if small else ''} --out DIR`"]
    for part in PARTS:
        if part.name not in ends:
            continue
        end = ends[part.name]
        how = f"`{part.name}` ended {end['ended']}, {end['seconds']:.0f} s. {end['why']}".rstrip()
        title = f"## {part.title}\n\n{how}"
        sections += [title, *map(table, alike(raw[part.name]))]
    (out / "report.md").write_text("\n\n".join(sections) + "\n")
    if profile := measured_profile(raw, name, small):
        Profile.from_body(profile)  # what is written can be read
        text = yaml.safe_dump(profile, sort_keys=False)
        file = f"flux_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}_measured.yaml"
        (out / file).write_text(text)
        if device == "cuda" and not small:
            (PROFILES / file).write_text(text)


def alike(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows with the same columns, in the order of their first."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row), []).append(row)
    return list(groups.values())


def table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def measured_profile(raw: dict[str, list[dict[str, Any]]], device: str, small: bool) -> dict[str, Any] | None:
    """The profile contract, degree 1: others need more GPUs (multi.py). None while no step was measured."""

    def by_shape(part: str, value: str, **where: Any) -> dict[str, float]:
        return {
            f"{row['side']}x{row['side']}": row[value] / 1e3
            for row in raw[part]
            if value in row and all(row.get(k) == v for k, v in where.items())
        }

    steps = by_shape("flux", "ours_ms", loop="eager")
    if not steps:
        return None
    profile: dict[str, Any] = {
        "model": "FLUX.1-dev",
        "device": device,
        "source": "measured by bench/gpu/run.py: random weights in "
        + (
            "a small size, of no use but to try the script"
            if small
            else "FLUX.1-dev's dimensions, bfloat16, eager"
        ),
        "degrees": [1],
        "step_seconds": {shape: {1: seconds} for shape, seconds in steps.items()},
        "encode_seconds": by_shape("flux", "encode_ms"),
        "decode_seconds": by_shape("flux", "decode_ms"),
    }
    batches = [by_shape("batches", "step_ms", batch=batch) for batch in (1, 2, 4, 8)]
    biggest = max((i for i, of_shape in enumerate(batches) if of_shape), default=0)
    if biggest:
        # one more request, once the GPU is full
        added = {
            shape: (seconds - batches[biggest - 1][shape]) / (2**biggest - 2 ** (biggest - 1))
            for shape, seconds in batches[biggest].items()
            if shape in batches[biggest - 1]
        }
        profile["batch_floor_seconds"] = {1: min(batches[0].values())}
        profile["batch_step_seconds"] = {shape: {1: round(seconds, 6)} for shape, seconds in added.items()}
    stages = {
        "text_encoder": "encoder",
        "text_encoder_2": "encoder",
        "transformer": "transformer",
        "vae": "vae",
    }
    components: dict[str, dict[str, float]] = {}
    for row in raw["folder"]:
        if "load_s" in row:
            stage = components.setdefault(stages[row["what"]], {"memory_gib": 0.0, "load_seconds": 0.0})
            stage["memory_gib"] = round(stage["memory_gib"] + row["memory_gib"], 3)
            stage["load_seconds"] = round(stage["load_seconds"] + row["load_s"], 3)
    if components:
        profile["components"] = components
    return profile


if __name__ == "__main__":
    main()
