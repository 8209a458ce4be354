"""Where a cell's profile comes from and goes to: the cache of the server, and `tetriserve profile`."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from pathlib import Path

from deployments.cell.fleet import Fleet, cause_of
from deployments.cluster_file import load_profile
from deployments.config import AppArgs
from deployments.logs import logger
from tetriserve.cache import cache_folder
from tetriserve.errors import ConfigError, TetriserveError
from tetriserve.profile import Profile
from tetriserve.request import Shape


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
    profile = await fleet.profile(
        lambda shape, degree, step_s: logger.info("%s at degree %d: %.4f s a step", shape, degree, step_s)
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

            return await fleet.profile(measured)

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
