"""Golden folders of two bundles, or a file of questions -> what both are asked; bundles too unlike are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from bundle.errors import NotComparableError, UsageError
from bundle.golden import read_golden
from bundle.manifest import Frozen, Manifest
from bundle.staging import inside

SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Question:
    """One question, with or without a picture."""

    name: str
    text: str
    image: Path | None


class CaseLine(Frozen):
    """A line of --cases FILE; the image's path is relative to the file."""

    question: str
    image: str | None = None


# What must be the same, or the two are not asked the same: name -> value.
SAME: dict[str, Callable[[Manifest], object]] = {
    "vocabulary size": lambda manifest: manifest.model.vocab_size,
    "tokenizer": lambda manifest: manifest.files[manifest.tokenizer.path].sha256,
    "BOS id": lambda manifest: manifest.tokenizer.bos_id,
    "image token id": lambda manifest: manifest.tokenizer.image_token_id,
    "prompt template": lambda manifest: manifest.prompt.model_dump(),
    "image rule": lambda manifest: manifest.image.model_dump(),
}


def refuse_unlike(names: tuple[str, str], manifests: tuple[Manifest, Manifest]) -> None:
    """Check that both bundles turn one question and picture into the same input.

    Raises:
        NotComparableError: the first thing that differs, with both values.
    """
    for what, value in SAME.items():
        left, right = (value(manifest) for manifest in manifests)
        if left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            part = next(key for key in left if left[key] != right[key])
            what, left, right = f"{what}, {part}", left[part], right[part]
        shown = [repr(side)[:SHOWN_CHARACTERS] for side in (left, right)]
        raise NotComparableError(
            f"{names[0]} and {names[1]} are not asked the same, so their tokens cannot be compared: {what} is "
            f"{shown[0]} and {shown[1]}; compare bundles of one checkpoint"
        )


def golden_questions(bundles: Sequence[Path], manifests: Sequence[Manifest]) -> list[Question]:
    """The golden cases of all bundles, the same picture and question once."""
    found: dict[tuple[str, str | None], Question] = {}
    for bundle, manifest in zip(bundles, manifests, strict=True):
        for case in read_golden(bundle, manifest).cases:
            picture = None if case.image is None else manifest.files[case.image].sha256
            image = None if case.image is None else inside(bundle, case.image, "golden image")
            found.setdefault((case.question, picture), Question(case.name, case.question, image))
    return list(found.values())


def questions_of(path: Path) -> list[Question]:
    """Read JSON lines of {"question": ..., "image": path or null}.

    Raises:
        UsageError: the file cannot be read, holds no question, or a line is no case; with its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--cases {path} cannot be read ({error}); give a text file of JSON lines") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            case = CaseLine.model_validate(json.loads(line))
        except (json.JSONDecodeError, ValidationError) as error:
            what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.msg
            raise UsageError(
                f'--cases {path}, line {number}: {what}; each line is {{"question": "...", "image": "path" or null}}'
            ) from error
        image = None if case.image is None else path.parent / case.image
        if image is not None and not image.is_file():
            raise UsageError(f"--cases {path}, line {number}: image {image} does not exist")
        found.append(Question(f"line {number}", case.question, image))
    if not found:
        raise UsageError(f"--cases {path} holds no question; write one JSON object a line")
    return found
