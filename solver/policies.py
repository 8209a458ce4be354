"""Policies by name: the names used in the CLI, in YAML files and in results."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from solver.baselines import EdfPolicy, best_fixed, fixed
from solver.ilp import IlpPolicy
from solver.knapsack import KnapsackPolicy
from solver.problem import Policy
from solver.slack import SlackPolicy

_FACTORIES: Mapping[str, Callable[[float], Policy]] = {
    "ilp": lambda time_limit_s: IlpPolicy(time_limit_s),
    "dp": lambda _: KnapsackPolicy(),
    "slack": lambda _: SlackPolicy(),
    "sp1": lambda _: fixed(1),
    "sp2": lambda _: fixed(2),
    "sp4": lambda _: fixed(4),
    "sp8": lambda _: fixed(8),
    "rssp": lambda _: best_fixed(),
    "edf": lambda _: EdfPolicy(),
}

POLICIES: tuple[str, ...] = tuple(_FACTORIES)


def make_policy(name: str, *, time_limit_s: float = 0.05) -> Policy:
    """The policy of that name; `time_limit_s` bounds the planning of `ilp`.

    Raises ValueError with the allowed names for an unknown one.
    """
    if name not in _FACTORIES:
        raise ValueError(f"unknown policy {name!r}; use one of {', '.join(POLICIES)}")
    return _FACTORIES[name](time_limit_s)
