"""Seed -> scene (what is where) -> its 96x96 picture: coloured shapes on a 3x3 grid and, in half of them, a word."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

IMAGE_SIZE = 96
GRID = 3
CELL = IMAGE_SIZE // GRID  # 32 px = 2x2 patches of the demo tower = one visual token
CELLS = GRID * GRID

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 44, 44),
    "green": (44, 172, 62),
    "blue": (48, 78, 226),
    "yellow": (236, 208, 40),
    "purple": (164, 56, 190),
    "cyan": (52, 200, 212),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
BACKGROUNDS = ("dark", "bright")
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
# Never in a training file, for a test of composition; the demo teacher has seen them.
UNSEEN_PAIRS = (("red", "star"), ("blue", "cross"), ("yellow", "circle"), ("cyan", "triangle"))
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in UNSEEN_PAIRS)

ANIMALS = ("CAT", "DOG", "COW", "PIG", "FOX", "OX", "FISH", "BEAR")
THINGS = (
    "TV", "PC", "CAR", "BUS", "CUP", "HAT", "KEY", "PEN",
    "SUN", "SEA", "TREE", "MOON", "BOAT", "LAMP", "ROAD", "MILK",
)  # fmt: skip
LEXICON = (*ANIMALS, *THINGS)

SHAPE_SIZES = (20, 22, 24, 26)  # px
SHAPE_JITTER = 2  # px around the middle of the cell
WORD_HEIGHTS = (13, 15, 17)  # px
WORD_WIDTHS = {2: (18, 22), 3: (24, 28), 4: (28, 30)}  # letters -> px
NOISE = 7.0  # standard deviation of the pixel noise, of 255

# 5x7 capitals, one byte a column, lowest bit on top
FONT = {
    "A": "7e1111117e", "B": "7f49494936", "C": "3e41414122", "D": "7f4141221c", "E": "7f49494941", "F": "7f09090901",
    "G": "3e4149497a", "H": "7f0808087f", "I": "00417f4100", "J": "2040413f01", "K": "7f08142241", "L": "7f40404040",
    "M": "7f020c027f", "N": "7f0408107f", "O": "3e4141413e", "P": "7f09090906", "Q": "3e4151215e", "R": "7f09192946",
    "S": "4649494931", "T": "01017f0101", "U": "3f4040403f", "V": "1f2040201f", "W": "3f4038403f", "X": "6314081463",
    "Y": "0708700807", "Z": "6151494543",
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One coloured shape in one cell of the grid (cells run row by row from the top left)."""

    cell: int
    colour: str
    shape: str

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """All that can be asked about.

    Args:
        things: one to five, each in its own cell.
        word: in capitals, or None.
        word_cell: where the word stands; None without one.
        background: "dark" or "bright".
        pairs: the colour-shape pairs of the world it was drawn from; wrong answers come from there, too.
    """

    things: tuple[Thing, ...]
    word: str | None
    word_cell: int | None
    background: str
    pairs: tuple[tuple[str, str], ...] = PAIRS

    def at(self, cell: int) -> Thing | None:
        """The thing in a cell."""
        return next((thing for thing in self.things if thing.cell == cell), None)

    def unique_pairs(self) -> list[Thing]:
        """Things that colour and shape together name without doubt."""
        pairs = [thing.pair for thing in self.things]
        return [thing for thing in self.things if pairs.count(thing.pair) == 1]


def place_name(cell: int) -> str:
    """'top left' ... 'bottom right'."""
    return f"{ROWS[cell // GRID]} {COLUMNS[cell % GRID]}"


def make_scene(rng: random.Random, pairs: tuple[tuple[str, str], ...] = PAIRS, word: bool | None = None) -> Scene:
    """A random scene of one to five things, with a word, without, or (None) either with equal chance."""
    count = rng.choice((1, 2, 3, 3, 4, 4, 5, 5))
    cells = rng.sample(range(CELLS), count + 1)
    things = tuple(Thing(cell, *rng.choice(pairs)) for cell in cells[:count])
    with_word = rng.random() < 0.5 if word is None else word
    text = rng.choice(LEXICON) if with_word else None
    return Scene(things, text, cells[-1] if with_word else None, rng.choice(BACKGROUNDS), pairs)


