"""Images of rows, or pictures of a benchmark -> can they be decoded, how do they lie, what are their fingerprints."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.errors import UsageError
from bundle.image import open_image
from distill.data.image_source import UPRIGHT, ImageSource, orientation_of, read_image
from distill.data.messages import Fault
from distill.data_doctor.benchmark_pictures import BenchmarkPicture
from distill.data_doctor.image_hash import FINGERPRINT, fingerprint
from distill.data_doctor.row_check import RowTask, image_of, opened

LOOK = np.dtype(
    [("sound", "?"), ("orientation", "u1"), ("content", "<u8", (2,)), ("fingerprint", FINGERPRINT)]
)  # content: the first half of the bytes' sha256


@dataclass
class Looks:
    """LOOK of some pictures, and what is wrong with those that are not sound, by position."""

    looks: NDArray[np.void]
    faults: dict[int, Fault] = field(default_factory=dict)


def look_at_images(task: RowTask, numbers: list[int]) -> Looks:
    """The images of these rows."""
    rows, _ = opened(task)
    found = Looks(np.zeros(len(numbers), LOOK))
    for position, number in enumerate(numbers):
        source = image_of(rows, number, rows.raw(number))
        assert source is not None
        _look_at_source(source, position, found)
    return found


def look_at_pictures(pictures: list[BenchmarkPicture]) -> Looks:
    """Pictures of a benchmark; one that cannot be decoded is not sound."""
    found = Looks(np.zeros(len(pictures), LOOK))
    for position, (_, source) in enumerate(pictures):
        if isinstance(source, Path):
            _look_at_source(source, position, found)
        else:
            _look(source, "the picture", position, found)
    return found


def _look_at_source(source: ImageSource, position: int, found: Looks) -> None:
    if isinstance(source, Path) and not source.is_file():
        found.faults[position] = "image-missing", f"{source} does not exist"
        return
    try:
        data = read_image(source)
    except UsageError as error:
        found.faults[position] = "image-corrupt", str(error)
        return
    _look(data, f"image {source}", position, found)


def _look(data: bytes, name: str, position: int, found: Looks) -> None:
    try:
        picture = open_image(data, name)
    except UsageError as error:
        found.faults[position] = "image-corrupt", str(error)
        return
    orientation = orientation_of(data)
    look = found.looks[position]
    look["sound"] = True
    look["orientation"] = orientation if 0 <= orientation < 256 else UPRIGHT
    look["content"] = np.frombuffer(hashlib.sha256(data).digest()[:16], "<u8")
    look["fingerprint"] = fingerprint(picture)[0]
