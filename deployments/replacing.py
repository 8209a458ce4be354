"""Before a running application is replaced: what cannot start is found while the old cells still serve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deployments.cluster_file import check_paths
from deployments.config import AppArgs
from tetriserve.errors import ConfigError

CELL_ACTOR = "#Cell#"
"""In the names of the actors of Serve's replicas: APPLICATION#DEPLOYMENT#ID."""

TIMEOUT_S = 30.0
"""For a node to look for its files; one that says nothing says nothing against it."""


def check_replacement(args: AppArgs) -> None:
    """Raise `ConfigError` if cells run and those of `args` could not: too few GPUs, or files that no node has.

    Ray Serve calls the builder before it touches what runs, and leaves that alone when the builder fails. The first
    deployment is not checked: nodes may still join.
    """
    if not (ray.is_initialized() and _is_running()):
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    wanted = Counter[str]()
    for bundle in args.cell.bundles:
        wanted.update(bundle)
    fitting = [node for node in nodes if _share(node["Resources"], wanted) >= 1]
    if not fitting:
        totals: list[dict[str, float]] = [node["Resources"] for node in nodes]
        most = max(totals, key=lambda has: _share(has, wanted), default={})
        kind = min(wanted, key=lambda name: most.get(name, 0.0) / wanted[name])
        raise ConfigError(
            f"args.cell.gpus: {args.cell.gpus} replicas need {wanted[kind]:g} {kind} on one node, the largest has "
            f"{most.get(kind, 0.0):g}; what runs is left as it is"
        )
    look = ray.remote(num_cpus=0, max_retries=0)(_missing)
    calls = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            args
        )
        for node in fitting
    ]
    done, _ = ray.wait(calls, num_returns=len(calls), timeout=TIMEOUT_S)
    said = [ray.get(call) for call in done]
    if said and all(said):
        raise ConfigError(f"{said[0]}; what runs is left as it is")


def _missing(args: AppArgs) -> str:
    """What a node lacks of the files that are named; "" when it has all."""
    try:
        check_paths(args)
    except ConfigError as error:
        return error.message
    return ""


def _is_running() -> bool:
    """Whether there is a cell of ours. Serve's status has none while it builds: the actors tell."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return any(CELL_ACTOR in actor["name"] for actor in actors)


def _share(has: Mapping[str, float], wanted: Mapping[str, float]) -> float:
    """Of what is wanted, by what there is least of."""
    return min(has.get(name, 0.0) / amount for name, amount in wanted.items())
