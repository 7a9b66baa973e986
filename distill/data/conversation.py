"""Raw row of either shape -> Row: questions and answers in turn, and the image; every fault named by its row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.errors import UsageError
from bundle.prompt import IMAGE_MARKER
from bundle.staging import inside
from distill.data.data_files import FORMATS
from distill.data.image_source import ImageSource, PackedImage
from distill.data.messages import Words, plain_row, words_of
from distill.data.row_faults import short


@dataclass(frozen=True)
class Turn:
    """One question and its answer, the image marker taken out of the question."""

    question: str
    answer: str
    has_image: bool


@dataclass(frozen=True)
class Row:
    """One conversation; ``number`` counts from 0 in the data set."""

    number: int
    image: ImageSource | None
    turns: tuple[Turn, ...]


def parse_row(raw: Any, number: int, data: Path, images: Path, packed: PackedImage | None = None) -> Row:
    """Check one raw row of either shape and turn it into a Row.

    Args:
        packed: the image beside the row in its shard; the row's own image name is not looked at then.

    Raises:
        UsageError: the row is of the wrong shape, or its image name leaves ``images``.
    """
    where = f"{data} row {number}"
    if not isinstance(raw, dict):
        raise UsageError(f"{where} is a JSON {type(raw).__name__}; give {FORMATS}")
    plain, faults = plain_row(raw, packed.name if packed else None)
    if faults:
        raise UsageError(f"{where}: {faults[0][1]}")
    words = words_of(plain)
    messages = plain.get(words.messages)
    if not isinstance(messages, list) or len(messages) < 2 or len(messages) % 2:
        wanted = f"'{words.messages}' must be a list of {words.speakers[0]} and {words.speakers[1]} messages in turn"
        raise UsageError(f"{where}: {wanted}, got {short(messages)}")
    turns = tuple(_turn(messages[i], messages[i + 1], i, where, words) for i in range(0, len(messages), 2))
    image, markers = plain.get("image"), sum(turn.has_image for turn in turns)
    if image is not None and not isinstance(image, str):
        raise UsageError(f"{where}: 'image' must be one file name, got {short(image)}")
    if markers != (image is not None):
        raise UsageError(
            f"{where}: {'an' if image else 'no'} image and {markers} '{IMAGE_MARKER}' markers; "
            f"a row has one image and one marker, or neither"
        )
    if packed is not None or image is None:
        return Row(number, packed, turns)
    return Row(number, inside(images, image, f"{where}: image"), turns)


def _turn(human: Any, gpt: Any, position: int, where: str, words: Words) -> Turn:
    question = _value(human, words.speakers[0], f"{where} message {position}", words)
    answer = _value(gpt, words.speakers[1], f"{where} message {position + 1}", words)
    if not answer.strip():
        raise UsageError(f"{where} message {position + 1}: the answer is empty; remove the row")
    if IMAGE_MARKER in answer or question.count(IMAGE_MARKER) > 1:
        raise UsageError(
            f"{where} message {position}: '{IMAGE_MARKER}' may stand once in a question and never in an answer"
        )
    return Turn(question.replace(IMAGE_MARKER, "").strip(), answer.strip(), IMAGE_MARKER in question)


def _value(message: Any, speaker: str, where: str, words: Words) -> str:
    text = message.get(words.text) if isinstance(message, dict) else None
    if not isinstance(message, dict) or message.get(words.speaker) != speaker or not isinstance(text, str):
        if isinstance(message, dict) and message.get(words.speaker) == "system":
            raise UsageError(f"{where} is a system message; the model's template has its own: remove it")
        wanted = f'{{"{words.speaker}": "{speaker}", "{words.text}": "..."}}'
        raise UsageError(f"{where} must be {wanted}, got {short(message)}")
    return text
