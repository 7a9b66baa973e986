"""Path, or bytes inside another file -> decoded picture; the two ways in which a row can hold its image."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from bundle.errors import UsageError
from bundle.image import DAMAGE, open_image

EXIF_ORIENTATION = 0x0112
UPRIGHT = 1


@dataclass(frozen=True)
class PackedImage:
    """An image inside a shard: bytes ``[start, start + size)`` of ``file``, read when they are asked for.

    Attributes:
        name: of the member or column, for messages.
    """

    file: Path
    start: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.name}"


ImageSource = Path | PackedImage


def read_image(source: ImageSource) -> bytes:
    """The bytes as stored.

    Raises:
        UsageError: there is no such file, it cannot be read, or the shard ends before the image does.
    """
    try:
        if isinstance(source, Path):
            return source.read_bytes()
        with source.file.open("rb", buffering=0) as file:
            file.seek(source.start)
            data = file.read(source.size)
    except FileNotFoundError as error:
        raise UsageError(f"image {source} does not exist; put it there, or remove the row") from error
    except OSError as error:
        raise UsageError(f"image {source} cannot be read ({error.strerror}); check the file and its rights") from error
    if not source.size:
        raise UsageError(f"image {source} has no bytes in its shard; mend the shard, or remove the row")
    if len(data) < source.size:
        raise UsageError(f"image {source} is cut off: its file ends early; copy or download the shard again")
    return data


def open_source(source: ImageSource) -> Image.Image:
    """The picture as RGB, orientation as stored.

    Raises:
        UsageError: it is missing, no image, truncated, or too large; the line names it.
    """
    return open_image(read_image(source), f"image {source}")


def orientation_of(data: bytes) -> int:
    """The EXIF orientation of an image's bytes; 1 is upright, and so is a picture whose EXIF cannot be read."""
    try:
        with Image.open(io.BytesIO(data)) as header:
            return int(header.getexif().get(EXIF_ORIENTATION, UPRIGHT))
    except (*DAMAGE, TypeError):
        return UPRIGHT