def draw(scene: Scene, rng: random.Random) -> NDArray[np.uint8]:
    """The picture of a scene [96, 96, 3]; places, sizes, light and noise are drawn from ``rng``."""
    canvas = _background(scene.background, rng)  # [96, 96, 3]
    for thing in scene.things:
        size = rng.choice(SHAPE_SIZES)
        light = rng.uniform(0.86, 1.1)
        colour = np.array(COLOURS[thing.colour], np.float32) * light
        _blend(canvas, shape_mask(thing.shape, size), thing.cell, colour, rng)
    if scene.word is not None and scene.word_cell is not None:
        ink = rng.uniform(225, 255) if scene.background == "dark" else rng.uniform(0, 30)
        mask = word_mask(scene.word, rng.choice(WORD_WIDTHS[len(scene.word)]), rng.choice(WORD_HEIGHTS))
        _blend(canvas, mask, scene.word_cell, np.full(3, ink, np.float32), rng)
    noise = np.random.default_rng(rng.getrandbits(63)).standard_normal(canvas.shape, np.float32)
    return (canvas + noise * NOISE).clip(0, 255).round().astype(np.uint8)


def _background(kind: str, rng: random.Random) -> NDArray[np.float32]:
    level = rng.uniform(12, 60) if kind == "dark" else rng.uniform(190, 240)
    base = np.array([level + rng.uniform(-10, 10) for _ in range(3)], np.float32)
    slope = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    shade = slope[:, None] * rng.uniform(-10, 10) + slope[None] * rng.uniform(-10, 10)  # [96, 96]
    return base[None, None] + shade[..., None]


def _blend(
    canvas: NDArray[np.float32], mask: NDArray[np.float32], cell: int, colour: NDArray[np.float32], rng: random.Random
) -> None:
    height, width = mask.shape
    top, left = (_offset(side, rng) for side in (height, width))
    y, x = cell // GRID * CELL + top, cell % GRID * CELL + left
    window = canvas[y : y + height, x : x + width]
    window += mask[..., None] * (colour - window)


def _offset(side: int, rng: random.Random) -> int:
    room = CELL - side
    return max(0, min(room, room // 2 + rng.randint(-SHAPE_JITTER, SHAPE_JITTER)))


@functools.cache
def shape_mask(shape: str, size: int) -> NDArray[np.float32]:
    """Coverage [size, size] of a shape, drawn four times as large and averaged down."""
    big = size * 4
    image = Image.new("L", (big, big))
    pen = ImageDraw.Draw(image)
    edge, arm = big - 1, big * 0.34
    if shape == "circle":
        pen.ellipse((0, 0, edge, edge), fill=255)
    elif shape == "square":
        pen.rectangle((big * 0.06, big * 0.06, big * 0.94, big * 0.94), fill=255)
    elif shape == "triangle":
        pen.polygon(((big / 2, 0), (0, edge), (edge, edge)), fill=255)
    elif shape == "cross":
        pen.rectangle((arm, 0, big - arm, edge), fill=255)
        pen.rectangle((0, arm, edge, big - arm), fill=255)
    elif shape == "star":
        pen.polygon(_star_corners(big / 2), fill=255)
    else:
        raise ValueError(f"unknown shape '{shape}'; known: {', '.join(SHAPES)}")
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32) / np.float32(255)


def _star_corners(radius: float) -> list[tuple[float, float]]:
    corners = []
    for step in range(10):
        length = radius if step % 2 == 0 else radius * 0.42
        angle = np.pi * (step / 5 - 0.5)
        corners.append((radius + length * float(np.cos(angle)), radius * 1.06 + length * float(np.sin(angle))))
    return corners


@functools.cache
def word_mask(word: str, width: int, height: int) -> NDArray[np.float32]:
    """Coverage [height, width] of a word in the bitmap font, stretched to that size."""
    columns = [byte for letter in word for byte in (*bytes.fromhex(FONT[letter]), 0)][:-1]
    bits = np.array([[byte >> row & 1 for byte in columns] for row in range(7)], np.uint8)  # [7, 6n - 1]
    image = Image.fromarray(bits * 255).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32) / np.float32(255)
