"""Benchmark folders -> their pictures by name: files, and base64 columns of TSV tables (MMBench).

GQA and POPE ship folders with far more pictures than they ask about. Where question files (*.jsonl with an "image" in
each line, as the six benchmarks have) lie beside pictures, only those that they name count.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
from collections.abc import Iterator
from pathlib import Path

from bundle.errors import UsageError
from distill.data.row_sources import PICTURE_SUFFIXES

BenchmarkPicture = tuple[str, Path | bytes]
LONGEST_REFERENCE = 64  # MMBench: a shorter "image" is the index of the row that has the picture
LARGEST_FIELD = 1 << 30


def benchmark_pictures(root: Path) -> Iterator[BenchmarkPicture]:
    """Name below ``root`` and file, or bytes, of every picture that a benchmark there asks about.

    Raises:
        UsageError: ``root`` is no folder.
    """
    if not root.is_dir():
        raise UsageError(f"--benchmarks {root} is no folder; give the folder that holds a benchmark, or all of them")
    for path, asked in _files(root, frozenset()):
        name = path.relative_to(root).as_posix()
        if path.suffix.lower() in PICTURE_SUFFIXES and (not asked or _is_asked(path, asked)):
            yield name, path
        elif path.suffix.lower() == ".tsv":
            yield from _of_table(path, name)


def _files(folder: Path, asked: frozenset[str]) -> Iterator[tuple[Path, frozenset[str]]]:
    """Every file below ``folder`` with the image names that question files beside or above it ask for."""
    entries = sorted(folder.iterdir())
    here = frozenset(name for path in entries if path.suffix == ".jsonl" for name in _image_names(path))
    for path in entries:
        if path.is_dir():
            yield from _files(path, here or asked)
        elif path.is_file():
            yield path, here or asked


def _image_names(questions: Path) -> Iterator[str]:
    with questions.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                question = json.loads(line)
            except ValueError:
                continue  # some other file; it asks for no picture
            if isinstance(question, dict) and isinstance(question.get("image"), str):
                yield question["image"]


def _is_asked(path: Path, asked: frozenset[str]) -> bool:
    """Whether the path ends as a question's image does, which may or may not name folders."""
    parts = path.parts
    return any("/".join(parts[-depth:]) in asked for depth in range(1, len(parts)))


def _of_table(path: Path, name: str) -> Iterator[BenchmarkPicture]:
    csv.field_size_limit(LARGEST_FIELD)
    with path.open(encoding="utf-8", newline="", errors="replace") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter="\t")):
            image = row.get("image") or ""
            if len(image) <= LONGEST_REFERENCE:
                continue
            try:
                yield f"{name}:{row.get('index') or number}", base64.b64decode(image, validate=True)
            except binascii.Error:
                continue  # not a picture; the benchmark's own reader says so when it is scored
