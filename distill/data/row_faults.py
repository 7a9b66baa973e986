"""One raw row of a data set -> everything wrong with its shape, as (kind, message); no file is touched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from bundle.prompt import IMAGE_MARKER
from distill.data.messages import Fault, Words, plain_row, words_of


def shape_faults(raw: Any, packed: str | None = None) -> list[Fault]:
    """Faults of fields, roles, answers and image markers; an empty list means that the row is well formed.

    Args:
        packed: name of the image that lies beside the row in its shard.
    """
    if not isinstance(raw, dict):
        return [("row-shape", f"the row is a JSON {type(raw).__name__}; it must be an object with 'conversations'")]
    row, part_faults = plain_row(raw, packed)
    words = words_of(row)
    faults = [*_field_faults(row), *part_faults]
    messages = row.get(words.messages)
    if not isinstance(messages, list) or not messages:
        return [*faults, ("row-shape", f"'{words.messages}' must be a list of messages, got {short(messages)}")]
    message_faults = [fault for i, message in enumerate(messages) for fault in _message_faults(message, i, words)]
    if len(messages) % 2:
        message_faults.append(("roles", f"{len(messages)} messages: the last question has no answer"))
    faults += message_faults
    if any(kind in ("field-type", "several-images") for kind, _ in faults):
        return faults
    return faults + list(_marker_faults(row, messages, words))


def _field_faults(row: dict[str, Any]) -> Iterator[Fault]:
    name = row.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        yield "field-type", f"'id' must be a string, got {short(name)}"
    image = row.get("image")
    if image is not None and (not isinstance(image, str) or not image):
        yield "field-type", f"'image' must be one file name, got {short(image)}"


def _message_faults(message: Any, position: int, words: Words) -> Iterator[Fault]:
    if not isinstance(message, dict):
        yield (
            "field-type",
            f'message {position} must be {{"{words.speaker}": ..., "{words.text}": ...}}, got {short(message)}',
        )
        return
    speaker, value, wanted = message.get(words.speaker), message.get(words.text), words.speakers[position % 2]
    if not isinstance(value, str):
        yield "field-type", f"message {position}: '{words.text}' must be a string, got {short(value)}"
    elif position % 2 and not value.strip():
        yield "empty-answer", f"message {position}: the answer is empty"
    if speaker == "system":
        yield "roles", f"message {position} is a system message; the model's template has its own: remove it"
    elif speaker != wanted:
        yield "roles", f"message {position} must be from '{wanted}', got {short(speaker)}"


def _marker_faults(row: dict[str, Any], messages: list[dict[str, Any]], words: Words) -> Iterator[Fault]:
    in_questions = sum(message[words.text].count(IMAGE_MARKER) for message in messages[::2])
    in_answers = sum(message[words.text].count(IMAGE_MARKER) for message in messages[1::2])
    images = 0 if row.get("image") is None else 1
    if in_questions != images:
        yield (
            "image-marker",
            f"{in_questions} '{IMAGE_MARKER}' in the questions for {images} image(s); they must be equal",
        )
    if in_answers:
        yield "image-marker", f"{in_answers} '{IMAGE_MARKER}' in the answers; it may stand in a question only"


def short(value: Any) -> str:
    """A JSON value in at most 80 characters, or 'nothing'."""
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
