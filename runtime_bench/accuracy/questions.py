"""What a benchmark asks: the Question record, the two suffixes of the published prompts, and an even cut of a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        question_id: as the answer file repeats it; MME and TextVQA use one id for several questions.
        image: the file, its bytes (MMBench), or None for a question without a picture.
        text: what the model is asked, suffix included, without the image marker.
        prompt: what the answer file saves; the published scorers parse it.
        group: what is scored together (an MME image, the rotations of an MMBench question).
        extra: further fields of the answer line.
    """

    question_id: str | int
    image: Path | bytes | None
    text: str
    prompt: str
    group: str
    extra: dict[str, JsonValue] = field(default_factory=dict)


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """About ``limit`` questions, whole groups evenly over the list, so that a short run meets every category."""
    if limit is None or limit >= len(questions):
        return list(questions)
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.group, []).append(question)
    names = list(groups)
    wanted = max(1, round(limit * len(names) / len(questions)))
    kept = {names[i * len(names) // wanted] for i in range(wanted)}
    return [question for question in questions if question.group in kept]
