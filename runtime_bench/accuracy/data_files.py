"""Data root -> one benchmark's folder, its JSON and jsonl files as checked records, and their sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from bundle.errors import UsageError

Record = TypeVar("Record", bound=BaseModel)
Shape = TypeVar("Shape")


class DataRecord(BaseModel):
    """Base of every record of a benchmark file: immutable; the fields that scoring does not need are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class LoaderLine(DataRecord):
    """A line of a LLaVA question file (GQA, TextVQA, POPE, MME)."""

    question_id: str | int
    image: str
    text: str
    category: str = "default"


def benchmark_folder(data: Path, benchmark: str) -> Path:
    """``data`` holds the benchmarks' folders, or is the folder of one of them.

    Raises:
        UsageError: there is no such folder.
    """
    if not data.is_dir():
        raise UsageError(f"data folder {data} does not exist; make one with: alignkd-data make-demo DIR")
    inner = data / benchmark
    return inner if inner.is_dir() else data


def existing(folder: Path, *names: str) -> Path:
    """The first of ``names`` that exists in ``folder``.

    Raises:
        UsageError: none does.
    """
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise UsageError(f"{folder} has no {' or '.join(names)}; --data takes the benchmark's folder or the one above it")


def read_json(path: Path, shape: type[Shape]) -> Shape:
    """Read a JSON file of a known shape, e.g. ``dict[str, Problem]``.

    Raises:
        UsageError: the file is missing, no JSON, or of another shape.
    """
    return _checked(TypeAdapter(shape), _loads(_read_text(path), str(path)), str(path))


def read_jsonl(path: Path, record: type[Record]) -> list[tuple[int, Record]]:
    """Read a jsonl file as (line number, record); blank lines are skipped.

    Raises:
        UsageError: the file is missing, or a line is no JSON or of another shape; names file and line.
    """
    adapter = TypeAdapter(record)
    return [
        (number, _checked(adapter, _loads(line, f"{path}:{number}"), f"{path}:{number}"))
        for number, line in enumerate(_read_text(path).split("\n"), start=1)
        if line.strip()
    ]


def read_questions(path: Path) -> list[LoaderLine]:
    """Read a LLaVA question file."""
    return [line for _, line in read_jsonl(path, LoaderLine)]


def sha256_of_files(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """Name under ``root`` -> sha256 of the file's bytes, so that two scores can be seen to be of the same data."""
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"file {path} does not exist")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON ({error.msg} at column {error.colno})") from error


def _checked(adapter: TypeAdapter[Shape], raw: Any, where: str) -> Shape:
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "(top level)"
        raise UsageError(f"{where}: field '{field}': {first['msg']} ({error.error_count()} problems)") from error
