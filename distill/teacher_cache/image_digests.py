"""Image of a row -> SHA-256 of its bytes, remembered by its file's path, size and time: a second run reads none."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from pathlib import Path
from typing import Any

from bundle.errors import UsageError
from distill.data.image_source import ImageSource, PackedImage, read_image

SECONDS_TO_WAIT = 5.0  # for another process that is writing


class ImageDigests:
    """A memo in one SQLite file: looked up one by one from many processes, which keeps no table in memory.

    It only saves time. Where it cannot be written (a cache on a read-only disk), pictures are read each time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened: tuple[int, sqlite3.Connection] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def digest(self, image: ImageSource) -> bytes:
        """SHA-256 of the image's bytes, in a file of its own or in a shard.

        Raises:
            UsageError: it cannot be read.
        """
        stamp = _stamp(image)
        known = self._memo().execute("SELECT sha256 FROM images WHERE path=? AND size=? AND time=?", stamp).fetchone()
        if known is not None:
            return bytes(known[0])
        digest = hashlib.sha256(read_image(image)).digest()
        self._remember((*stamp, digest))
        return digest

    def _remember(self, row: tuple[str, int, int, bytes]) -> None:
        try:
            self._memo().execute("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?)", row)
        except sqlite3.OperationalError:
            return  # read-only, or another process is writing for long

    def _memo(self) -> sqlite3.Connection:
        if self._opened is None or self._opened[0] != os.getpid():  # a connection does not outlive a fork
            self._opened = (os.getpid(), _open(self._path))
        return self._opened[1]


def _stamp(image: ImageSource) -> tuple[str, int, int]:
    """What tells that the bytes are still the same: path, with the byte range in a shard, and the file's size, time."""
    file = image.file if isinstance(image, PackedImage) else image
    where = f"?{image.start}+{image.size}" if isinstance(image, PackedImage) else ""
    try:
        found = file.stat()
    except OSError as error:
        raise UsageError(f"image {image} cannot be read ({error.strerror})") from error
    return f"{file.absolute()}{where}", found.st_size, found.st_mtime_ns


def _open(path: Path) -> sqlite3.Connection:
    table = "CREATE TABLE IF NOT EXISTS images (path TEXT PRIMARY KEY, size INTEGER, time INTEGER, sha256 BLOB)"
    where = path if path.exists() or os.access(path.parent, os.W_OK) else ":memory:"
    memo = sqlite3.connect(where, timeout=SECONDS_TO_WAIT, isolation_level=None)  # every row is written at once
    memo.execute("PRAGMA synchronous=OFF")  # a lost row is read again
    memo.execute(table)
    return memo
