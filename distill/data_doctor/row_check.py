"""A stretch of rows -> their faults and lengths, hashes of their ids and images: one process's share of the doctor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.errors import UsageError
from bundle.staging import inside
from distill.data.conversation import Row, parse_row
from distill.data.image_source import ImageSource
from distill.data.messages import Fault, plain_row
from distill.data.row_faults import shape_faults
from distill.data.row_index import load_index
from distill.data.rows import IndexedRows
from distill.data_doctor.findings import Finding

Encoder = Callable[[Row], tuple[list[int], list[int], int]]  # ids, labels, the id that stands for the image
NONE = 0  # in the hashes: this row has no id, or no image


@dataclass(frozen=True)
class LengthRule:
    """How long a row may be.

    Attributes:
        max_length: positions the model has, after each image became ``visual_tokens`` of them.
        checkpoint: whose tokenizer and template make the ids; None: words are counted, a lower bound.
    """

    max_length: int
    visual_tokens: int
    checkpoint: Path | None = None


@dataclass(frozen=True)
class RowTask:
    """Where the rows are and how long they may be; small enough to be sent with every stretch."""

    data: Path
    images: Path
    index: Path
    rule: LengthRule


@dataclass
class Stretch:
    """What rows ``[start, start + len(ids))`` told.

    Attributes:
        ids, image_keys: 64-bit hashes of each row's id and of where its image lies; NONE where it has none.
    """

    start: int
    ids: NDArray[np.uint64]
    image_keys: NDArray[np.uint64]
    with_image: int = 0
    longest: int = 0
    faults: list[Finding] = field(default_factory=list)


def check_rows(task: RowTask, start: int, stop: int) -> Stretch:
    """Look at rows ``[start, stop)``; no image is opened."""
    rows, encode = opened(task)
    seen = Stretch(start, np.zeros(stop - start, np.uint64), np.zeros(stop - start, np.uint64))
    for number in range(start, stop):
        _look(rows, number, task.rule, encode, seen)
    return seen


@lru_cache(maxsize=2)
def opened(task: RowTask) -> tuple[IndexedRows, Encoder | None]:
    """Once a process: the rows, and the tokenizer if one is asked for."""
    rows = IndexedRows(task.data, task.images, load_index(task.index))
    return rows, None if task.rule.checkpoint is None else checkpoint_encoder(task.rule.checkpoint)


def _look(rows: IndexedRows, number: int, rule: LengthRule, encode: Encoder | None, seen: Stretch) -> None:
    raw, packed = rows.raw(number), rows.packed(number)
    name = row_id(raw)
    faults = list(rows.index.faults.get(number, ()))
    if not any(kind == "row-shape" for kind, _ in faults):
        faults += shape_faults(raw, packed.name if packed else None)
    try:
        source = image_of(rows, number, raw)
    except UsageError as error:
        source = None
        faults.append(("image-outside", str(error)))
    if not faults:
        faults += _length_faults(rows, number, raw, rule, encode, seen)
    here = number - seen.start
    if name is not None:
        seen.ids[here] = hash_of(name)
    if source is not None:
        seen.image_keys[here] = hash_of(str(source))
    has_image = packed is not None or (isinstance(raw, dict) and bool(raw.get("image") or raw.get("images")))
    seen.with_image += has_image or bool(rows.with_image[number])
    seen.faults += [Finding(number, name, kind, message) for kind, message in faults]


def row_id(raw: Any) -> str | None:
    """The row's id as text, if it has one."""
    return str(raw["id"]) if isinstance(raw, dict) and isinstance(raw.get("id"), str | int) else None


def image_of(rows: IndexedRows, number: int, raw: Any) -> ImageSource | None:
    """Where a row's image lies, whether or not the rest of the row is well formed.

    Raises:
        UsageError: its name leaves the image folder.
    """
    packed, faults = rows.packed(number), rows.index.faults.get(number)
    if packed is not None or faults:
        return packed if not any(kind == "image-missing" for kind, _ in faults or ()) else None
    plain, _ = plain_row(raw)
    image = plain.get("image") if isinstance(plain, dict) else None
    return inside(rows.images, image, "image") if isinstance(image, str) and image else None


def hash_of(text: str) -> int:
    """64 bits that stand for a text; never NONE. Two of 2 million texts agree with a chance of one in 10 million."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little") or 1


def _length_faults(
    rows: IndexedRows, number: int, raw: Any, rule: LengthRule, encode: Encoder | None, seen: Stretch
) -> list[Fault]:
    try:
        row = parse_row(raw, number, rows.data, rows.images, rows.packed(number))
    except UsageError as error:  # the reader of training data has the last word on shape
        return [("row-shape", str(error))]
    more = rule.visual_tokens - 1 if row.image else 0
    if encode is None:
        words = sum(len(turn.question.split()) + len(turn.answer.split()) for turn in row.turns)
        length, masked = words + (rule.visual_tokens if row.image else 0), []
    else:
        ids, labels, image_id = encode(row)
        length, masked = len(ids) + more, _cut_faults(row, ids, labels, image_id, rule.max_length - more, rule)
    seen.longest = max(seen.longest, length)
    if length <= rule.max_length:
        return masked
    at_least = "at least " if encode is None else ""
    image = f", {rule.visual_tokens} of them for its image" if row.image else ""
    return [
        ("too-long", f"takes {at_least}{length} positions{image}; the model has {rule.max_length}"),
        *masked,
    ]


def _cut_faults(row: Row, ids: list[int], labels: list[int], image_id: int, room: int, rule: LengthRule) -> list[Fault]:
    """What training would miss of a row that is cut at the model's length."""
    from distill.batches.encoding import IGNORED

    faults: list[Fault] = []
    if row.image and image_id not in ids[: max(0, room)]:
        faults.append(("image-cut", f"its image comes behind the {rule.max_length} positions the model has"))
    if all(label == IGNORED for label in labels[: max(0, room)]):
        faults.append(("all-masked", f"no answer is left in {rule.max_length} positions: every label would be masked"))
    return faults


def checkpoint_encoder(checkpoint: Path) -> Encoder:
    """A row -> its ids and labels by a checkpoint's own tokenizer and template, as in training.

    Raises:
        UsageError: no checkpoint there, or the distill extra is missing.
    """
    try:
        from distill.batches.encoding import encode_row
        from distill.models.processing import read_processing
    except ImportError as error:
        from bundle.errors import missing_extra

        raise missing_extra(str(error.name), "distill") from error
    from bundle.tokenizer import open_tokenizer

    processing = read_processing(checkpoint)
    tokenizer = open_tokenizer(processing.tokenizer, processing.tokenizer_path.parent)
    image_id = processing.tokenizer.image_token_id
    return lambda row: (*encode_row(row, processing, tokenizer), image_id)
