"""Scene -> conversations: the families by weight, and terse drills for the first lessons of a decoder."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from distill.demo_world.choices import category_choice, choice
from distill.demo_world.open_questions import colour, count, hinted_word, shape, where, word
from distill.demo_world.question import DESCRIBE, Asker, Question
from distill.demo_world.scene import Scene, place_name
from distill.demo_world.yes_no_questions import (
    count_check,
    existence,
    hue_check,
    place_check,
    relation,
    word_check,
)

# family -> how often a conversation draws it, against the others, and its function
FAMILIES: dict[str, tuple[float, Asker]] = {
    "colour": (0.7, colour),
    "shape": (0.7, shape),
    "count": (2.0, count),
    "where": (0.7, where),
    "word": (0.5, word),
    "hinted_word": (0.7, hinted_word),
    "existence": (1.5, existence),
    "relation": (3.0, relation),
    "choice": (6.0, choice),
    "count_check": (1.5, count_check),
    "place_check": (0.7, place_check),
    "hue_check": (0.7, hue_check),
    "word_check": (2.0, word_check),
}
TEXT_FAMILIES: dict[str, Callable[[random.Random], Question]] = {"category_choice": category_choice}

FAMILY_WEIGHTS = {name: weight for name, (weight, _) in FAMILIES.items()}


def conversation(
    scene: Scene, rng: random.Random, turns: int, weights: dict[str, float] = FAMILY_WEIGHTS
) -> list[Question]:
    """About ``turns`` different questions on one scene, families drawn by weight."""
    questions: list[Question] = []
    for name in rng.choices(list(weights), list(weights.values()), k=4 * turns):
        asked = FAMILIES[name][1](scene, rng)
        if asked is not None and all(asked.text != other.text for other in questions):
            questions.append(asked)
        if len(questions) == turns:
            break
    return questions


def text_conversation(rng: random.Random, turns: int) -> list[Question]:
    """Questions without an image."""
    return [rng.choice(list(TEXT_FAMILIES.values()))(rng) for _ in range(turns)]


# family -> how often a drill draws it; "place" is the drill's own
DRILLS = {
    "place": 1.0, "colour": 1.0, "shape": 1.0, "where": 1.0, "word": 0.7, "existence": 1.0, "relation": 1.5,
    "count": 1.0, "place_check": 0.7, "word_check": 0.7, "count_check": 0.7, "choice": 2.5,
}  # fmt: skip
# full wording -> terse wording; the first pattern that fits
TERSE = tuple(
    (re.compile(pattern), wording)
    for pattern, wording in (
        (r"What (color|shape) is (?:the shape )?in the (.+)\?", r"\1 \2?"),
        (r"What colou?r is the shape in the (.+)\?", r"color \1?"),
        (r"What colou?r is the (\w+)\?", r"\1?"),
        (r"What shape is (\w+)\?", r"\1?"),
        (r"Where is the (.+)\?", r"\1?"),
        (r"What is the word in the image\?", "word?"),
        (r"Is (?:the word in this image|this poster titled) (\w+)\?", r"Is the word \1?"),
        (r"(Is there a \w+ \w+) in (?:the|this) image\?", r"\1?"),
        (r"(Is there a shape in the \w+ \w+) of this image\?", r"\1?"),
        (r"(How many .+) are there\?", r"\1?"),
        (r"(Is the number of .+) in this image (\d)\?", r"\1 \2?"),
    )
)


def drill(scene: Scene, rng: random.Random, turns: int) -> list[Question]:
    """Up to ``turns`` terse questions on one scene, to learn looking things up before learning the wordings."""
    questions = []
    for name in rng.choices(list(DRILLS), list(DRILLS.values()), k=turns):
        asked = what_is_there(scene, rng) if name == "place" else FAMILIES[name][1](scene, rng)
        if asked is not None:
            questions.append(terse(asked))
    return questions


def what_is_there(scene: Scene, rng: random.Random) -> Question:
    """Place -> colour and shape."""
    thing = rng.choice(scene.things)
    return Question(DESCRIBE, f"{place_name(thing.cell)}?", f"{thing.colour} {thing.shape}")


def terse(asked: Question) -> Question:
    """The same question in few words, without suffix and context; options stay."""
    text = asked.text
    for pattern, wording in TERSE:
        if pattern.fullmatch(text):
            text = pattern.sub(wording, text)
            break
    return Question(DESCRIBE, text, asked.answer, asked.choices)
