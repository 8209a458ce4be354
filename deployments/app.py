"""The application builder that cluster configs name: `import_path: deployments.app:build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from deployments.cell.cell import Cell
from deployments.cluster_file import load_keys
from deployments.config import AppArgs
from deployments.http.ingress import Ingress
from deployments.http.pictures import Pictures
from deployments.replacing import check_replacement
from tetriserve.errors import ConfigError

HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 30.0

STOP_POLL_S = 0.5
"""How often a stopping replica looks whether its requests are done; Serve's 2 s would slow every stop."""

INGRESS_REQUESTS = 4096
"""Requests one ingress replica holds at a time; the cells' own queue limit is meant to be met first."""

SUPERVISION: dict[str, Any] = {
    "health_check_period_s": HEALTH_PERIOD_S,
    "health_check_timeout_s": HEALTH_TIMEOUT_S,
    "graceful_shutdown_wait_loop_s": STOP_POLL_S,
}
"""How Serve looks after each of the deployments."""


class NotBuilt(ConfigError, RayServeException):
    """A `ConfigError` as Serve understands it: said in a line, not tried again, and nothing that runs is touched."""


def build(args: dict[str, Any]) -> Application:
    """`Ingress` over `Cell` and `Pictures`. Raises `ConfigError`, one line, naming the first wrong key of `args`, or
    what of it this cluster does not have while other cells run."""
    try:
        parsed = AppArgs.parse(args)
        if parsed.http.api_keys_file is not None and Path(parsed.http.api_keys_file).exists():
            # an ingress that fails for them would not be built again from the same file, once they are mended
            load_keys(parsed.http)
        check_replacement(parsed)
    except ConfigError as error:
        raise NotBuilt(error.message) from None
    cell = serve.deployment(
        name="Cell",
        # the Serve replica only talks; the scheduler actor takes the CPUs of bundle 0 that both live in
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=parsed.cell.bundles,
        placement_group_strategy="STRICT_PACK",
        # above the cell's own limit: it answers the surplus at once, and must hear health and status calls
        max_ongoing_requests=2 * parsed.scheduler.max_open_requests + 64,
        **SUPERVISION,
    )(Cell)
    pictures = serve.deployment(
        name="Pictures",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=INGRESS_REQUESTS,
        **SUPERVISION,
    )(Pictures)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=parsed.http.replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=INGRESS_REQUESTS,
        **SUPERVISION,
    )(serve.ingress()(Ingress))
    return ingress.bind(cell.bind(parsed), pictures.bind(parsed.http), parsed)
