"""Question: what is asked, its answer, and the prompt that the benchmarks make of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from distill.demo_world.scene import COLOURS, SHAPES, Scene

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCD"
DESCRIBE = "describe"  # the one family with a long answer and no suffix
NUMBERS = tuple("012345")


@dataclass(frozen=True)
class Question:
    """One question and its answer.

    Args:
        family: the task family, a key of FAMILIES.
        text: the bare question.
        answer: short; a letter where there are choices.
        choices: lettered options.
        lead: a line in front of the question (ScienceQA's context, MMBench's hint), or "".
        reference: OCR hints (TextVQA); None where the prompt has no such line.
    """

    family: str
    text: str
    answer: str
    choices: tuple[str, ...] = ()
    lead: str = ""
    reference: tuple[str, ...] | None = None

    @property
    def body(self) -> str:
        """Everything but the suffix: lead, question, OCR hints, options."""
        lines = [self.lead] if self.lead else []
        lines.append(self.text)
        if self.reference is not None:
            lines.append("Reference OCR token: " + ", ".join(self.reference))
        lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join(lines)

    @property
    def prompt(self) -> str:
        """The question as a model reads it, suffix included."""
        if self.family == DESCRIBE:
            return self.body
        return self.body + (LETTER_ANSWER if self.choices else SHORT_ANSWER)


Asker = Callable[[Scene, random.Random], Question | None]


def yes_no(answer: bool) -> str:
    return "Yes" if answer else "No"


def other_than(entries: Iterable[str], entry: str, rng: random.Random) -> str:
    return rng.choice([other for other in entries if other != entry])


def is_only(scene: Scene, attribute: str, value: str) -> bool:
    values = [thing.shape if attribute == "shape" else thing.colour for thing in scene.things]
    return values.count(value) == 1


def things_counted(scene: Scene, rng: random.Random) -> tuple[str, int]:
    """What is counted ('circles', 'red shapes', 'shapes') and how many there are."""
    kind = rng.random()
    if kind < 0.3:
        return "shapes", len(scene.things)
    thing = rng.choice(scene.things)
    if kind < 0.65:
        name = rng.choice(SHAPES) if rng.random() < 0.35 else thing.shape
        return f"{name}{'es' if name.endswith('s') else 's'}", sum(other.shape == name for other in scene.things)
    name = rng.choice(tuple(COLOURS)) if rng.random() < 0.35 else thing.colour
    return f"{name} shapes", sum(other.colour == name for other in scene.things)
