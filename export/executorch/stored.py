"""A .pte and the digests of the weights that were handed to its lowering -> the float32 matrices that the file holds.

ExecuTorch names the data of a delegate by its contents, so a weight that was packed otherwise than it should be is not
there under its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from bundle.errors import VerificationError
from bundle.manifest import Frozen
from bundle.pte import open_pte
from export.weights.blocks import CHUNK_VALUES, NIBBLE_PAIRS, Floats
from export.weights.lazy import LazyWeights
from export.weights.recipe import Storage


class StoredIntegers(Frozen):
    """A matrix of 4-bit levels in groups (low nibble first, 8 added) or of 8-bit levels per row, and its scales."""

    kind: Literal["integers"] = "integers"
    key: str
    scales: str
    shape: tuple[int, ...]
    bits: Literal[4, 8]
    group_size: int | None


class StoredHalves(Frozen):
    """A float16 matrix or vector."""

    kind: Literal["halves"] = "halves"
    key: str
    shape: tuple[int, ...]


Stored = Annotated[StoredIntegers | StoredHalves, Field(discriminator="kind")]


def key_of(content: bytes) -> str:
    """The name that ExecuTorch gives to data of a delegate."""
    return sha256(content).hexdigest()


def half_bytes(values: torch.Tensor) -> bytes:
    """A float16 tensor as the file holds it."""
    return values.contiguous().numpy().tobytes()


def integer_bytes(levels: torch.Tensor, scales: torch.Tensor, storage: Storage) -> tuple[bytes, bytes]:
    """Levels [N, K] int8 and float32 scales [N, groups] as the file holds them."""
    if storage.bits == 8:
        return levels.contiguous().numpy().tobytes(), scales.contiguous().numpy().tobytes()
    codes = (levels.contiguous().numpy().view(np.uint8) + np.uint8(8)).reshape(-1, 2)
    nibbles = (codes[:, 0] | (codes[:, 1] << 4)).tobytes()
    return nibbles, scales.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()


class StoredWeights(LazyWeights):
    """State-dict name -> the float32 weight that the file means, read from it when asked for.

    Raises:
        VerificationError: the file does not hold a weight as it was handed to the lowering.
    """

    def __init__(self, path: Path, records: Mapping[str, Stored]) -> None:
        self._path, self.records = path, dict(records)
        self._places = {key: (start, end) for key, start, end in open_pte(path).constants()}
        self._nameless = [place for key, place in self._places.items() if key.startswith("constant_segment.")]
        self._found: dict[str, int] = {}
        for name, record in self.records.items():
            self._found[record.key] = self._find(name, record.key, _size(record))
            if isinstance(record, StoredIntegers):
                rows = record.shape[0]
                groups = 1 if record.group_size is None else record.shape[1] // record.group_size
                size = rows * groups * (2 if record.bits == 4 else 4)
                self._found[record.scales] = self._find(name, record.scales, size)

    def _find(self, name: str, key: str, size: int) -> int:
        """Where in the file the content of this digest begins."""
        for named in (key, f"scale_{key}"):
            if named in self._places and self._places[named][1] - self._places[named][0] == size:
                return self._places[named][0]
        for start, end in self._nameless:
            if 0 <= end - start - size < 4096 and key_of(self._bytes(start, size).tobytes()) == key:
                return start
        raise VerificationError(
            f"{self._path.name} does not hold '{name}' as it was quantized: lowering packed it otherwise; "
            "run alignkd-doctor (tested versions?)"
        )

    def _bytes(self, start: int, size: int) -> Any:
        return np.memmap(self._path, np.uint8, "r", start, (size,))

    def __getitem__(self, name: str) -> torch.Tensor:
        out = torch.empty(self.records[name].shape)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: torch.Tensor) -> None:
        record, at = self.records[name], self._found[self.records[name].key]
        if isinstance(record, StoredHalves):
            halves = self._bytes(at, 2 * out.numel()).view(np.float16).reshape(record.shape)
            out.numpy()[...] = halves
            return
        rows, columns = record.shape
        step = max(1, CHUNK_VALUES // columns)
        for first in range(0, rows, step):
            _read_rows(self, record, out.numpy(), first, min(rows, first + step))

    def part(self, key: str, start: int, size: int) -> Any:
        """Bytes ``start`` to ``start + size`` of one content."""
        return self._bytes(self._found[key] + start, size)

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


def _size(record: StoredIntegers | StoredHalves) -> int:
    values = int(np.prod(record.shape))
    return 2 * values if isinstance(record, StoredHalves) else values * record.bits // 8


def _read_rows(weights: StoredWeights, record: StoredIntegers, out: Floats, first: int, last: int) -> None:
    """Rows ``first`` to ``last`` of an integer matrix, as float32."""
    count, columns = last - first, record.shape[1]
    if record.bits == 8:
        levels = weights.part(record.key, first * columns, count * columns).view(np.int8).reshape(count, columns)
        scales = weights.part(record.scales, 4 * first, 4 * count).view(np.float32)[:, None]
        np.multiply(levels, scales, out=out[first:last])
        return
    assert record.group_size is not None
    groups = columns // record.group_size
    data = weights.part(record.key, first * columns // 2, count * columns // 2)
    halves = weights.part(record.scales, 2 * first * groups, 2 * count * groups).view(np.uint16)
    scales = (halves.astype(np.uint32) << 16).view(np.float32)  # bfloat16 is the upper half of a float32
    values = NIBBLE_PAIRS[data].view(np.float32).reshape(count, groups, record.group_size)
    np.multiply(values, scales.reshape(count, groups, 1), out=out[first:last].reshape(values.shape))
