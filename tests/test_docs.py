"""The documents: their commands run as written, their tables and links are complete."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from live_server import Server, write_config

from deployments.cell.meters import Meters
from deployments.config import AppArgs
from deployments.logs import FIELDS
from tetriserve.engine.environment import ENVIRONMENT
from tetriserve.request import CellStatus

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
SERVER = "http://127.0.0.1:8000"

MAY_FAIL = ("curl -s -X DELETE",)
"""Commands about something that the reader has and a test has not."""


def commands(document: Path) -> list[str]:
    """The lines of its shell blocks, continued ones joined."""
    blocks = re.findall(r"```sh\n(.*?)```", document.read_text(), re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(write_config(tmp_path_factory.mktemp("docs")))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as the documents see it, in which they may write."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("bench", "cluster_configs", "deployments", "solver", "tests", "tetriserve", "setup.cfg"):
        (folder / name).symlink_to(ROOT / name)
    bin_folder = folder / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name in ("python", "tetriserve"):
        (bin_folder / name).symlink_to(Path(sys.executable).parent / name)
    return folder


@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("curl") is None, reason="the documents' commands need curl")
@pytest.mark.parametrize(
    "document",
    [
        # measuring a model takes minutes
        pytest.param(d, id=d.stem, marks=pytest.mark.long if d.stem == "profiles" else pytest.mark.slow)
        for d in DOCS
        if commands(d)
    ],
)
def test_commands_run_as_written(document: Path, server: Server, folder: Path) -> None:
    for command in commands(document):
        if "pytest" in command:  # this very suite runs it
            assert (ROOT / command.split()[-1]).exists()
            continue
        done = subprocess.run(
            command.replace(SERVER, server.url),
            shell=True,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if command.startswith("curl") and not command.startswith(MAY_FAIL):
            assert done.stdout and '"error"' not in done.stdout, done.stdout


def test_every_knob_is_explained_and_no_other() -> None:
    explained: dict[str, set[str]] = {}
    for section, body in re.findall(
        r"^## `(\w+)`\n(.*?)(?=^## |\Z)", (ROOT / "docs/tuning.md").read_text(), re.S | re.M
    ):
        first_cells = re.findall(r"^\| (`.*?) \|", body, re.M)
        explained[section] = {knob for cell in first_cells for knob in re.findall(r"`(\w+)`", cell)}
    sections = {name: field.annotation for name, field in AppArgs.model_fields.items()}
    # one that may be absent is `Section | None`
    bare = {name: (get_args(section) or (section,))[0] for name, section in sections.items()}
    assert explained == {name: set(section.model_fields) for name, section in bare.items()}


def test_metrics_that_are_named_exist() -> None:
    families = Meters([]).families(CellStatus(True, "", 1, 1, 0, 0, "ilp"), 0)
    known = {family.name + "_total" * (family.type == "counter") for family in families} | set(FIELDS)
    for document in [*DOCS, ROOT / "README.md"]:
        named = set(re.findall(r"\btetriserve_\w*\w", document.read_text()))
        assert named <= known, document.name


def test_links_lead_somewhere() -> None:
    for document in [*DOCS, ROOT / "README.md"]:
        for link in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_environment_of_gpu_replicas_is_explained() -> None:
    """Every variable that is set, and its value."""
    table = (ROOT / "docs/operating.md").read_text()
    explained = {
        name: value
        for names, value in re.findall(r"^\| (`[A-Z_`, ]+`) \| (\S+) \|", table, re.M)
        for name in re.findall(r"[A-Z_]+", names)
    }
    assert explained == ENVIRONMENT
