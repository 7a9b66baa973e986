"""A value of an ML program (immediate, or an offset into weight.bin) -> numpy array, 1 to 8-bit integers unpacked."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.errors import UsageError

Array = NDArray[Any]

# MIL's DataType numbers (MIL.proto)
STRING = 2
DTYPES: dict[int, type[np.generic]] = {
    1: np.bool_, 10: np.float16, 11: np.float32, 12: np.float64, 21: np.int8, 22: np.int16, 23: np.int32, 24: np.int64,
    31: np.uint8, 32: np.uint16, 33: np.uint32, 34: np.uint64,
}  # fmt: skip
FLOAT16, FLOAT32 = 10, 11
SUB_BYTE_BITS = {25: 4, 35: 4, 36: 2, 37: 1, 38: 6, 39: 3}
SIGNED_SUB_BYTE = (25,)

BLOB_METADATA = struct.Struct(
    "<IIQQQ"
)  # sentinel, blob type, bytes, offset of the data, padding bits; then 32 reserved
BLOB_SENTINEL = 0xDEADBEEF


class WeightFile:
    """weight.bin, mapped and not read; a blob is copied out when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        empty = not path.is_file() or not path.stat().st_size  # numpy maps no empty file
        self.bytes: NDArray[np.uint8] = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, mode="r")

    def blob(self, offset: int) -> NDArray[np.uint8]:
        """The bytes of the blob whose 64-byte metadata record stands at ``offset``.

        Raises:
            UsageError: there is no whole blob at that place.
        """
        record = self.bytes[offset : offset + BLOB_METADATA.size].tobytes()
        if len(record) == BLOB_METADATA.size:
            sentinel, _, size, start, _ = BLOB_METADATA.unpack(record)
            if sentinel == BLOB_SENTINEL and start + size <= self.bytes.size:
                return self.bytes[start : start + size]
        raise UsageError(
            f"{self.path}: no whole blob at byte {offset}; the file is damaged or missing: export the bundle again"
        )


def unpack_bits(raw: NDArray[np.uint8], count: int, bits: int, signed: bool) -> Array:
    """Little-endian packed ``bits``-wide integers -> int8 or uint8 [count]."""
    if bits == 4:
        pairs = np.stack((raw & 15, raw >> 4), -1).reshape(-1)[:count]  # low half first
    else:
        lanes = np.unpackbits(raw, bitorder="little")[: count * bits].reshape(count, bits)
        pairs = (lanes << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)
    if not signed:
        return pairs
    return np.where(pairs >= 1 << (bits - 1), pairs.astype(np.int16) - (1 << bits), pairs).astype(np.int8)


def shape_of(tensor_type: Any) -> tuple[int, ...]:
    """The shape of a constant's type."""
    return tuple(int(dimension.constant.size) for dimension in tensor_type.dimensions)


def read_value(value: Any, weights: WeightFile) -> Array | str | list[str]:
    """A ``Value`` message -> its array as stored (float16 stays float16), or its string."""
    tensor_type = value.type.tensorType
    shape, dtype = shape_of(tensor_type), int(tensor_type.dataType)
    count = int(np.prod(shape))
    if value.WhichOneof("value") == "blobFileValue":
        return _from_bytes(weights.blob(int(value.blobFileValue.offset)), dtype, count).reshape(shape)
    tensor = value.immediateValue.tensor
    kind = tensor.WhichOneof("value")
    if kind == "strings":
        strings = list(tensor.strings.values)
        return strings if shape else strings[0]
    if kind == "bytes":
        return _from_bytes(np.frombuffer(tensor.bytes.values, np.uint8), dtype, count).reshape(shape)
    lists = {
        "floats": tensor.floats, "ints": tensor.ints, "bools": tensor.bools,
        "longInts": tensor.longInts, "doubles": tensor.doubles,
    }  # fmt: skip
    return np.array(lists[kind].values, DTYPES[dtype]).reshape(shape)


def _from_bytes(raw: NDArray[np.uint8], dtype: int, count: int) -> Array:
    bits = SUB_BYTE_BITS.get(dtype)
    if bits is not None:
        return unpack_bits(raw, count, bits, dtype in SIGNED_SUB_BYTE)
    return np.frombuffer(raw.tobytes(), DTYPES[dtype], count)
