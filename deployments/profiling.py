"""Where a cell's profile comes from and goes to: the cache of the server, and `tetriserve profile`."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from pathlib import Path

from deployments.config import AppArgs
from tetriserve.errors import ConfigError
from tetriserve.profile import Profile

logger = logging.getLogger(__name__)


def cached_profile(args: AppArgs, model: str, fingerprint: str) -> Profile | None:
    """The profile that this set-up measured before, or None."""
    path = _cache_path(args, model, fingerprint)
    if not path.exists():
        return None
    try:
        profile = Profile.load(path)
    except ConfigError as error:
        logger.warning("measuring again: %s", error)
        return None
    logger.info("profile from %s", path)
    return profile


def store_profile(args: AppArgs, model: str, fingerprint: str, profile: Profile) -> None:
    """Keep a measured profile for the next start. A cache that cannot be written is only a warning."""
    path = _cache_path(args, model, fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_profile(path, profile)
        logger.info("profile kept in %s", path)
    except OSError as error:
        logger.warning("profile not kept: %s", error)


def write_profile(path: Path, profile: Profile) -> None:
    """Write at once or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(profile.to_yaml())
    draft.replace(path)


def run(args: AppArgs, out: Path) -> None:
    """`tetriserve profile`: start a cell as the server would, measure it, write the file, stop it.

    Raises `ConfigError`.
    """
    import ray
    from tqdm import tqdm

    from deployments.app import cell_bundles
    from deployments.local import start_ray
    from deployments.scheduler import create_scheduler

    if not out.parent.is_dir():
        raise ConfigError(f"--out: no such folder {out.parent}")
    bundles = cell_bundles(args.cell)
    start_ray(max(os.cpu_count() or 1, math.ceil(sum(bundle["CPU"] for bundle in bundles))))
    try:
        group = ray.util.placement_group(bundles, strategy="STRICT_PACK")
        scheduler = create_scheduler(args, group)
        try:
            ray.get(scheduler.load.remote())
            pairs = ray.get(scheduler.measurable.remote())
            times = {}
            with tqdm(pairs, unit="shape", desc="profiling") as bar:
                for shape, degree in bar:
                    bar.set_postfix_str(f"{shape} at degree {degree}")
                    times[shape, degree] = ray.get(scheduler.measure.remote(shape, degree))
            write_profile(out, ray.get(scheduler.make_profile.remote(times)))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ConfigError):
                raise error.cause from None
            raise
    finally:
        ray.shutdown()


def _cache_path(args: AppArgs, model: str, fingerprint: str) -> Path:
    folder = args.profile.cache_dir
    root = (
        Path(folder).expanduser()
        if folder
        else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tetriserve" / "profiles"
    )
    key = repr((fingerprint, args.cell.gpus, args.cell.all_degrees, args.profile.shapes))
    name = re.sub(r"[^\w.-]", "-", model)
    return root / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.yaml"
