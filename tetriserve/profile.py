"""Step times of a model on a device, by shape and sequence-parallel degree (design: the Profile contract)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from solver.problem import Shared
from tetriserve.errors import ConfigError
from tetriserve.request import Shape


@dataclass(frozen=True)
class Profile:
    """Seconds of one denoising step, by shape and degree, batch 1; encode and decode seconds on one GPU, of text and
    pictures.

    Attributes:
        step_seconds: measured or published values only; `step_s` fills the rest by interpolation.
        batch_floor_seconds, batch_overhead_seconds: by degree, of a step that several requests share (design section
            4); degrees without a floor are not shared.
        batch_step_seconds: what one more request adds to it.
    """

    model: str
    device: str
    source: str
    degrees: tuple[int, ...]
    step_seconds: Mapping[Shape, Mapping[int, float]]
    encode_seconds: Mapping[Shape, float] = field(default_factory=dict)
    decode_seconds: Mapping[Shape, float] = field(default_factory=dict)
    encode_image_seconds: Mapping[Shape, float] = field(default_factory=dict)
    batch_floor_seconds: Mapping[int, float] = field(default_factory=dict)
    batch_overhead_seconds: Mapping[int, float] = field(default_factory=dict)
    batch_step_seconds: Mapping[Shape, Mapping[int, float]] = field(default_factory=dict)

    def step_s(self, shape: Shape) -> dict[int, float]:
        """Seconds of one step at each degree; interpolated on pixels where the shape is not listed."""
        return self._at(self.step_seconds, shape)

    def shared(self, shape: Shape) -> dict[int, Shared]:
        """The batch law's terms at each degree that has a floor, of requests of this shape. What one more adds is at
        most what it takes alone, and together with others it is no faster than alone."""
        if not self.batch_floor_seconds:
            return {}
        alone, adds = self.step_s(shape), self._at(self.batch_step_seconds, shape)
        return {
            degree: Shared(
                max(floor_s, alone[degree]),
                self.batch_overhead_seconds.get(degree, 0.0),
                min(adds.get(degree, math.inf), alone[degree]),
            )
            for degree, floor_s in self.batch_floor_seconds.items()
            if degree in alone
        }

    def _at(self, tables: Mapping[Shape, Mapping[int, float]], shape: Shape) -> dict[int, float]:
        """Seconds by degree, filled in between the shapes of `tables`."""
        if shape in tables:
            return dict(tables[shape])
        by_degree = {
            degree: {known: times[degree] for known, times in tables.items() if degree in times}
            for degree in self.degrees
        }
        return {degree: _interpolate(table, shape) for degree, table in by_degree.items() if table}

    def encode_s(self, shape: Shape) -> float:
        return _interpolate(self.encode_seconds, shape) if self.encode_seconds else 0.0

    def decode_s(self, shape: Shape) -> float:
        return _interpolate(self.decode_seconds, shape) if self.decode_seconds else 0.0

    def encode_image_s(self, shape: Shape) -> float:
        """Of one picture through the VAE; not measured, it takes as long as the way back."""
        known = self.encode_image_seconds
        return _interpolate(known, shape) if known else self.decode_s(shape)

    def interpolates(self, shape: Shape) -> bool:
        """Whether the times of a shape are filled in between (or beyond) the listed ones."""
        return shape not in self.step_seconds

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_body(), sort_keys=False)

    def to_body(self) -> dict[str, Any]:
        """The profile contract, as `load` reads it."""
        body: dict[str, Any] = {
            "model": self.model,
            "device": self.device,
            "source": self.source,
            "degrees": list(self.degrees),
            "step_seconds": _rounded(self.step_seconds),
        }
        for key in ("encode_seconds", "encode_image_seconds", "decode_seconds"):
            table: Mapping[Shape, float] = getattr(self, key)
            if table:
                body[key] = {str(s): round(t, 6) for s, t in sorted(table.items(), key=lambda i: i[0].pixels)}
        for key in ("batch_floor_seconds", "batch_overhead_seconds"):
            if by_degree := getattr(self, key):
                body[key] = {degree: round(t, 6) for degree, t in by_degree.items()}
        if self.batch_step_seconds:
            body["batch_step_seconds"] = _rounded(self.batch_step_seconds)
        return body

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile file. Raises `ConfigError` naming the file and the field."""
        try:
            body = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"profile {path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"profile {path}: not YAML ({str(error).splitlines()[0]})") from None
        try:
            return cls.from_body(body)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"missing field {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"profile {path}: {what}") from None

    @classmethod
    def from_body(cls, body: Any) -> Profile:
        """The other way. Raises KeyError, TypeError, ValueError or AttributeError."""
        if not isinstance(body, dict):
            raise ValueError("expected a mapping with model, device, source, degrees, step_seconds")
        degrees = tuple(sorted(int(degree) for degree in body["degrees"]))
        if not degrees or degrees[0] < 1:
            raise ValueError(f"degrees must be positive, got {list(degrees)}")
        tables = _tables(body, "step_seconds", degrees)
        if not tables:
            raise ValueError("step_seconds is empty")
        for degree in degrees:
            if not any(degree in times for times in tables.values()):
                raise ValueError(f"no step_seconds for degree {degree}")
        return cls(
            model=str(body["model"]),
            device=str(body["device"]),
            source=str(body.get("source", "")),
            degrees=degrees,
            step_seconds=tables,
            encode_seconds=_table(body.get("encode_seconds")),
            decode_seconds=_table(body.get("decode_seconds")),
            encode_image_seconds=_table(body.get("encode_image_seconds")),
            **_batches(body, degrees, tables),
        )


