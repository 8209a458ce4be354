"""One logger for all of `deployments`, and its form in the actors that Ray Serve does not look after.

Serve sets its logger up in its own replicas, by the `logging_config` of the config file. The scheduler and the GPU
replicas are plain actors: their cell hands on to them how Serve has set up the cell.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import ray
from ray._common.formatters import JSONFormatter

logger = logging.getLogger("ray.serve")

FIELDS = ("tetriserve_request_id", "tetriserve_outcome", "tetriserve_total_s")
"""What lines about a request have as fields of their own where they are JSON."""


def log_request(
    level: int,
    request_id: str | None,
    message: str,
    *args: object,
    outcome: str | None = None,
    total_s: float | None = None,
    error: Exception | None = None,
) -> None:
    """A line about a request: "request ID MESSAGE", the id also in a field.

    Args:
        message: with places for `args`, as `logging` has them. Nothing that a client wrote belongs in it.
        outcome, total_s: what came of the request, and the seconds from its arrival; fields too.
        error: its traceback is added.
    """
    values = (request_id, outcome, None if total_s is None else round(total_s, 6))
    fields = {name: value for name, value in zip(FIELDS, values, strict=True) if value is not None}
    logger.log(level, f"request %s {message}", request_id, *args, extra=fields, exc_info=error, stacklevel=2)


class _Quoting(threading.local):
    """Whether libraries may say in this thread what they like."""

    allowed = True


_quoting = _Quoting()


@contextmanager
def unquoted() -> Iterator[None]:
    """In this thread the log lines and warnings of libraries say where they come from, not what they say: some quote
    the prompt that they are given. Needs `guard_prompts`."""
    before, _quoting.allowed = _quoting.allowed, False
    try:
        yield
    finally:
        _quoting.allowed = before


def guard_prompts() -> None:
    """Have this process keep to `unquoted`."""
    make_record, show_warning = logging.getLogRecordFactory(), warnings.showwarning

    def record_of(name: str, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(name, *args, **kwargs)
        if not _quoting.allowed and name != logger.name:
            record.msg, record.args = f"{name} said something about a request", ()
            record.exc_info = record.exc_text = record.stack_info = None
        return record

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        text = message if _quoting.allowed else "about a request"
        show_warning(text, category, *args, **kwargs)

    logging.setLogRecordFactory(record_of)
    warnings.showwarning = show


def quotes(text: str, *said: str | None) -> bool:
    """Whether a text has words in it that a client said."""
    words = {word.lower() for one in said for word in re.findall(r"\w{4,}", one or "")}
    return any(word in words for word in re.findall(r"\w{4,}", text.lower()))


@dataclass(frozen=True)
class LogForm:
    """How lines are written.

    Attributes:
        level: the least severe, in `logging`'s numbers.
        folder: of the files; None: no files.
        as_json: whether a line of a file is a JSON object; stderr is always text, as Serve's.
        attributes: of `logging`'s records, added to each line.
        max_bytes, backups: size at which a file is rotated, and how many older ones are kept.
    """

    level: int = logging.INFO
    folder: str | None = None
    as_json: bool = False
    attributes: tuple[str, ...] = ()
    max_bytes: int = 0
    backups: int = 0

    @classmethod
    def of_serve(cls) -> LogForm:
        """How Serve has set up the replica that this is called in."""
        for handler in logger.handlers:
            file = getattr(handler, "target", handler)  # Serve puts a buffer before its file
            if isinstance(file, RotatingFileHandler):
                return cls(
                    level=logger.level,
                    folder=os.path.dirname(file.baseFilename),
                    as_json=isinstance(file.formatter, JSONFormatter),
                    attributes=tuple(getattr(file.formatter, "additional_log_standard_attrs", ())),
                    max_bytes=file.maxBytes,
                    backups=file.backupCount,
                )
        return cls(level=logger.level)


def write_as(form: LogForm, name: str) -> None:
    """Have the lines of this process on stderr, and in `NAME_PID.log` of the form's folder. `name` is the actor's."""
    identity = str(os.getpid())
    parts = ["%(levelname)s %(asctime)s", name, identity, *(f"%({key})s" for key in form.attributes)]
    text = logging.Formatter(" ".join(parts) + " -- %(message)s")
    stderr = logging.StreamHandler()
    stderr.setFormatter(text)
    handlers: list[logging.Handler] = [stderr]
    if form.folder is not None:
        path = Path(form.folder, f"{name}_{identity}.log")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = RotatingFileHandler(path, maxBytes=form.max_bytes, backupCount=form.backups)
        file.setFormatter(text)
        if form.as_json:
            json_lines = JSONFormatter()
            json_lines.set_additional_log_standard_attrs(list(form.attributes))
            file.setFormatter(json_lines)
            file.addFilter(_Where({"component_name": name, "component_id": identity}))
        handlers.append(file)
    for old in logger.handlers:
        old.close()
    logger.handlers = handlers
    logger.setLevel(form.level)
    logger.propagate = False  # Ray's own logger would write them once more


class _Where(logging.Filter):
    """Adds what Serve's JSON lines have of where they come from; drops nothing."""

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__()
        self._fields = fields
        if ray.is_initialized():
            context = ray.get_runtime_context()
            self._fields |= {"node_id": context.get_node_id(), "worker_id": context.get_worker_id()}
            if actor_id := context.get_actor_id():
                self._fields["actor_id"] = actor_id

    def filter(self, record: logging.LogRecord) -> bool:
        record.__dict__.update(self._fields)
        return True
