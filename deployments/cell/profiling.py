"""Where a cell's profile comes from and goes to: the cache of the server, and `tetriserve profile`."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deployments.cell.fleet import Fleet, cause_of
from deployments.cluster_file import load_profile
from deployments.config import AppArgs
from deployments.logs import logger
from tetriserve.batch_law import BATCHES, LONGEST_SHARED_S, PAYS, SharedTimes, law_of
from tetriserve.cache import cache_folder
from tetriserve.errors import ConfigError, OutOfMemory, TetriserveError
from tetriserve.profile import Profile
from tetriserve.request import Shape

Measured = Callable[[Shape, int, float], None]
"""Told of every measurement: shape, degree, seconds of a step."""


async def fitting_profile(args: AppArgs, fleet: Fleet) -> Profile:
    """The configured file, the one this very set-up measured before, or a new measurement, which is kept.

    Raises `ConfigError` when the configured file cannot serve the configured degrees.
    """
    if args.profile.path is not None:
        return _configured(args, args.profile.path, fleet)
    path = _cache_path(args, fleet)
    try:
        if path.exists():
            profile = Profile.load(path)
            logger.info("profile from %s", path)
            return profile
    except (ConfigError, OSError) as error:
        logger.warning("measuring again: %s", error)
    profile = await measured_profile(
        args,
        fleet,
        lambda shape, degree, step_s: logger.info("%s at degree %d: %.4f s a step", shape, degree, step_s),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_profile(path, profile)
        logger.info("profile kept in %s", path)
    except OSError as error:  # a read-only home only costs the next start some seconds
        logger.warning("profile not kept: %s", error)
    return profile


def _configured(args: AppArgs, path: str, fleet: Fleet) -> Profile:
    profile = load_profile(args, path)
    if (profile.model, profile.device) != (fleet.info.name, fleet.device):
        logger.warning(
            "profile %s is of %s on %s, this is %s on %s",
            path,
            profile.model,
            profile.device,
            fleet.info.name,
            fleet.device,
        )
    return profile


async def measured_profile(args: AppArgs, fleet: Fleet, measured: Measured) -> Profile:
    """Measure every shape and degree of the configuration; what does not fit into memory is left out.

    Raises `ConfigError` when nothing is left, else what a replica raises.
    """
    steps: dict[Shape, dict[int, float]] = {}
    others: dict[str, dict[Shape, float]] = {}
    for shape, degree in fleet.measurable():
        try:
            seconds = await fleet.measure(shape, degree)
        except OutOfMemory as error:
            logger.warning("degree %d is not used for %s: out of memory: %s", degree, shape, error)
            continue
        step_s = steps.setdefault(shape, {})[degree] = seconds.pop("denoise")
        for kind, other_s in seconds.items():
            others.setdefault(kind, {})[shape] = other_s
        measured(shape, degree, step_s)
    if not steps:
        raise ConfigError("args.profile.shapes: the model runs out of memory at every shape and degree")
    law = await _batch_law(fleet, steps) if fleet.info.batches and args.scheduler.max_batch > 1 else {}
    return Profile(
        model=fleet.info.name,
        device=fleet.device,
        source=f"measured by tetriserve profile: median of {args.profile.repeats} steps after "
        f"{args.profile.warmup}, {args.model.dtype}, {args.cell.attention_backend} attention",
        degrees=tuple(sorted({degree for times in steps.values() for degree in times})),
        step_seconds=steps,
        encode_seconds=others["encode"],
        decode_seconds=others["decode"],
        encode_image_seconds=others.get("encode_image", {}),
        **law,
    )


async def _batch_law(fleet: Fleet, alone: Mapping[Shape, Mapping[int, float]]) -> dict[str, Any]:
    """The profile's sections on shared steps: measured from the smallest shape on, as long as sharing pays."""
    measured: dict[int, list[SharedTimes]] = {}
    for degree in sorted({degree for times in alone.values() for degree in times}):
        shapes = sorted((s for s in alone if degree in alone[s]), key=lambda shape: shape.pixels)
        for shape in shapes:
            alone_s = alone[shape][degree]
            if alone_s > LONGEST_SHARED_S:
                break
            try:
                times = await fleet.measure(shape, degree, (1, *BATCHES))
            except OutOfMemory as error:
                logger.warning("no batches at degree %d of %s: out of memory: %s", degree, shape, error)
                break
            # as if the machine had been as fast as when the steps of lone requests were measured
            step_s = {n: times[n] * alone_s / times[1] for n in BATCHES}
            one = SharedTimes(shape, alone_s, step_s)
            logger.info("%s at degree %d, of several requests: %s s a step", shape, degree, step_s)
            measured.setdefault(degree, []).append(one)
            if one.gain < PAYS:  # larger ones gain less
                break
    return law_of(measured)


def write_profile(path: Path, profile: Profile) -> None:
    """Write at once or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(profile.to_yaml(), encoding="utf-8")
    draft.replace(path)


def run(args: AppArgs, out: Path) -> None:
    """`tetriserve profile`: start the replicas as the server would, measure, write the file, stop them.

    Raises `ConfigError`.
    """
    import ray
    from tqdm import tqdm

    from deployments.local import start_ray

    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: no such folder: {out.parent}")

    async def measure() -> Profile:
        print("starting the replicas ...", flush=True)
        await fleet.start()
        with tqdm(total=len(fleet.measurable()), desc="profiling", unit="pair") as bar:

            def measured(shape: Shape, degree: int, step_s: float) -> None:
                bar.set_postfix_str(f"{shape} at degree {degree}: {step_s:.4f} s")
                bar.update()

            return await measured_profile(args, fleet, measured)

    bundles = args.cell.bundles
    start_ray(sum(bundle["CPU"] for bundle in bundles))
    try:
        fleet = Fleet(args, ray.util.placement_group(bundles, strategy="STRICT_PACK"))
        write_profile(out, asyncio.run(measure()))
        print(f"wrote {out}")
    except Exception as error:
        cause = cause_of(error)
        raise (cause if isinstance(cause, TetriserveError) else ConfigError(f"{cause!r}")) from None
    finally:
        ray.shutdown()


def _cache_path(args: AppArgs, fleet: Fleet) -> Path:
    root = Path(args.profile.cache_dir or cache_folder("profiles")).expanduser()
    batches = args.scheduler.max_batch > 1
    key = repr((fleet.fingerprint, args.cell.gpus, args.cell.all_degrees, args.profile.shapes, batches))
    name = re.sub(r"[^\w.-]", "-", fleet.info.name)
    return root / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.yaml"
