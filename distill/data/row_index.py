"""Data files + an index folder -> one fixed-size record a row, memory-mapped: where it lies, its length, its image.

Built once, by one pass that holds one row at a time. An index is used again when format, files (path, size, time of
change) and image folder are the same. It is written aside and renamed, so that of several processes one wins and none
sees half an index. A row takes 51 bytes and the length of its image's name; parquet rows are copied into it whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bundle.errors import UsageError
from bundle.staging import sha256_of, write_text_whole
from distill.data.data_files import FORMATS, container_of
from distill.data.messages import Fault
from distill.data.row_sources import Located, Span, located_rows

VERSION = 1
RECORD = np.dtype(
    [
        ("file", "<u4"), ("start", "<u8"), ("size", "<u4"),  # the row's JSON
        ("image_file", "<u4"), ("image_start", "<u8"), ("image_size", "<u4"),  # NO_FILE: it is a file of its own
        ("name_start", "<u8"), ("name_size", "<u4"),  # the image's name, in names.bin
        ("characters", "<u4"),  # of questions and answers
        ("has_image", "?"), ("sound", "?"), ("present", "?"),
    ]
)  # fmt: skip
RECORDS, NAMES, PACKED, FAULTS, HEAD = "records.bin", "names.bin", "packed.bin", "faults.json", "index.json"
NO_FILE = (1 << 32) - 1
BUFFERED_ROWS = 1 << 14


@dataclass(frozen=True)
class Measure:
    """What the reader of rows says about one: its text, and whether training can use it."""

    characters: int
    has_image: bool
    image_name: str
    sound: bool
    present: bool


Measurer = Callable[[int, Located], Measure]


@dataclass(frozen=True)
class RowIndex:
    """A whole index.

    Attributes:
        files: file numbers of the records, the packed rows last.
        faults: row number -> what the shards themselves got wrong.
        sha256: of the data: of the file; of several files, of their names and hashes; of tar shards, of names, places
            and JSON of their samples, because hashing terabytes of pictures would take hours.
    """

    folder: Path
    files: list[Path]
    records: NDArray[np.void]
    faults: dict[int, list[Fault]]
    sha256: str

    def name(self, number: int) -> str:
        """The image's name in a row; '' if it has none."""
        record = self.records[number]
        return self._read(self.folder / NAMES, int(record["name_start"]), int(record["name_size"])).decode()

    def row_bytes(self, number: int) -> bytes:
        """The row's JSON."""
        record = self.records[number]
        return self._read(self.files[record["file"]], int(record["start"]), int(record["size"]))

    @staticmethod
    def _read(path: Path, start: int, size: int) -> bytes:
        if not size:
            return b""
        with path.open("rb", buffering=0) as file:  # opened each time: nothing to share between processes
            file.seek(start)
            return file.read(size)


def open_index(
    files: list[Path],
    images: Path,
    folder: Path,
    measure: Measurer,
    progress: Callable[[int], None] = lambda rows: None,
) -> RowIndex:
    """Use the index in ``folder`` when it is of these files, and build it there otherwise.

    Args:
        images: where the names of images lead, because ``present`` depends on it.
        progress: called with the number of rows read so far.

    Raises:
        UsageError: the files are of none of the formats, cannot be read to their end, or hold no row.
    """
    key = _key(files, images)
    if _read_key(folder) != key:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _build(files, key, aside, measure, progress)
            if _read_key(folder) != key:  # another process may have been faster
                shutil.rmtree(folder, ignore_errors=True)
                _rename(aside, folder, key)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return load_index(folder)


def load_index(folder: Path) -> RowIndex:
    """Map a whole index."""
    head = json.loads((folder / HEAD).read_text(encoding="utf-8"))
    faults: dict[str, list[list[Any]]] = json.loads((folder / FAULTS).read_text(encoding="utf-8"))
    files = [Path(one["path"]) for one in head["key"]["files"]]
    records = np.memmap(folder / RECORDS, RECORD, "r", shape=(head["rows"],))
    by_row = {int(row): [(kind, message) for kind, message in pairs] for row, pairs in faults.items()}
    return RowIndex(folder, [*files, folder / PACKED], records, by_row, head["sha256"])


def _rename(aside: Path, folder: Path, key: dict[str, Any]) -> None:
    try:
        os.rename(aside, folder)
    except OSError:
        if _read_key(folder) != key:
            raise


def _key(files: list[Path], images: Path) -> dict[str, Any]:
    facts = [(file.resolve(), file.stat()) for file in files]
    described = [{"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns} for path, stat in facts]
    return {"version": VERSION, "files": described, "images": str(images.resolve())}


def _read_key(folder: Path) -> object:
    head = folder / HEAD
    return json.loads(head.read_text(encoding="utf-8"))["key"] if head.is_file() else None


def _build(
    files: list[Path], key: dict[str, Any], folder: Path, measure: Measurer, progress: Callable[[int], None]
) -> None:
    container = container_of(files)
    digest = hashlib.sha256()
    faults: dict[int, list[Fault]] = {}
    with (folder / RECORDS).open("wb") as records, (folder / NAMES).open("wb") as names:
        with (folder / PACKED).open("wb") as packed:
            rows = _Writer(records, names)
            for located in located_rows(files, container, packed):
                measured = measure(rows.number, located)
                if located.faults:
                    faults[rows.number] = located.faults
                if container == "tar":
                    text = json.dumps(located.raw, sort_keys=True)
                    digest.update(f"{located.image_name} {located.row} {located.image} {text}\n".encode())
                rows.add(located, measured)
                progress(rows.number)
            rows.flush()
    if not rows.number:
        raise UsageError(f"{files[0]} holds no row; give {FORMATS}")
    if container != "tar":
        hashes = [sha256_of(file) for file in files]
        named = "".join(f"{file.name} {one}\n" for file, one in zip(files, hashes, strict=True))
        sha256 = hashes[0] if len(files) == 1 else hashlib.sha256(named.encode()).hexdigest()
    else:
        sha256 = digest.hexdigest()
    (folder / FAULTS).write_text(json.dumps(faults), encoding="utf-8")
    write_text_whole(folder / HEAD, json.dumps({"key": key, "rows": rows.number, "sha256": sha256}) + "\n")


class _Writer:
    """Records and names, buffered."""

    def __init__(self, records: BinaryIO, names: BinaryIO) -> None:
        self._records, self._names = records, names
        self._buffer: list[tuple[int | bool, ...]] = []
        self._name_start = 0
        self.number = 0

    def add(self, located: Located, measured: Measure) -> None:
        row, image, name = located.row, located.image or Span(NO_FILE), measured.image_name.encode()
        self._names.write(name)
        self._buffer.append(
            (row.file, row.start, row.size, image.file, image.start, image.size, self._name_start, len(name),
             measured.characters, measured.has_image, measured.sound, measured.present)
        )  # fmt: skip
        self._name_start += len(name)
        self.number += 1
        if len(self._buffer) >= BUFFERED_ROWS:
            self.flush()

    def flush(self) -> None:
        self._records.write(np.array(self._buffer, RECORD).tobytes())
        self._buffer.clear()
