"""Data set of any format -> every faulty row by number, id and reason, without training anything.

Two passes, both dealt out to processes in shares: over the rows (shape, ids, lengths), then over the different images
(decoding, orientation, copies, pictures of benchmarks). What is kept of a row is its two 64-bit hashes, what is kept of
an image about 230 bytes in a temporary file, so that memory does not grow with the JSON or the pictures.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bundle.errors import AlignKDError, UsageError
from distill.data.image_source import UPRIGHT
from distill.data.messages import Fault, FaultKind
from distill.data.rows import IndexedRows, open_rows
from distill.data_doctor.benchmark_pictures import BenchmarkPicture, benchmark_pictures
from distill.data_doctor.findings import DataReport, WarningKind
from distill.data_doctor.image_hash import HASH_DISTANCE, Fingerprints, Numbers
from distill.data_doctor.like_pictures import first_copies, nearest
from distill.data_doctor.picture_check import LOOK, Looks, look_at_images, look_at_pictures
from distill.data_doctor.row_check import NONE, LengthRule, RowTask, Stretch, check_rows, row_id

ROWS_AT_ONCE, PICTURES_AT_ONCE = 2000, 64
MOST_PROCESSES = 16
FEW_ROWS = 1000  # not worth starting processes for, unless they are asked for
Progress = Callable[[str, int, int], None]  # what, done, in all (0: not known)
Share = TypeVar("Share")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ImageRule:
    """What to compare images with.

    Attributes:
        benchmarks: folders of benchmarks whose pictures must not be in the data.
        distance: bits of 128 in which the hashes of like pictures may differ; 0: equal hashes only.
        workers: processes; 0: one per processor, and none beside this one for a small data set.
    """

    benchmarks: tuple[Path, ...] = ()
    distance: int = HASH_DISTANCE
    workers: int = 0


def check_data(
    path: Path,
    images: Path | None,
    rule: LengthRule,
    image_rule: ImageRule | None = None,
    progress: Progress = lambda what, done, total: None,
) -> DataReport:
    """Look at every row and decode every image of a data set.

    Args:
        path: as in ``data_files``.
        images: folder that image names are relative to; None: that of the data's first file.
        progress: called with what is done, how much of it, and how much in all.

    Raises:
        UsageError: there is no such file, folder or checkpoint, or the data are of none of the formats.
    """
    image_rule = image_rule or ImageRule()
    with tempfile.TemporaryDirectory(prefix="alignkd-check-") as scratch:
        index = Path(scratch) / "index"
        rows = open_rows(path, images, index, lambda done: progress("reading", done, 0) if not done % 10_000 else None)
        report = DataReport(path, len(rows), exact_lengths=rule.checkpoint is not None)
        with _pool(image_rule.workers, len(rows)) as pool:
            doctor = _Doctor(rows, RowTask(path, rows.images, index, rule), report, pool, progress)
            image_of_row, first = doctor.look_at_rows()
            if len(first):
                looks = np.memmap(Path(scratch) / "looks", LOOK, "w+", shape=first.shape)
                doctor.look_at_images(looks, first, image_of_row)
                doctor.tell_of_copies(looks, first, image_rule.distance)
                for_leaks = doctor.look_at_benchmarks(image_rule.benchmarks)
                doctor.tell_of_leaks(looks, image_of_row, *for_leaks, image_rule.distance)
    report.faulty_rows = int(doctor.faulty.sum())
    report.sort()
    return report


@contextmanager
def _pool(workers: int, rows: int) -> Iterator[ProcessPoolExecutor | None]:
    """As many processes as asked for; None: everything happens in this one."""
    number = workers or (1 if rows < FEW_ROWS else min(MOST_PROCESSES, os.cpu_count() or 1))
    if number == 1:
        yield None
        return
    try:
        with ProcessPoolExecutor(number) as pool:
            yield pool
    except BrokenProcessPool as error:
        raise AlignKDError("a process of the check died, perhaps of memory; run it again with --workers 1") from error


class _Doctor:
    """One run over one data set: the report so far, and which rows are faulty."""

    def __init__(
        self,
        rows: IndexedRows,
        task: RowTask,
        report: DataReport,
        pool: ProcessPoolExecutor | None,
        progress: Progress,
    ) -> None:
        self._rows, self._task, self._report = rows, task, report
        self._pool, self._progress = pool, progress
        self.faulty = np.zeros(len(rows), np.bool_)

    def look_at_rows(self) -> tuple[Numbers, Numbers]:
        """First pass -> the number of each row's image, -1 for none [rows]; the first row of each image [images]."""
        ids, keys = (np.zeros(len(self._rows), np.uint64) for _ in range(2))
        starts = range(0, len(ids), ROWS_AT_ONCE)
        shares = [(self._task, start, min(start + ROWS_AT_ONCE, len(ids))) for start in starts]
        for stretch in self._deal(_check_rows, shares):
            stop = stretch.start + len(stretch.ids)
            ids[stretch.start : stop], keys[stretch.start : stop] = stretch.ids, stretch.image_keys
            self._report.with_image += stretch.with_image
            self._report.longest = max(self._report.longest, stretch.longest)
            for found in stretch.faults:
                self._fault(found.row, found.kind, found.message)
            self._progress("checking rows", stop, len(ids))
        for later, earlier in _repeated(ids):
            if row_id(self._rows.raw(later)) == row_id(self._rows.raw(earlier)):
                self._fault(later, "duplicate-id", f"row {earlier} has the same id")
        _, first, image_of_row = np.unique(keys, return_index=True, return_inverse=True)
        if keys[first[0]] == NONE:
            first, image_of_row = first[1:], image_of_row - 1
        self._report.images = len(first)
        return image_of_row, first

    def look_at_images(self, looks: NDArray[np.void], first: Numbers, image_of_row: Numbers) -> None:
        """Second pass: fill ``looks``; tell of images that cannot be decoded or are turned, in every row with them."""
        bad: dict[int, Fault] = {}
        shares = [(self._task, first[i : i + PICTURES_AT_ONCE]) for i in range(0, len(first), PICTURES_AT_ONCE)]
        done = 0
        for some in self._deal(_look_at_images, shares):
            looks[done : done + len(some.looks)] = some.looks
            bad |= {done + position: fault for position, fault in some.faults.items()}
            done += len(some.looks)
            self._progress("decoding images", done, len(first))
        odd = np.flatnonzero(~looks["sound"] | (looks["orientation"] != UPRIGHT))
        for row in np.flatnonzero(np.isin(image_of_row, odd)).tolist():
            image = int(image_of_row[row])
            if image in bad:
                self._fault(row, *bad[image])
            else:
                turned = f"has EXIF orientation {looks['orientation'][image]}"
                told = f"{self._image_name(row)} {turned}: training and phones see it as stored, turned"
                self._warn(row, "image-rotated", told)

    def tell_of_copies(self, looks: NDArray[np.void], first: Numbers, distance: int) -> None:
        """Different files with the same bytes, or with pictures that look alike; the later one is named."""
        order = np.argsort(first)
        order = order[looks["sound"][order]]  # sound images by the first row that has them
        rows = first[order]
        _, leader, group = np.unique(looks["content"][order], axis=0, return_index=True, return_inverse=True)
        same = leader[group.reshape(-1)]  # the first image with these bytes
        for later in np.flatnonzero(same != np.arange(len(same))).tolist():
            self._warn_of_copy("image-duplicate", "has the same bytes as", rows[later], rows[same[later]])
        alone = np.flatnonzero(same == np.arange(len(same)))
        alike = first_copies(looks["fingerprint"][order[alone]], distance)
        for later in np.flatnonzero(alike != np.arange(len(alike))).tolist():
            self._warn_of_copy("image-near-duplicate", "looks like", rows[alone[later]], rows[alone[alike[later]]])

    def look_at_benchmarks(self, roots: Sequence[Path]) -> tuple[list[str], Fingerprints]:
        """Name and fingerprint of every picture of the benchmarks."""
        names: list[str] = []
        prints = [np.zeros(0, LOOK["fingerprint"])]
        for root in roots:
            before = len(names)
            for share, looks in self._benchmark_looks(root):
                sound = looks.looks["sound"]
                names += [f"{root / name}" for (name, _), ok in zip(share, sound.tolist(), strict=True) if ok]
                prints.append(looks.looks["fingerprint"][sound])
                self._progress("reading benchmarks", len(names), 0)
            if len(names) == before:
                raise UsageError(f"--benchmarks {root} holds no picture; give a folder with images or MMBench's TSV")
        self._report.benchmark_pictures = len(names)
        return names, np.concatenate(prints)

    def _benchmark_looks(self, root: Path) -> Iterator[tuple[list[BenchmarkPicture], Looks]]:
        pictures = benchmark_pictures(root)
        at_once = PICTURES_AT_ONCE * (MOST_PROCESSES if self._pool else 1)  # no more are held: tables hold bytes
        while some := list(islice(pictures, at_once)):
            shares = [some[i : i + PICTURES_AT_ONCE] for i in range(0, len(some), PICTURES_AT_ONCE)]
            yield from zip(shares, self._deal(look_at_pictures, shares), strict=True)

    def tell_of_leaks(
        self, looks: NDArray[np.void], image_of_row: Numbers, names: list[str], prints: Fingerprints, distance: int
    ) -> None:
        """Images that are, or look like, a picture of a benchmark, in every row that has them; the nearest is named."""
        sound = np.flatnonzero(looks["sound"])
        images, pictures, bits = nearest(looks["fingerprint"][sound], prints, distance)
        leaks = {
            int(sound[image]): f"{names[picture]} (hashes differ in {differ} of 128 bits)"
            for image, picture, differ in zip(images.tolist(), pictures.tolist(), bits.tolist(), strict=True)
        }
        for row in np.flatnonzero(np.isin(image_of_row, list(leaks))).tolist():
            told = f"{self._image_name(row)} is in a benchmark: {leaks[int(image_of_row[row])]}"
            self._fault(row, "benchmark-leak", f"{told}; remove the row, or scores there mean nothing")

    def _deal(self, work: Callable[[Share], Result], shares: Iterable[Share]) -> Iterable[Result]:
        """``work`` on every share, in order, in the pool if there is one."""
        return map(work, shares) if self._pool is None else self._pool.map(work, shares)

    def _fault(self, row: int, kind: FaultKind | WarningKind, message: str) -> None:
        self.faulty[row] = True
        self._report.all_faults.add(row, row_id(self._rows.raw(row)), kind, message)

    def _warn(self, row: int, kind: WarningKind, message: str) -> None:
        self._report.all_warnings.add(row, row_id(self._rows.raw(row)), kind, message)

    def _warn_of_copy(self, kind: WarningKind, what: str, later: np.intp, earlier: np.intp) -> None:
        row, of = int(later), int(earlier)
        self._warn(row, kind, f"{self._image_name(row)} {what} {self._image_name(of)} of row {of}")

    def _image_name(self, row: int) -> str:
        """As the row has it; for one in a shard, with the shard."""
        packed = self._rows.packed(row)
        return f"{packed.file.name}:{packed.name}" if packed is not None else self._rows.index.name(row)


def _check_rows(share: tuple[RowTask, int, int]) -> Stretch:
    return check_rows(*share)


def _look_at_images(share: tuple[RowTask, Numbers]) -> Looks:
    return look_at_images(share[0], share[1].tolist())


def _repeated(hashes: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """(row, the first row with its hash) for every row whose hash an earlier one has."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    earlier = first[group]
    for row in np.flatnonzero((earlier < np.arange(len(hashes))) & (hashes != NONE)).tolist():
        yield row, int(earlier[row])
