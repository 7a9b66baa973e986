"""Row lengths + (seed, epoch, processes) -> the order of an epoch: like lengths together, every process in step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import Sampler

from bundle.errors import UsageError


class LengthGroupedOrder(Sampler[int]):
    """A new order each epoch, fixed by (seed, epoch) so that a resumed run sees what a straight one sees.

    Rows are shuffled, sorted by length within groups of 32 steps, and the steps shuffled again: little padding,
    neighbours still vary, and the processes of one step have rows of like length, so that none waits for another.
    accelerate deals batches out in turn, batch k to process k mod ``processes``. A step's rows depend on
    ``processes * batch_size`` alone: two processes train on those that one would with batches twice as large.
    Rows left over, fewer than one step's, are the last of the shuffled ones and not the longest of a group, so that no
    row is left over in every epoch.

    Args:
        lengths: of the rows, in any unit [rows].
        batch_size: rows a process takes per step.
        processes: that train together. With several, the rows left over sit the epoch out: all processes have as many
            batches, and no row comes twice. One process takes them as a last, smaller batch.

    Raises:
        UsageError: the rows are not enough for one step of all processes.
    """

    STEPS_PER_GROUP = 32

    def __init__(self, lengths: ArrayLike, batch_size: int, seed: int, processes: int = 1) -> None:
        self._lengths = np.asarray(lengths)
        self._step, self._seed, self._processes = batch_size * processes, seed, processes
        self._epoch = 0
        if processes > 1 and len(self._lengths) < self._step:
            raise UsageError(
                f"{len(self._lengths)} rows are fewer than one step of {processes} processes with --batch-size "
                f"{batch_size}; give fewer processes, a smaller --batch-size or more rows"
            )

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        rows = len(self._lengths)
        return rows if self._processes == 1 else rows - rows % self._step

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        shuffled = torch.randperm(len(self._lengths), generator=draw).numpy()
        full = len(shuffled) // self._step
        dealt, left_over = np.split(shuffled, [full * self._step])
        groups = np.arange(len(dealt)) // (self._step * self.STEPS_PER_GROUP)
        ordered = dealt[np.lexsort((self._lengths[dealt], groups))]  # stable: by group, then by length
        steps = ordered.reshape(full, self._step)[torch.randperm(full, generator=draw).numpy()]
        yield from _one_by_one(steps.reshape(-1))
        if self._processes == 1:
            yield from _one_by_one(left_over)  # last, or it would shift the others


def _one_by_one(rows: np.ndarray, at_once: int = 1 << 16) -> Iterator[int]:
    """Python integers of an array, made a piece at a time."""
    for start in range(0, len(rows), at_once):
        piece: Sequence[int] = rows[start : start + at_once].tolist()
        yield from piece
