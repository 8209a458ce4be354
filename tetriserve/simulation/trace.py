"""Traces: who asks for what and when (design: the Trace contract), read and written as JSON lines.

Also reads the text traces of Hetu-DiT (PKU-DAIR/Hetu-DiT, `data/*_trace.txt`): one `Request(request_id=0,
timestamp=0.0, height=256, width=256, num_frames=1, prompt=..., num_inference_steps=28)` a line, without deadlines.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from solver.problem import Phase
from tetriserve.chain import chain_of
from tetriserve.errors import ConfigError
from tetriserve.profile import Profile
from tetriserve.request import Shape
from tetriserve.reuse import computed_steps

MAX_LINE_CHARS = 1_000_000
MAX_REQUESTS = 100_000
"""Beyond this a trace is taken for a mistake: a simulation of it would take an hour."""


@dataclass(frozen=True)
class TraceRequest:
    """One line of a trace.

    Attributes:
        arrival_s: seconds from the start of the trace, never before the line above.
        slo_s: seconds from arrival to the deadline; None where the trace brings none (see `SloRule`).
        drop_late: give the request up once it cannot be on time any more.
    """

    id: str
    arrival_s: float
    height: int
    width: int
    num_inference_steps: int
    num_frames: int = 1
    slo_s: float | None = None
    prompt: str | None = None
    seed: int | None = None
    priority: int = 0
    model: str | None = None
    drop_late: bool = False

    @property
    def shape(self) -> Shape:
        return Shape(self.height, self.width, self.num_frames)

    @property
    def deadline_s(self) -> float:
        return math.inf if self.slo_s is None else self.arrival_s + self.slo_s

    def chain(self, profile: Profile, n_gpus: int, reuse_every: int = 1) -> tuple[Phase, ...]:
        """The phases to run on `n_gpus` GPUs; encode and decode only where they take time.

        Args:
            reuse_every: of the steps behind the first ones; the others are extrapolated, and cost nothing.

        Raises ConfigError for a shape above the largest of the profile (below the smallest, its times are an
        upper limit) and for one that has no degree on so few GPUs.
        """
        largest = max(profile.step_seconds, key=lambda shape: shape.pixels)
        if self.shape.pixels > largest.pixels:
            raise ConfigError(
                f"request {self.id}: shape {self.shape} is outside the profile, which ends at {largest}"
            )
        steps = len(computed_steps(self.num_inference_steps, reuse_every))
        chain = chain_of(profile, self.shape, steps, range(1, n_gpus + 1), company=profile.model)
        if not all(phase.step_s for phase in chain):
            raise ConfigError(f"request {self.id}: no degree for {self.shape} fits on {n_gpus} GPUs")
        return tuple(phase for phase in chain if phase.kind == "denoise" or phase.step_s[1] > 0)


def write_trace(path: str | Path, requests: Iterable[TraceRequest]) -> None:
    """One JSON object a line; optional fields only where they say something. Raises ConfigError."""
    optional = {field.name: field.default for field in fields(TraceRequest) if field.name != "num_frames"}
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            for request in requests:
                row = {name: value for name, value in asdict(request).items() if value != optional.get(name)}
                file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise ConfigError(f"trace {path}: {error.strerror}") from None


def read_trace(path: str | Path) -> Iterator[TraceRequest]:
    """Read a trace line by line, JSON or Hetu-DiT text.

    Raises ConfigError naming the file, the line and the field, at the first line that is wrong; also for an
    empty file and for one of more than `MAX_REQUESTS` requests.
    """
    known: set[str] = set()
    last_s = 0.0
    for number, line in _lines(path):
        where = f"trace {path} line {number}"
        try:
            request = _request(line)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise ConfigError(f"{where}: {error or type(error).__name__}") from None
        if request.id in known:
            raise ConfigError(f"{where}: id {request.id!r} was there before")
        if request.arrival_s < last_s:
            raise ConfigError(
                f"{where}: arrival_s {request.arrival_s} is before the line above, {last_s}; sort the trace"
            )
        if len(known) == MAX_REQUESTS:
            raise ConfigError(f"{where}: more than {MAX_REQUESTS} requests")
        known.add(request.id)
        last_s = request.arrival_s
        yield request
    if not known:
        raise ConfigError(f"trace {path}: no requests")


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank, without ever holding more than one."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            number = 0
            while line := file.readline(MAX_LINE_CHARS + 1):
                number += 1
                if len(line) > MAX_LINE_CHARS:
                    raise ConfigError(f"trace {path} line {number}: more than {MAX_LINE_CHARS} characters")
                if line.strip():
                    yield number, line.strip()
    except OSError as error:
        raise ConfigError(f"trace {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"trace {path}: not text in UTF-8") from None


def _request(line: str) -> TraceRequest:
    row = _hetu_row(line) if line.startswith("Request(") else _json_row(line)
    values: dict[str, Any] = {}
    for name, check in _CHECKS.items():
        value = row.get(name)
        if value is None and name in ("id", "arrival_s", "height", "width", "num_inference_steps"):
            raise ValueError(f"field {name} is missing")
        if value is not None:
            try:
                values[name] = check(value)
            except (ValueError, OverflowError) as error:
                raise ValueError(f"field {name}: {error}, got {_short(value)}") from None
    return TraceRequest(**values)


def _json_row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {_short(row)}")
    unknown = sorted(set(row) - set(_CHECKS))
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}, known are {', '.join(_CHECKS)}")
    return row


def _hetu_row(line: str) -> dict[str, Any]:
    """`Request(name=literal, ...)` as our fields; what we have no use for is left out."""
    call = ast.parse(line, mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
        raise ValueError("expected Request(name=value, ...)")
    words = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    local_id = words.get("request_id_local")
    row = {name: words[name] for name in _CHECKS if name in words}
    row["id"] = words.get("request_id") if local_id is None else local_id
    row["id"] = None if row["id"] is None else str(row["id"])
    row["arrival_s"] = words.get("timestamp")
    return row


def _text(value: Any, least: int = 0, most: int = MAX_LINE_CHARS) -> str:
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise ValueError(f"must be a text of {least} to {most} characters")
    return value


def _seconds(value: Any, above: float = -1.0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number of seconds")
    if not above < float(value) < math.inf or value < 0:
        raise ValueError("must be a finite number of seconds, not negative" + (" and not 0" * (above == 0)))
    return float(value)


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


_CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "id": lambda value: _text(value, 1, 256),
    "arrival_s": _seconds,
    "height": _whole(1, 1 << 16),
    "width": _whole(1, 1 << 16),
    "num_frames": _whole(1, 1 << 16),
    "num_inference_steps": _whole(1, 100_000),
    "slo_s": lambda value: _seconds(value, above=0.0),
    "prompt": _text,
    "seed": _whole(0, 2**63 - 1),
    "priority": _whole(-(2**31), 2**31),
    "model": lambda value: _text(value, 1, 256),
    "drop_late": _flag,
}
