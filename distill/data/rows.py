"""Data set in one of the three formats + image folder -> Row objects on demand, every fault named by its row."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bundle.errors import UsageError
from distill.data.conversation import Row as Row
from distill.data.conversation import Turn as Turn
from distill.data.conversation import parse_row as parse_row
from distill.data.data_files import FORMATS, data_files
from distill.data.image_source import PackedImage
from distill.data.messages import plain_row
from distill.data.row_faults import short
from distill.data.row_index import NO_FILE, Measure, RowIndex, load_index, open_index
from distill.data.row_sources import Located


class Rows(Protocol):
    """Rows by number, and what batching needs to know of all of them without reading any."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Row:
        """Read one row."""
        ...

    def __iter__(self) -> Iterator[Row]: ...

    @property
    def characters(self) -> NDArray[np.uint32]:
        """Characters of questions and answers [rows]."""
        ...

    @property
    def with_image(self) -> NDArray[np.bool_]:
        """Whether a row has an image [rows]."""
        ...


class IndexedRows:
    """Rows on disk, found through their index; nothing is kept in memory. Copies in other processes share the index."""

    def __init__(self, data: Path, images: Path, index: RowIndex) -> None:
        self.data, self.images, self.index = data, images, index

    def __len__(self) -> int:
        return len(self.index.records)

    def __getitem__(self, number: int) -> Row:
        if not 0 <= number < len(self):
            raise IndexError(number)
        for kind, message in self.index.faults.get(number, ()):
            if kind != "image-missing":  # the row is whole; its image cannot be read
                raise UsageError(f"{self.data} row {number}: {message}")
        return parse_row(self.raw(number), number, self.data, self.images, self.packed(number))

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    @property
    def characters(self) -> NDArray[np.uint32]:
        return self.index.records["characters"]

    @property
    def with_image(self) -> NDArray[np.bool_]:
        return self.index.records["has_image"]

    @property
    def sha256(self) -> str:
        """Of the data; ``RowIndex`` says what it covers."""
        return self.index.sha256

    def raw(self, number: int) -> Any:
        """The row's JSON value as it stands in the data; None where a shard holds none that can be read."""
        faults, text = self.index.faults.get(number, ()), self.index.row_bytes(number)
        return None if any(kind == "row-shape" for kind, _ in faults) else json.loads(text)

    def packed(self, number: int) -> PackedImage | None:
        """The image that lies beside the row in its shard."""
        record = self.index.records[number]
        if record["image_file"] == NO_FILE:
            return None
        file = self.index.files[record["image_file"]]
        return PackedImage(file, int(record["image_start"]), int(record["image_size"]), self.index.name(number))

    def check(self, missing_images: bool) -> None:
        """Refuse a data set with a row that training cannot use, by the index alone.

        Args:
            missing_images: refuse these too; files that were missing when the index was built are looked for again.

        Raises:
            UsageError: with the first such row and its fault.
        """
        for number in np.flatnonzero(~self.index.records["sound"]):
            self[int(number)]
            raise AssertionError(f"row {number} parses, but its index says that it does not")
        for number in np.flatnonzero(~self.index.records["present"]) if missing_images else ():
            image = self[int(number)].image
            if not isinstance(image, Path):
                raise UsageError(f"{self.data} row {number}: {self.index.faults[int(number)][0][1]}")
            if not image.is_file():
                raise UsageError(
                    f"{self.data} row {number}: image {image} does not exist; put it there, "
                    "or name the right folder with --images"
                )

    def __getstate__(self) -> tuple[Path, Path, Path]:
        return self.data, self.images, self.index.folder

    def __setstate__(self, state: tuple[Path, Path, Path]) -> None:
        self.data, self.images = state[:2]
        self.index = load_index(state[2])  # a mapped array would travel as a copy


def open_rows(
    data: Path,
    images: Path | None = None,
    folder: Path | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> IndexedRows:
    """Open a data set of any of the three formats; faulty rows are let pass until they are read.

    Args:
        data: as in ``data_files``.
        images: the folder that the rows' image names are relative to; None: that of the data's first file.
        folder: where the index is kept; None: in a temporary folder, for as long as the rows are in use.

    Raises:
        UsageError: no such data or image folder, none of the formats, or a file that cannot be read to its end.
    """
    files = data_files(data)
    root = files[0].parent if images is None else images
    if not root.is_dir():
        raise UsageError(f"image folder {root} does not exist; give the folder of the images by --images")
    own = Path(tempfile.mkdtemp(prefix="alignkd-rows-")) if folder is None else None
    try:
        index = open_index(files, root, folder or (own or Path()) / "index", _measurer(data, root), progress)
        rows = IndexedRows(data, root, index)
        if not index.records["sound"].any() and _of_no_shape(first := rows.raw(0)):
            raise UsageError(f"{data} row 0 is {short(first)}; give {FORMATS}")
    except BaseException:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)
        raise
    if own is not None:
        weakref.finalize(rows, _remove, own, os.getpid())
    return rows


def read_rows(data: Path, images: Path | None = None, folder: Path | None = None) -> IndexedRows:
    """Open a data set that training can use as a whole.

    Raises:
        UsageError: as ``open_rows``; or a row is of the wrong shape, or its image is missing or outside ``images``.
    """
    rows = open_rows(data, images, folder)
    rows.check(missing_images=True)
    return rows


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker that ends must not take the index away
        shutil.rmtree(folder, ignore_errors=True)


def _of_no_shape(raw: Any) -> bool:
    return not isinstance(raw, dict) or not {"conversations", "messages"} & set(raw)


def _measurer(data: Path, images: Path) -> Callable[[int, Located], Measure]:
    """What the index keeps of a row; a faulty one counts as empty."""

    def measure(number: int, located: Located) -> Measure:
        packed = None if located.image is None else PackedImage(Path(), 0, 0, located.image_name or "image")
        plain, _ = plain_row(located.raw, packed.name if packed else None)
        name = plain.get("image") if isinstance(plain, dict) else None
        name = name if isinstance(name, str) else ""
        kinds = [kind for kind, _ in located.faults]
        try:
            if set(kinds) - {"image-missing"}:
                raise UsageError(located.faults[0][1])
            row = parse_row(located.raw, number, data, images, packed)
        except UsageError:
            return Measure(0, bool(name), name, sound=False, present=True)
        characters = sum(len(turn.question) + len(turn.answer) for turn in row.turns)
        present = row.image.is_file() if isinstance(row.image, Path) else not kinds
        return Measure(characters, row.image is not None, name, sound=True, present=present)

    return measure
