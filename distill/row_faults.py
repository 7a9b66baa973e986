"""One raw row of a LLaVA JSON -> everything wrong with its shape, as (kind, message); no file is touched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from bundle.prompt import IMAGE_MARKER

FaultKind = Literal[
    "row-shape",
    "field-type",
    "duplicate-id",
    "roles",
    "empty-answer",
    "image-marker",
    "image-outside",
    "image-missing",
    "image-corrupt",
    "too-long",
]
Fault = tuple[FaultKind, str]
SPEAKERS = ("human", "gpt")  # in turn, the human first


def shape_faults(raw: Any) -> list[Fault]:
    """Faults of fields, roles, answers and image markers; an empty list means that the row is well formed."""
    if not isinstance(raw, dict):
        return [("row-shape", f"the row is a JSON {type(raw).__name__}; it must be an object with 'conversations'")]
    faults = list(_field_faults(raw))
    messages = raw.get("conversations")
    if not isinstance(messages, list) or not messages:
        return [*faults, ("row-shape", f"'conversations' must be a list of messages, got {short(messages)}")]
    message_faults = [fault for i, message in enumerate(messages) for fault in _message_faults(message, i)]
    if len(messages) % 2:
        message_faults.append(("roles", f"{len(messages)} messages: the last question has no answer"))
    if any(kind == "field-type" for kind, _ in message_faults):
        return faults + message_faults
    return faults + message_faults + list(_marker_faults(raw, messages))


def _field_faults(raw: dict[str, Any]) -> Iterator[Fault]:
    name = raw.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        yield "field-type", f"'id' must be a string, got {short(name)}"
    image = raw.get("image")
    if image is not None and (not isinstance(image, str) or not image):
        yield "field-type", f"'image' must be one file name, got {short(image)}"


def _message_faults(message: Any, position: int) -> Iterator[Fault]:
    if not isinstance(message, dict):
        yield "field-type", f'message {position} must be {{"from": ..., "value": ...}}, got {short(message)}'
        return
    speaker, value, wanted = message.get("from"), message.get("value"), SPEAKERS[position % 2]
    if not isinstance(value, str):
        yield "field-type", f"message {position}: 'value' must be a string, got {short(value)}"
    elif position % 2 and not value.strip():
        yield "empty-answer", f"message {position}: the answer is empty"
    if speaker != wanted:
        yield "roles", f"message {position} must be from '{wanted}', got {short(speaker)}"


def _marker_faults(raw: dict[str, Any], messages: list[dict[str, Any]]) -> Iterator[Fault]:
    in_questions = sum(message["value"].count(IMAGE_MARKER) for message in messages[::2])
    in_answers = sum(message["value"].count(IMAGE_MARKER) for message in messages[1::2])
    images = 0 if raw.get("image") is None else 1
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
