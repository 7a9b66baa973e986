"""One weight and its storage -> the constants of an ML program that stand for it; coremltools computes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from export.coreml.convert import quiet
from export.weights.palette import PALETTE_BITS, cluster
from export.weights.recipe import Storage

# MIL.proto, DataType
FLOAT16, FLOAT32, INT8, INT4, UINT4 = 10, 11, 21, 25, 35
CHUNK_VALUES = 1 << 22  # compressed at once: coremltools makes some five copies
Kind = Literal["const", "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"]


@dataclass(frozen=True)
class Constant:
    """Values of one blob; of 4-bit types one a byte."""

    values: NDArray[Any]
    dtype: int


@dataclass(frozen=True)
class Packed:
    """An operation without inputs from other operations: parameter -> its constant."""

    kind: Kind
    parts: dict[str, Constant]


def stored_codes(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]) -> Packed:
    """A weight whose 4-bit codes were chosen.

    Args:
        codes: int8 [N, K].
        scales: [N, groups], exact in float16 (export/weights/grid.py).
        shape: in the program: [N, K] with axes of 1 added.
    """
    ones = (1,) * (len(shape) - 2)
    data = Constant(codes.numpy().reshape(shape), INT4)
    return Packed(
        "constexpr_blockwise_shift_scale",
        {"data": data, "scale": Constant(scales.numpy().astype(np.float16).reshape(shape[0], -1, *ones), FLOAT16)},
    )


def pack(weight: torch.Tensor, shape: tuple[int, ...], storage: Storage) -> Packed:
    """Compress one weight, rounding it to nearest or to the entries of tables.

    Args:
        weight: any float type; the first axis is that of output channels.
        shape: in the program: ``weight``'s with axes of 1 added.
    """
    if storage.bits == 32:
        return Packed("const", {"val": Constant(weight.float().numpy().reshape(shape), FLOAT32)})
    if storage.bits == 16:
        return Packed("const", {"val": Constant(weight.half().numpy().reshape(shape), FLOAT16)})
    pack_rows = _palettized if storage.palette_rows else _scaled
    pieces = [pack_rows(piece, storage) for piece in _pieces(weight, storage.palette_rows or 1)]
    numbers, shared = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    ones = (1,) * (len(shape) - 2)
    if storage.palette_rows:  # one table [entries, 1] per group of rows
        tables = Constant(shared.reshape(-1, 1, *ones, 1 << PALETTE_BITS, 1), FLOAT16)
        return Packed("constexpr_lut_to_dense", {"indices": Constant(numbers.reshape(shape), UINT4), "lut": tables})
    scales = Constant(shared.reshape(shape[0], -1, *ones), FLOAT16)
    data = Constant(numbers.reshape(shape), INT4 if storage.bits == 4 else INT8)
    return Packed("constexpr_blockwise_shift_scale", {"data": data, "scale": scales})


def _pieces(weight: torch.Tensor, multiple: int) -> Iterator[NDArray[np.float32]]:
    """[rows, width] in pieces of whole groups of ``multiple`` rows."""
    rows = weight.reshape(weight.shape[0], -1)
    count = max(1, CHUNK_VALUES // rows.shape[1] // multiple) * multiple
    for piece in rows.split(count):
        yield piece.float().numpy()


def _scaled(rows: NDArray[np.float32], storage: Storage) -> tuple[NDArray[Any], NDArray[Any]]:
    """Symmetric integers [rows, width] and their float16 scales [rows, groups]."""
    sizes = [1, storage.group_size or 0]
    with np.errstate(invalid="ignore"):  # a group of zeros has scale 0
        found = _methods().linear_quantize_weights.blockwise_compress(
            rows, nbits=int(storage.bits), mode="LINEAR_SYMMETRIC", signed=True, block_sizes=sizes
        )
    return np.where(rows == 0, 0, found.data).astype(np.int8), found.scale.astype(np.float16)


def _palettized(rows: NDArray[np.float32], storage: Storage) -> tuple[NDArray[Any], NDArray[Any]]:
    """Numbers of table entries [rows, width] and float16 tables [groups, 1, entries, 1]."""
    found = _methods().palettize_weights.blockwise_compress(
        rows.astype(np.float16), "CUSTOM", None, [storage.palette_rows, 0], lut_function=cluster
    )
    return found.indices, found.lut


def _methods() -> Any:
    """coremltools' compression of a single array; its public functions take whole models."""
    with quiet():
        from coremltools.optimize.coreml import _quantization_passes
    return _quantization_passes
