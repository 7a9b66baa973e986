"""Raw row of either shape (LLaVA or Hugging Face messages) -> the same row in plain form, and what its parts got wrong.

Plain form: every message's text is one string with image markers, and the image is one name under ``image`` or absent.
A system message is kept, and refused later: the model's template has a system text of its own, and one that training
sees and phones do not would teach the wrong prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bundle.prompt import IMAGE_MARKER

FaultKind = Literal[
    "row-shape",
    "field-type",
    "duplicate-id",
    "roles",
    "empty-answer",
    "image-marker",
    "several-images",
    "image-outside",
    "image-missing",
    "image-corrupt",
    "too-long",
    "image-cut",
    "all-masked",
    "benchmark-leak",
]
Fault = tuple[FaultKind, str]


@dataclass(frozen=True)
class Words:
    """What a shape of rows calls its parts; ``speakers`` are in turn, the one who asks first."""

    messages: str
    speaker: str
    text: str
    speakers: tuple[str, str]


LLAVA = Words("conversations", "from", "value", ("human", "gpt"))
HUGGING_FACE = Words("messages", "role", "content", ("user", "assistant"))


def words_of(raw: dict[str, Any]) -> Words:
    """The shape of a row, by the field that holds its messages."""
    return HUGGING_FACE if "messages" in raw and "conversations" not in raw else LLAVA


def plain_row(raw: Any, packed: str | None = None) -> tuple[Any, list[Fault]]:
    """A row in plain form, and the faults of its parts.

    Args:
        packed: name of the image that lies beside the row in its shard; it takes the place of the name in the row.
    """
    if not isinstance(raw, dict):
        return raw, []
    if words_of(raw) is LLAVA and "images" not in raw:
        image = _file_name(raw.get("image"))
        return {**raw, "image": packed if packed is not None else image}, []
    faults: list[Fault] = []
    in_parts: list[Any] = []
    messages = raw.get(words_of(raw).messages)
    if isinstance(messages, list):
        messages = [_plain_message(message, i, in_parts, faults) for i, message in enumerate(messages)]
    images = [_file_name(image) for image in in_parts or _listed(raw)]
    if len(images) > 1:
        faults.append(("several-images", f"{len(images)} images; a conversation has one at most: split the row"))
    faults += [_remote(image) for image in images if isinstance(image, str) and "://" in image.split("?")[0]]
    rest = {name: value for name, value in raw.items() if name not in ("image", "images")}
    name = packed if packed is not None else images[0] if images else None
    return {**rest, words_of(raw).messages: messages, "image": name}, faults


def _remote(image: str) -> Fault:
    return "field-type", f"image '{image[:60]}' is an address; nothing is fetched: save the picture as a file"


def _listed(raw: dict[str, Any]) -> list[Any]:
    images, image = raw.get("images"), raw.get("image")
    if isinstance(images, list):
        return images
    return [one for one in (image, images) if one is not None]


def _file_name(image: Any) -> Any:
    """The name of an image that a data set library describes by {"path", "bytes"}; other values as they are."""
    return image["path"] if isinstance(image, dict) and isinstance(image.get("path"), str) else image


def _plain_message(message: Any, position: int, images: list[Any], faults: list[Fault]) -> Any:
    """A message with its content as one string; images that parts bring along go to ``images``."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    texts = []
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image":
            texts.append(IMAGE_MARKER)
            images += [part[key] for key in ("image", "path", "url") if part.get(key) is not None][:1]
        else:
            shown = kind if isinstance(kind, str) else type(part).__name__
            faults.append(("field-type", f"message {position}: a part must be of type text or image, got {shown}"))
    return {**message, "content": "".join(texts)}
