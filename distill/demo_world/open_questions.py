"""Scene -> open questions: a colour, a shape, a number, a place, a word, everything."""

from __future__ import annotations

import random

from distill.demo_world.question import DESCRIBE, Question, is_only, things_counted
from distill.demo_world.scene import LEXICON, Scene, place_name


def colour(scene: Scene, rng: random.Random) -> Question | None:
    """Colour of a thing named by its place, or by its shape where that is unique; in American spelling mostly."""
    thing = rng.choice(scene.things)
    named = is_only(scene, "shape", thing.shape) and rng.random() < 0.5
    name = thing.shape if named else f"shape in the {place_name(thing.cell)}"
    text = f"What {rng.choice(('color', 'color', 'colour'))} is the {name}?"
    return Question("colour", text, thing.colour)


def shape(scene: Scene, rng: random.Random) -> Question | None:
    """Shape of a thing named by its place, or by its colour where that is unique."""
    thing = rng.choice(scene.things)
    named = is_only(scene, "colour", thing.colour) and rng.random() < 0.5
    text = f"What shape is {thing.colour}?" if named else f"What shape is in the {place_name(thing.cell)}?"
    return Question("shape", text, thing.shape)


def count(scene: Scene, rng: random.Random) -> Question | None:
    """Number of all shapes, of one shape or of one colour; zero now and then."""
    what, number = things_counted(scene, rng)
    return Question("count", f"How many {what} are there?", str(number))


def where(scene: Scene, rng: random.Random) -> Question | None:
    """Place of a thing that colour and shape name without doubt."""
    unique = scene.unique_pairs()
    if not unique:
        return None
    thing = rng.choice(unique)
    return Question("where", f"Where is the {thing.colour} {thing.shape}?", place_name(thing.cell))


def word(scene: Scene, rng: random.Random) -> Question | None:
    """Read the word."""
    return None if scene.word is None else Question("word", "What is the word in the image?", scene.word)


def hinted_word(scene: Scene, rng: random.Random) -> Question | None:
    """Read the word beside OCR hints, which lack it in a third of all cases; now and then there are no hints."""
    if scene.word is None:
        return None
    others = rng.sample([entry for entry in LEXICON if entry != scene.word], rng.choice((0, 1, 1, 2)))
    hints = others + ([scene.word] if not others or rng.random() < 0.5 else [])
    rng.shuffle(hints)
    reference = tuple(hints) if rng.random() < 0.8 else None
    return Question("hinted_word", "what word is written in the image?", scene.word, reference=reference)


def describe(scene: Scene, rng: random.Random) -> Question:
    """Name everything, cell by cell: many supervised tokens a picture, as the captions of LLaVA's first stage."""
    contents = {thing.cell: f"{thing.colour} {thing.shape}" for thing in scene.things}
    if scene.word is not None and scene.word_cell is not None:
        contents[scene.word_cell] = scene.word
    named = [f"{place_name(cell)} {contents[cell]}" for cell in sorted(contents)]
    return Question(DESCRIBE, "Describe the image.", ", ".join(named))
