"""Scene -> questions with yes and no equally often: existence, relations, counts, places, colours, words."""

from __future__ import annotations

import random

from distill.demo_world.question import NUMBERS, Question, other_than, things_counted, yes_no
from distill.demo_world.scene import CELLS, COLOURS, LEXICON, Scene, Thing, place_name

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def existence(scene: Scene, rng: random.Random) -> Question | None:
    """Is a pair there? A wrong pair is half the time a colour and a shape that are both there, but not together."""
    have = [thing.pair for thing in scene.things]
    frame = rng.choice(("the", "this"))
    if rng.random() < 0.5:
        return exists(rng.choice(have), True, frame)
    absent = [pair for pair in scene.pairs if pair not in have]
    crossed = crossed_pairs(scene)
    return exists(rng.choice(crossed if crossed and rng.random() < 0.5 else absent), False, frame)


def exists(pair: tuple[str, str], answer: bool, frame: str = "the") -> Question:
    """The existence question for one pair."""
    return Question("existence", f"Is there a {pair[0]} {pair[1]} in {frame} image?", yes_no(answer))


def crossed_pairs(scene: Scene) -> list[tuple[str, str]]:
    """Absent pairs whose colour and whose shape are both in the scene: what a careless reader sees."""
    have = {thing.pair for thing in scene.things}
    shapes = {pair[1] for pair in have}
    colours = {pair[0] for pair in have}
    return [pair for pair in scene.pairs if pair not in have and pair[0] in colours and pair[1] in shapes]


def relation(scene: Scene, rng: random.Random) -> Question | None:
    """Left, right, above or below between two things that differ in that direction."""
    unique = scene.unique_pairs()
    if len(unique) < 2:
        return None
    first, second = rng.sample(unique, 2)
    ways = _relations(first, second)
    true_way = rng.choice(ways)
    answer = rng.random() < 0.5
    way = true_way if answer else OPPOSITE[true_way]
    text = f"Is the {first.colour} {first.shape} {way} the {second.colour} {second.shape}?"
    return Question("relation", text, yes_no(answer))


def count_check(scene: Scene, rng: random.Random) -> Question | None:
    """Is the number of some things this?"""
    what, number = things_counted(scene, rng)
    answer = rng.random() < 0.5
    asked = str(number) if answer else other_than(NUMBERS, str(number), rng)
    return Question("count_check", f"Is the number of {what} in this image {asked}?", yes_no(answer))


def place_check(scene: Scene, rng: random.Random) -> Question | None:
    """Is there a shape at a place?"""
    answer = rng.random() < 0.5
    cells = [cell for cell in range(CELLS) if (scene.at(cell) is not None) == answer]
    return Question(
        "place_check", f"Is there a shape in the {place_name(rng.choice(cells))} of this image?", yes_no(answer)
    )


def hue_check(scene: Scene, rng: random.Random) -> Question | None:
    """Is anything of this colour there?"""
    answer = rng.random() < 0.5
    there = {thing.colour for thing in scene.things}
    asked = rng.choice([name for name in COLOURS if (name in there) == answer])
    return Question("hue_check", f"Does this artwork have a {asked} shape?", yes_no(answer))


def word_check(scene: Scene, rng: random.Random) -> Question | None:
    """Is this the word? Asked of an image or of a poster."""
    frames = ("Is the word in this image {}?", "Is this poster titled {}?")
    return _about_word(scene, rng, "word_check", frames)


def poster_check(scene: Scene, rng: random.Random) -> Question | None:
    """Is this the poster's title?"""
    return _about_word(scene, rng, "word_check", ("Is this poster titled {}?",))


def ocr_check(scene: Scene, rng: random.Random) -> Question | None:
    """Is this the word in the image?"""
    return _about_word(scene, rng, "word_check", ("Is the word in this image {}?",))


def _relations(first: Thing, second: Thing) -> list[str]:
    ways = []
    if first.column != second.column:
        ways.append("left of" if first.column < second.column else "right of")
    if first.row != second.row:
        ways.append("above" if first.row < second.row else "below")
    return ways


def _about_word(scene: Scene, rng: random.Random, family: str, frames: tuple[str, ...]) -> Question | None:
    if scene.word is None:
        return None
    answer = rng.random() < 0.5
    asked = scene.word if answer else other_than(LEXICON, scene.word, rng)
    return Question(family, rng.choice(frames).format(asked), yes_no(answer))
