"""Imports point one way, between the rooms and between the files: deployments -> tetriserve -> solver, and inside."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("solver", "tetriserve", "deployments")
    for path in (ROOT / package).rglob("*.py")
}

NOUNS = "tetriserve"
ALLOWED = {
    "solver": set(),
    NOUNS: {"solver"},
    "tetriserve/engine": {NOUNS},
    "tetriserve/models": {NOUNS, "tetriserve/engine", "tetriserve/models/embedded"},
    "tetriserve/models/embedded": {NOUNS},
    "tetriserve/scheduler": {NOUNS, "solver"},
    "tetriserve/simulation": {NOUNS, "tetriserve/scheduler", "solver"},
    "deployments/cell": {
        "deployments",
        "solver",
        NOUNS,
        "tetriserve/engine",
        "tetriserve/models",
        "tetriserve/models/embedded",
        "tetriserve/scheduler",
    },
    "deployments/http": {
        "deployments",
        "deployments/cell",
        NOUNS,
        "tetriserve/scheduler",
        "tetriserve/simulation",
    },
    "deployments": {"solver", NOUNS, "tetriserve/models/embedded"},
}
"""By room, the rooms it may import. `deployments.app` puts the parts together, `tetriserve.cli` is the front door:
they look into all rooms."""
DOORS = {"deployments.app", "tetriserve.cli"}

OUTSIDE = {
    "solver": {"torch", "diffusers", "ray", "fastapi", "pydantic"},
    NOUNS: {"torch", "diffusers", "ray", "fastapi", "pydantic"},
    "tetriserve/engine": {"ray", "fastapi", "pydantic"},
    "tetriserve/models": {"ray", "fastapi", "pydantic"},
    "tetriserve/models/embedded": {"ray", "fastapi", "pydantic"},
    "tetriserve/scheduler": {"torch", "diffusers", "ray", "fastapi", "pydantic"},
    "tetriserve/simulation": {"torch", "diffusers", "ray", "fastapi", "pydantic"},
}
"""By room, the packages it must do without."""


def room(module: str) -> str:
    return str(MODULES[module].parent.relative_to(ROOT))


def imports(module: str) -> Iterator[str]:
    """All that it names in an import, wherever that stands, but for type checkers."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{module}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


USES = {module: {name for name in imports(module) if name in MODULES} - {module} for module in MODULES}


@pytest.mark.parametrize("module", sorted(set(MODULES) - DOORS))
def test_no_room_looks_where_it_should_not(module: str) -> None:
    here = room(module)
    seen = {room(other) for other in USES[module]} - {here}
    assert seen <= ALLOWED[here], f"{module} looks into {sorted(seen - ALLOWED[here])}"
    packages = {name.split(".")[0] for name in imports(module)}
    assert packages.isdisjoint(OUTSIDE.get(here, set()))


def test_the_rules_have_no_circle_and_no_idle_arrow() -> None:
    used = {(room(a), room(b)) for a in set(MODULES) - DOORS for b in USES[a]}
    allowed = {(here, there) for here, rooms in ALLOWED.items() for there in rooms}
    assert allowed - used == set(), "nothing goes there any more"
    for here, there in allowed:
        assert (there, here) not in allowed or "deployments" in (here, there), f"{here} and {there}"


def test_files_import_each_other_in_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in USES[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
