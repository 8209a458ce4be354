"""What the embedded model understands: coloured shapes, one or two, on a coloured background.

    THING      = "a" [SIZE] COLOUR SHAPE
    PROMPT     = THING [RELATION THING] ["on a" COLOUR "background"]
    RELATION   = "above" | "below" | ["to the"] "left of" | ["to the"] "right of"

Without a size a thing is large; without a background it is white, or black where a thing is white.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 35),
    "green": (25, 165, 50),
    "blue": (35, 60, 225),
    "yellow": (250, 220, 30),
    "cyan": (40, 210, 230),
    "purple": (170, 40, 200),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")

_THING = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_PROMPT = re.compile(
    rf"{_THING}(?: (?:to the )?({'|'.join(RELATIONS)}) {_THING})?(?: on an? ({'|'.join(COLOURS)}) background)?"
)


@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """`things` holds one thing and no relation, or two with the first one `relation` the second."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    @property
    def held_out(self) -> bool:
        """Whether training never sees it.

        One thing: a fifth of the combinations of size, colour, shape and background. Two things: a tenth of the
        pairs of coloured shapes, whatever their sizes, order, relation and background.
        """
        if len(self.things) == 1:
            (thing,) = self.things
            return _bucket(f"{thing.size} {thing.colour} {thing.shape} {self.background}") % 5 == 0
        return _bucket(" ".join(sorted(f"{thing.colour} {thing.shape}" for thing in self.things))) % 10 == 0


def parse(prompt: str) -> Scene:
    """The scene that a prompt asks for. Raises `ValueError` outside the grammar."""
    match = _PROMPT.fullmatch(" ".join(prompt.lower().split()).rstrip("."))
    if match is None:
        raise ValueError(f"not in the grammar: {prompt!r}")
    size, colour, shape, relation, size_2, colour_2, shape_2, background = match.groups()
    things: tuple[Thing, ...] = (Thing(size or "large", colour, shape),)
    if relation:
        things += (Thing(size_2 or "large", colour_2, shape_2),)
    return Scene(things, relation, background or _default_background(things))


def write(scene: Scene, choice: random.Random | None = None) -> str:
    """A prompt that `parse` reads as `scene`: the full one, or with `choice` any of its wordings."""

    def drop(share: float) -> bool:
        return choice is not None and choice.random() < share

    def name(thing: Thing) -> str:
        size = "" if thing.size == "large" and drop(0.3) else f"{thing.size} "
        return f"a {size}{thing.colour} {thing.shape}"

    text = name(scene.things[0])
    if scene.relation:
        sideways = scene.relation in ("left of", "right of") and not drop(0.3)
        text += f" {'to the ' if sideways else ''}{scene.relation} {name(scene.things[1])}"
    if scene.background == _default_background(scene.things) and drop(0.5):
        return text
    return f"{text} on a {scene.background} background"


def random_scene(choice: random.Random, things: int, *, held_out: bool) -> Scene:
    """A scene of one or two things in colours that differ, from training's part or the held-out part."""
    while True:
        *colours, background = choice.sample(list(COLOURS), things + 1)
        scene = Scene(
            tuple(Thing(choice.choice(SIZES), colour, choice.choice(SHAPES)) for colour in colours),
            choice.choice(RELATIONS) if things == 2 else None,
            background,
        )
        if scene.held_out == held_out:
            return scene


def _default_background(things: tuple[Thing, ...]) -> str:
    return "black" if any(thing.colour == "white" for thing in things) else "white"


def _bucket(text: str) -> int:
    return zlib.crc32(text.encode())
