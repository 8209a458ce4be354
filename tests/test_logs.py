"""The form of log lines: Serve's own, also where Serve does not look after the process."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.schema import LoggingConfig

from deployments.cell.cell import Cell
from deployments.logs import FIELDS, LogForm, log_request, logger, write_as


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers = []
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers, logger.level, logger.propagate = before


def set_up_by_serve(folder: Path, **config: Any) -> Path:
    """The file that Serve writes to as a replica with this `logging_config` would."""
    configure_component_logger(
        component_name="Cell",
        component_id="12",
        logging_config=LoggingConfig(logs_dir=str(folder), **config),
        max_bytes=5000,
        backup_count=3,
    )
    return folder / "Cell_12.log"


def say() -> None:
    log_request(logging.DEBUG, "r%d", "is not worth a line")
    log_request(logging.INFO, "r%d", "ended: %s after %.1f s", "met", 1.25, outcome="met", total_s=1.25)
    logger.info("about nobody")


@pytest.mark.parametrize("more", [{}, {"additional_log_standard_attrs": ["threadName"]}])
@pytest.mark.parametrize("encoding", ["TEXT", "JSON"])
def test_an_actor_writes_as_serve_does(tmp_path: Path, encoding: str, more: dict[str, Any]) -> None:
    theirs = set_up_by_serve(tmp_path / "serve", encoding=encoding, **more)
    say()
    form = LogForm.of_serve()
    assert (form.folder, form.max_bytes, form.backups) == (str(tmp_path / "serve"), 5000, 3)
    write_as(form, "Scheduler")
    write_as(form, "Scheduler")  # leaves nothing of the one before
    say()
    (ours,) = (tmp_path / "serve").glob("Scheduler_*.log")
    (name, identity) = ours.stem.split("_")

    def lines(file: Path) -> list[Any]:
        # what differs: who wrote it, when
        text = re.sub(r"\d{4}-\d\d-\d\d [\d:,]+", "TIME", file.read_text())
        text = text.replace("Cell 12", f"{name} {identity}")
        if encoding == "TEXT":
            return text.splitlines()
        rows = [json.loads(line) for line in text.splitlines()]
        for row in rows:
            assert row.pop("component_name") in ("Cell", name) and row.pop("component_id") in ("12", identity)
            row.pop("timestamp_ns", None)
        return rows

    assert lines(ours) == lines(theirs)
    first, second = lines(ours)
    if encoding == "TEXT":
        assert first.startswith(f"INFO TIME {name} {identity} ") and first.endswith(
            "-- request r%d ended: met after 1.2 s"
        )
    else:
        assert [first[field] for field in FIELDS] == ["r%d", "met", 1.25]
        assert first["filename"] == "test_logs.py"  # who called, not where it is formatted
        assert not set(FIELDS) & set(second)


def test_the_level_is_serves(tmp_path: Path) -> None:
    set_up_by_serve(tmp_path, log_level="WARNING")
    write_as(LogForm.of_serve(), "Scheduler")
    say()
    logger.warning("this is")
    (file,) = tmp_path.glob("Scheduler_*.log")
    assert len(file.read_text().splitlines()) == 1


def test_without_serve_there_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    form = LogForm.of_serve()
    assert form.folder is None
    logger.setLevel(logging.INFO)
    write_as(LogForm(), "Scheduler")
    say()
    assert "request r%d ended: met" in capsys.readouterr().err


def test_a_cell_hands_on_what_changes(tmp_path: Path) -> None:
    told: list[LogForm] = []

    class Actor:
        class write_logs_as:
            remote = told.append

    cell = Cell.__new__(Cell)
    cell._scheduler, cell._log_form = Actor(), None
    for level in ("INFO", "INFO", "DEBUG"):
        set_up_by_serve(tmp_path, log_level=level)
        cell._hand_on_log_form()
    assert [form.level for form in told] == [logging.INFO, logging.DEBUG]
