"""Open question, or nothing but text -> question with lettered options."""

from __future__ import annotations

import random
from collections.abc import Sequence

from distill.demo_world.open_questions import colour, count, shape, where, word
from distill.demo_world.question import LETTERS, NUMBERS, Question
from distill.demo_world.scene import ANIMALS, CELLS, COLOURS, LEXICON, SHAPES, Scene, place_name

SCENE_CONTEXT = "Context: The image shows shapes."


def choice(scene: Scene, rng: random.Random) -> Question | None:
    """An open question with three or four lettered options, now and then with a context line."""
    asked = rng.choice((colour, colour, shape, shape, count, where, word))(scene, rng)
    return None if asked is None else with_choices(asked, rng, rng.choice((3, 4, 4)), rng.random() < 0.25)


def with_choices(asked: Question, rng: random.Random, number: int, context: bool = False) -> Question:
    """An open question, made a lettered choice among ``number`` options."""
    wrong = [option for option in options_like(asked) if option != asked.answer]
    options = [asked.answer, *rng.sample(wrong, min(number - 1, len(wrong)))]
    rng.shuffle(options)
    letter = LETTERS[options.index(asked.answer)]
    return Question("choice", asked.text, letter, tuple(options), SCENE_CONTEXT if context else "")


def options_like(asked: Question) -> Sequence[str]:
    """All answers that a question's family can have."""
    return {
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "count": NUMBERS,
        "where": tuple(place_name(cell) for cell in range(CELLS)),
        "word": LEXICON,
    }.get(asked.family, ("Yes", "No"))


# ---- without an image


def category_choice(rng: random.Random) -> Question:
    """Which option is a colour, a shape, a number or an animal?"""
    groups = {"color": tuple(COLOURS), "shape": SHAPES, "number": NUMBERS, "animal": tuple(ANIMALS)}
    name = rng.choice(tuple(groups))
    rest = [entry for other, entries in groups.items() if other != name for entry in entries]
    options = [rng.choice(groups[name]), *rng.sample(rest, rng.choice((1, 2, 3)))]
    answer, article = options[0], "an" if name == "animal" else "a"
    rng.shuffle(options)
    return Question(
        "category_choice", f"Which of these is {article} {name}?", LETTERS[options.index(answer)], tuple(options)
    )