def _rounded(tables: Mapping[Shape, Mapping[int, float]]) -> dict[str, dict[int, float]]:
    return {
        str(shape): {degree: round(t, 6) for degree, t in times.items()}
        for shape, times in sorted(tables.items(), key=lambda item: item[0].pixels)
    }


def _tables(body: Any, name: str, degrees: tuple[int, ...]) -> dict[Shape, dict[int, float]]:
    return {
        Shape.parse(shape): _by_degree(times, f"{name} {shape}", shape, degrees)
        for shape, times in (body[name] or {}).items()
    }


def _by_degree(body: Any, name: str, of: str, degrees: tuple[int, ...]) -> dict[int, float]:
    """Seconds by degree; `name` is what has degrees that it should not, `of` what has no time."""
    times = {int(degree): _positive(t, of) for degree, t in body.items()}
    if set(times) - set(degrees):
        raise ValueError(f"{name} has degrees {sorted(times)} beyond {list(degrees)}")
    return times


def _batches(
    body: Any, degrees: tuple[int, ...], alone: Mapping[Shape, Mapping[int, float]]
) -> dict[str, Any]:
    """The sections of the batch law, none of them against another."""
    names = ("batch_floor_seconds", "batch_overhead_seconds", "batch_step_seconds")
    floor, overhead = (_by_degree(body.get(name) or {}, name, name, degrees) for name in names[:2])
    adds = _tables(body, names[2], degrees) if body.get(names[2]) else {}
    if not floor:
        given = next((name for name in names[1:] if body.get(name)), None)
        if given:
            raise ValueError(f"{given} needs batch_floor_seconds: without it there are no batches")
    for shape, times in adds.items():
        for degree, add_s in times.items():
            step_s = alone.get(shape, {}).get(degree, math.inf)
            if add_s > step_s:
                raise ValueError(
                    f"batch_step_seconds {shape} at degree {degree}: one more request adds {add_s:g}, more than the "
                    f"{step_s:g} that a step takes alone (step_seconds)"
                )
    return dict(zip(names, (floor, overhead, adds), strict=True))


def _table(body: Mapping[str, Any] | None) -> dict[Shape, float]:
    return {Shape.parse(shape): _positive(seconds, shape) for shape, seconds in (body or {}).items()}


def _positive(value: Any, shape: str) -> float:
    seconds = float(value)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{shape}: {value} is not a time in seconds")
    return seconds


def _interpolate(table: Mapping[Shape, float], shape: Shape) -> float:
    """Seconds at `shape`: exact when listed, else on token count, log-log between the neighbours.

    Step time grows as a power of the token count between 1 (linear layers) and 2 (attention), so straight
    lines in log-log coordinates are the natural interpolation. Outside the table the nearest slope goes
    on, kept within that range; below the smallest entry the time stays constant (kernel launch bound).
    """
    if shape in table:
        return table[shape]
    points: dict[int, float] = {}
    for known, seconds in table.items():  # pixels are proportional to tokens
        points[known.pixels] = max(seconds, points.get(known.pixels, 0.0))
    sizes = sorted(points)
    x = shape.pixels
    if x <= sizes[0]:
        return points[sizes[0]]
    if len(sizes) == 1:
        return points[sizes[0]] * x / sizes[0]
    above = next((i for i, size in enumerate(sizes) if size >= x), len(sizes) - 1)
    low, high = sizes[max(above - 1, 0)], sizes[above]
    if min(points[low], points[high]) <= 0:
        return max(points[low], points[high])
    slope = math.log(points[high] / points[low]) / math.log(high / low)
    if x > sizes[-1]:
        slope = min(max(slope, 1.0), 2.0)
        return points[high] * (x / high) ** slope
    return points[low] * (x / low) ** slope
