"""LLaVA JSON + image folder -> Row objects, every fault named by its row; nothing is decoded here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.errors import UsageError
from bundle.prompt import IMAGE_MARKER
from bundle.staging import inside

FORMAT = 'a JSON list of {"id", "image" (optional), "conversations": [{"from": "human"|"gpt", "value": "..."}]}'


@dataclass(frozen=True)
class Turn:
    """One question and its answer, the image marker taken out of the question."""

    question: str
    answer: str
    has_image: bool


@dataclass(frozen=True)
class Row:
    """One conversation; ``number`` counts from 0 in the file."""

    number: int
    image: Path | None
    turns: tuple[Turn, ...]


def read_rows(data: Path, images: Path) -> list[Row]:
    """Read a LLaVA data set.

    Args:
        data: the JSON file.
        images: the folder that the rows' ``image`` names are relative to.

    Raises:
        UsageError: the file is missing, no JSON, of the wrong shape, or a row's image is missing or outside ``images``.
    """
    rows = [parse_row(raw, number, data, images) for number, raw in enumerate(read_json_list(data))]
    missing = next((row for row in rows if row.image is not None and not row.image.is_file()), None)
    if missing is not None:
        raise UsageError(
            f"{data} row {missing.number}: image {missing.image} does not exist; put it there, "
            "or name the right folder with --images"
        )
    return rows


def read_json_list(data: Path) -> list[Any]:
    """The file's JSON list, or one line that says what is wrong with it."""
    if not data.is_file():
        raise UsageError(
            f"data file {data} does not exist; give {FORMAT}, or make one with: alignkd-data make-demo DIR"
        )
    try:
        value = json.loads(data.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{data} is not JSON ({error}); give {FORMAT}") from error
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else f"a JSON {type(value).__name__}"
        raise UsageError(f"{data} holds {what}; give {FORMAT}")
    return value


def parse_row(raw: Any, number: int, data: Path, images: Path) -> Row:
    """Check one JSON row and turn it into a Row.

    Raises:
        UsageError: the row is of the wrong shape, or its image name leaves ``images``.
    """
    where = f"{data} row {number}"
    if not isinstance(raw, dict):
        raise UsageError(f"{where} is a JSON {type(raw).__name__}; give {FORMAT}")
    messages = raw.get("conversations")
    if not isinstance(messages, list) or len(messages) < 2 or len(messages) % 2:
        raise UsageError(
            f"{where}: 'conversations' must be a list of human and gpt messages in turn, got {_short(messages)}"
        )
    turns = tuple(_turn(messages[i], messages[i + 1], i, where) for i in range(0, len(messages), 2))
    image, markers = raw.get("image"), sum(turn.has_image for turn in turns)
    if image is not None and not isinstance(image, str):
        raise UsageError(f"{where}: 'image' must be one file name, got {_short(image)}")
    if markers != (image is not None):
        raise UsageError(
            f"{where}: {'an' if image else 'no'} image and {markers} '{IMAGE_MARKER}' markers; "
            f"a row has one image and one marker, or neither"
        )
    path = None if image is None else inside(images, image, f"{where}: image")
    return Row(number, path, turns)


def _turn(human: Any, gpt: Any, position: int, where: str) -> Turn:
    question = _value(human, "human", f"{where} message {position}")
    answer = _value(gpt, "gpt", f"{where} message {position + 1}")
    if not answer.strip():
        raise UsageError(f"{where} message {position + 1}: the answer is empty; remove the row")
    if IMAGE_MARKER in answer or question.count(IMAGE_MARKER) > 1:
        raise UsageError(
            f"{where} message {position}: '{IMAGE_MARKER}' may stand once in a question and never in an answer"
        )
    return Turn(question.replace(IMAGE_MARKER, "").strip(), answer.strip(), IMAGE_MARKER in question)


def _value(message: Any, speaker: str, where: str) -> str:
    if not isinstance(message, dict) or message.get("from") != speaker or not isinstance(message.get("value"), str):
        raise UsageError(f'{where} must be {{"from": "{speaker}", "value": "..."}}, got {_short(message)}')
    return str(message["value"])


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
