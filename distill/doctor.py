"""LLaVA data set -> every faulty row by number, id and reason, without training anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from bundle.errors import UsageError
from bundle.image import open_image
from bundle.staging import inside
from distill.row_faults import Fault, FaultKind, shape_faults
from distill.rows import Row, parse_row, read_json_list

WarningKind = Literal["image-rotated"]
EXIF_ORIENTATION = 0x0112
UPRIGHT = 1


@dataclass(frozen=True)
class Finding:
    """One thing wrong with one row; rows count from 0."""

    row: int
    id: str | None
    kind: FaultKind | WarningKind
    message: str


@dataclass
class DataReport:
    """What a dry run saw. ``longest`` is in positions; a lower bound unless ``exact_lengths``."""

    data: Path
    rows: int
    with_image: int = 0
    text_only: int = 0
    images: int = 0
    longest: int = 0
    exact_lengths: bool = False
    faults: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    @property
    def faulty_rows(self) -> int:
        """Rows with at least one fault."""
        return len({fault.row for fault in self.faults})


def counts(findings: list[Finding]) -> dict[str, int]:
    """Findings by kind, most frequent first."""
    return dict(Counter(str(finding.kind) for finding in findings).most_common())


@dataclass(frozen=True)
class LengthRule:
    """How long a row may be.

    Attributes:
        max_length: positions the model has, after each image became ``visual_tokens`` of them.
        text_tokens: a row's ids, image id included; None: words are counted, a lower bound.
    """

    max_length: int
    visual_tokens: int
    text_tokens: Callable[[Row], int] | None = None

    def length(self, row: Row) -> int:
        """Positions the row takes, or at least takes."""
        image = self.visual_tokens if row.image else 0
        if self.text_tokens is None:
            return image + sum(len(turn.question.split()) + len(turn.answer.split()) for turn in row.turns)
        return image + self.text_tokens(row) - (1 if row.image else 0)


@dataclass(frozen=True)
class Picture:
    """What decoding an image file told."""

    problem: str | None
    orientation: int


def find_data_file(path: Path) -> Path:
    """The JSON file itself, or the train.json of a directory.

    Raises:
        UsageError: the directory holds none.
    """
    if path.is_dir() and not (path / "train.json").is_file():
        raise UsageError(
            f"directory {path} holds no train.json; give the JSON file itself, or run: alignkd-data make-demo DIR"
        )
    return path / "train.json" if path.is_dir() else path


def check_data(
    path: Path, images: Path | None, rule: LengthRule, progress: Callable[[int, int], None] = lambda done, rows: None
) -> DataReport:
    """Look at every row and decode every image of a LLaVA data set.

    Args:
        path: JSON file, or a directory with train.json.
        images: folder that image names are relative to; None: the JSON file's folder.
        progress: called with rows done and rows in all.

    Raises:
        UsageError: there is no such file or folder, or the file is not a JSON list.
    """
    data = find_data_file(path)
    raws = read_json_list(data)
    root = data.parent if images is None else images
    if not root.is_dir():
        raise UsageError(f"image folder {root} does not exist; give the folder of the images by --images")
    doctor = _Doctor(data, root, rule, DataReport(data, len(raws), exact_lengths=rule.text_tokens is not None))
    for number, raw in enumerate(raws):
        doctor.look_at(number, raw)
        progress(number + 1, len(raws))
    doctor.report.images = len(doctor.pictures)
    return doctor.report


@dataclass
class _Doctor:
    """One pass over one file: what earlier rows told, and the report so far."""

    data: Path
    root: Path
    rule: LengthRule
    report: DataReport
    ids: dict[str, int] = field(default_factory=dict)
    pictures: dict[Path, Picture] = field(default_factory=dict)

    def look_at(self, number: int, raw: Any) -> None:
        name = str(raw["id"]) if isinstance(raw, dict) and isinstance(raw.get("id"), str | int) else None
        image = raw.get("image") if isinstance(raw, dict) else None
        self.report.with_image += image is not None
        self.report.text_only += image is None
        faults = shape_faults(raw)
        if name is not None and self.ids.setdefault(name, number) != number:
            faults.append(("duplicate-id", f"row {self.ids[name]} has the same id"))
        if isinstance(image, str) and image:
            faults += self._image_faults(number, name, image)
        if not faults:
            faults += self._length_faults(number, raw)
        self.report.faults += [Finding(number, name, kind, message) for kind, message in faults]

    def _image_faults(self, number: int, name: str | None, image: str) -> list[Fault]:
        try:
            path = inside(self.root, image, "image")
        except UsageError as error:
            return [("image-outside", str(error))]
        if not path.is_file():
            return [("image-missing", f"{path} does not exist")]
        if path not in self.pictures:
            self.pictures[path] = _look(path)
        picture = self.pictures[path]
        if picture.problem is not None:
            return [("image-corrupt", picture.problem)]
        if picture.orientation != UPRIGHT:
            text = f"{image} has EXIF orientation {picture.orientation}: training and phones see it as stored, turned"
            self.report.warnings.append(Finding(number, name, "image-rotated", text))
        return []

    def _length_faults(self, number: int, raw: Any) -> list[Fault]:
        try:
            row = parse_row(raw, number, self.data, self.root)
        except UsageError as error:  # the reader of training data has the last word on shape
            return [("row-shape", str(error))]
        length = self.rule.length(row)
        self.report.longest = max(self.report.longest, length)
        if length <= self.rule.max_length:
            return []
        at_least = "" if self.report.exact_lengths else "at least "
        image = f", {self.rule.visual_tokens} of them for its image" if row.image else ""
        return [("too-long", f"takes {at_least}{length} positions{image}; the model has {self.rule.max_length}")]


def _look(path: Path) -> Picture:
    try:
        open_image(path)
        with Image.open(path) as header:
            return Picture(None, int(header.getexif().get(EXIF_ORIENTATION, UPRIGHT)))
    except UsageError as error:
        return Picture(str(error), UPRIGHT)


def checkpoint_tokens(checkpoint: Path) -> Callable[[Row], int]:
    """How many ids a row has with a checkpoint's own tokenizer and template, as in training.

    Raises:
        UsageError: no checkpoint there, or the distill extra is missing.
    """
    try:
        from distill.data import encode_row
        from distill.models.processing import read_processing
    except ImportError as error:
        from bundle.errors import missing_extra

        raise missing_extra(str(error.name), "distill") from error
    from bundle.tokenizer import open_tokenizer

    processing = read_processing(checkpoint)
    tokenizer = open_tokenizer(processing.tokenizer, processing.tokenizer_path.parent)
    return lambda row: len(encode_row(row, processing, tokenizer)[0])
