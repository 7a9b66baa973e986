"""MMBench TSV -> rows: which cells are missing, the options of the prompt, the choices of the letter rule."""

from __future__ import annotations

import csv
import io
import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bundle.errors import UsageError

PUBLISHED = ("mmbench_dev_en_20231003.tsv", "mmbench_dev_20230712.tsv")
ROUND = 1_000_000  # row index = question's index + k * this for its k-th rotation
PROMPT_LETTERS = "ABCD"
REQUIRED = ("index", "question", "answer")
# What pandas, which the published script reads the table with, takes for a missing value.
MISSING = frozenset(
    "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null".split("|")
) | {""}


@dataclass(frozen=True)
class Row:
    """One row: a question in one rotation of its options.

    Attributes:
        options: for the prompt; they end at the first missing one.
        choices: for the letter rule; a missing one leaves a hole.
        image: base64, or the index of the row that has it.
        cut: whether an option's text was taken for a missing value.
    """

    index: int
    question: str
    hint: str | None
    options: tuple[str, ...]
    choices: dict[str, str]
    answer: str
    category: str
    l2_category: str
    image: str
    cut: bool

    @property
    def base(self) -> int:
        """Index of the unrotated row."""
        return self.index % ROUND


@dataclass(frozen=True)
class Table:
    """All rows of one file by their index, in the file's order."""

    path: Path
    rows: dict[int, Row]


def read_table(path: Path) -> Table:
    """Read the TSV; quoted cells may hold tabs and newlines.

    Raises:
        UsageError: it lacks a column, an index is no integer or repeated, or an answer is no letter.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    limit = csv.field_size_limit(max(len(text), 1))  # base64 images exceed the default
    try:
        cells = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", restval=""))
    except csv.Error as error:
        raise UsageError(f"{path} is no tab-separated table ({error})") from error
    finally:
        csv.field_size_limit(limit)
    absent = [name for name in REQUIRED if not cells or name not in cells[0]]
    if absent:
        raise UsageError(f"{path} has no rows with a column '{absent[0]}'; it takes MMBench's dev TSV")
    rows: dict[int, Row] = {}
    for number, record in enumerate(cells, start=1):
        row = _row(record, f"{path} row {number}")
        if row.index in rows:
            raise UsageError(f"{path} row {number}: index {row.index} is there twice; indices must be unique")
        rows[row.index] = row
    return Table(path, rows)


def find_tables(folder: Path) -> list[Path]:
    """The TSVs of a folder, the published ones first.

    Raises:
        UsageError: there is none.
    """
    found = sorted(
        folder.glob("*.tsv"), key=lambda path: (path.name not in PUBLISHED, path.name != PUBLISHED[0], path.name)
    )
    if not found:
        raise UsageError(f"{folder} has no MMBench TSV (e.g. {PUBLISHED[0]})")
    return found


def _row(record: dict[str, str], where: str) -> Row:
    index, answer = record["index"], record["answer"]
    if not index.isascii() or not index.isdigit():
        raise UsageError(f"{where}: index '{index}' is not a whole number")
    if len(answer) != 1 or answer not in string.ascii_uppercase:
        raise UsageError(
            f"{where}: answer '{answer}' is no option letter; the test split has none, score the dev split"
        )
    choices = {letter: record[letter] for letter in string.ascii_uppercase if record.get(letter, "") not in MISSING}
    options = _until_missing(record.get(letter, "") for letter in PROMPT_LETTERS)
    hint = record.get("hint", "")
    return Row(
        index=int(index),
        question=record["question"],
        hint=None if _is_none(hint) else hint,
        options=options,
        choices=choices,
        answer=answer,
        category=record.get("category", ""),
        l2_category=record.get("l2-category", ""),
        image=record.get("image", ""),
        cut=any(record.get(letter, "") and _is_none(record[letter]) for letter in PROMPT_LETTERS),
    )


def _is_none(cell: str) -> bool:
    return cell in MISSING or cell.lower() in ("nan", "none")


def _until_missing(cells: Iterable[str]) -> tuple[str, ...]:
    options = []
    for cell in cells:
        if _is_none(cell):
            break
        options.append(cell)
    return tuple(options)
