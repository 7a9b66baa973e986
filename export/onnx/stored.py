"""Where a written weight lies in an ONNX data file -> the float32 matrix that the runtime multiplies with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from bundle.manifest import Frozen
from export.weights.blocks import CHUNK_VALUES, Floats, Packed, unpack
from export.weights.lazy import LazyWeights


class StoredBlocks(Frozen):
    """Rows of a matrix in blocks of MatMulNBits or GatherBlockQuantized."""

    kind: Literal["blocks"] = "blocks"
    file: str
    data_at: int
    scales_at: int
    first: int  # row
    rows: int
    bits: int
    block: int
    columns: int

    def read(self, folder: Path, out: Floats | None = None) -> Floats:
        """[rows, columns], written into ``out`` if given."""
        blocks, blob = -(-self.columns // self.block), self.block * self.bits // 8
        path = folder / self.file
        data = np.memmap(path, np.uint8, "r", self.data_at + self.first * blocks * blob, (self.rows, blocks, blob))
        scales = np.memmap(path, np.float32, "r", self.scales_at + self.first * blocks * 4, (self.rows, blocks))
        weight = np.empty((self.rows, self.columns), np.float32) if out is None else out
        assert weight.shape == (self.rows, self.columns), f"{weight.shape}, not {self.rows} x {self.columns}"
        step = max(1, CHUNK_VALUES // self.columns)
        for at in range(0, self.rows, step):
            rows = slice(at, at + step)
            weight[rows] = unpack(Packed(data[rows], scales[rows], self.bits, self.block, self.columns))
        return weight


class StoredChannels(Frozen):
    """Columns of an int8 matrix [K, N] with a scale each."""

    kind: Literal["channels"] = "channels"
    file: str
    data_at: int
    scales_at: int
    shape: tuple[int, int]
    first: int  # column
    rows: int  # of the weight, columns of the stored matrix

    def read(self, folder: Path) -> Floats:
        """[rows, K]."""
        path = folder / self.file
        levels = np.memmap(path, np.int8, "r", self.data_at, self.shape)[:, self.first : self.first + self.rows]
        scales = np.memmap(path, np.float32, "r", self.scales_at + 4 * self.first, (self.rows,))
        return np.ascontiguousarray(levels.T * scales[:, None], dtype=np.float32)


class StoredHalves(Frozen):
    """Rows of a float16 tensor, or columns of one that was transposed."""

    kind: Literal["halves"] = "halves"
    file: str
    data_at: int
    shape: tuple[int, ...]
    first: int
    rows: int
    transposed: bool

    def read(self, folder: Path) -> Floats:
        """The weight as the checkpoint has it."""
        halves = np.memmap(folder / self.file, np.float16, "r", self.data_at, self.shape)
        last = self.first + self.rows
        piece = halves[:, self.first : last].T if self.transposed else halves[self.first : last]
        return np.ascontiguousarray(piece).astype(np.float32)


Stored = Annotated[StoredBlocks | StoredChannels | StoredHalves, Field(discriminator="kind")]


class StoredWeights(LazyWeights):
    """State-dict name -> the float32 weight that the files in ``folder`` mean, read from them when asked for."""

    def __init__(self, folder: Path, records: Mapping[str, Stored] | None = None) -> None:
        self._folder = folder
        self.records: dict[str, Stored] = dict(records or {})

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.records[name].read(self._folder))

    def read_into(self, name: str, out: torch.Tensor) -> None:
        record = self.records[name]
        if isinstance(record, StoredBlocks):
            record.read(self._folder, out.numpy())
        else:
            out.copy_(self[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)
