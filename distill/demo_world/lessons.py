"""Scene -> conversations: the families by weight, and terse drills for the first lessons of a decoder."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable

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


def conversation(scene: Scene, rng: random.Random, turns: int, families: Iterable[str] = FAMILIES) -> list[Question]:
    """About ``turns`` different questions on one scene, families drawn by weight."""
    names = list(families)
    weights = [FAMILIES[name][0] for name in names]
    questions: list[Question] = []
    for name in rng.choices(names, weights, k=4 * turns):
        asked = FAMILIES[name][1](scene, rng)
        if asked is not None and all(asked.text != other.text for other in questions):
            questions.append(asked)
        if len(questions) == turns:
            break
    return questions


def drill(scene: Scene, rng: random.Random, turns: int) -> list[Question]:
    """Terse questions on one scene, to learn looking things up before learning the wordings: "top left?" """
    questions: list[Question] = []
    for name in rng.choices(tuple(TERSE), k=turns):
        asked = TERSE[name](scene, rng)
        if asked is not None:
            questions.append(asked)
    return questions


def text_conversation(rng: random.Random, turns: int) -> list[Question]:
    """Questions without an image."""
    return [rng.choice(list(TEXT_FAMILIES.values()))(rng) for _ in range(turns)]


# ---- terse forms, for the first lessons of a decoder


def terse_place(scene: Scene, rng: random.Random) -> Question | None:
    """Place -> what is there."""
    thing = rng.choice(scene.things)
    return Question(DESCRIBE, f"{place_name(thing.cell)}?", f"{thing.colour} {thing.shape}")


def terse(asker: Asker, pattern: str) -> Asker:
    """The same question, cut to what the groups of a regular expression find in it."""

    def ask(scene: Scene, rng: random.Random) -> Question | None:
        asked = asker(scene, rng)
        found = re.match(pattern, asked.text) if asked is not None else None
        if asked is None or found is None:
            return None
        return Question(DESCRIBE, f"{found[1]}?", asked.answer)

    return ask


TERSE: dict[str, Asker] = {
    "place": terse_place,
    "colour": terse(colour, r"What colou?r is the (\w+)\?"),
    "shape": terse(shape, r"What shape is (\w+)\?"),
    "where": terse(where, r"Where is the (.+)\?"),
    "word": terse(word, r"What is the (word)"),
    "existence": terse(existence, r"(Is there a \w+ \w+)"),
    "count": terse(count, r"(How many .+) are there"),
    "relation": terse(relation, r"(.+)\?"),
    "place_check": terse(place_check, r"(Is there a shape in the \w+ \w+)"),
}
