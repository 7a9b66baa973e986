"""Weight matrix [N, K] <-> blocks of MatMulNBits and GatherBlockQuantized: 4 or 8 bits, symmetric, scale per block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Widest block for weights with one scale per channel. Measured on a [577, 1024] x [4096, 1024] product, one AVX-512
# thread: 8 bits in blocks of 128 take 25 ms, of 32 take 42 ms, float32 57 ms; error 9.1e-3 against 7.6e-3.
CHANNEL_BLOCK = 128
SMALLEST_BLOCK = 16
CHUNK_VALUES = 1 << 18  # packed or unpacked at once: temporaries of 1 MB stay in the cache, half the time of 16 MB ones
# Scales tried for a group, as parts of the one that its extreme asks for. Normal weights at 4 bits in groups of 32:
# relative error 8.6e-2 with the extreme's own scale, 8.2e-2 with the best of these after a least-squares fit, 8.1e-2
# with the best of 21.
TRIED = (1.0, 1.1, 0.9)
# Byte -> the two levels of its nibbles, read as one 8-byte number so that one look-up gives both.
NIBBLE_PAIRS = np.array([[(byte & 15) - 8, (byte >> 4) - 8] for byte in range(256)], np.float32).view(np.float64)[:, 0]


@dataclass(frozen=True)
class Packed:
    """A quantized matrix.

    Attributes:
        data: [N, blocks, block_size * bits / 8]; 4-bit values lie low nibble first; the zero point is half the range.
        scales: [N, blocks].
        columns: K; the last block may be padded beyond it.
    """

    data: Bytes
    scales: Floats
    bits: int
    block_size: int
    columns: int


def block_size_of(group_size: int | None, columns: int) -> int:
    """Block size for a group size; one scale per channel becomes the widest sensible power of two."""
    if group_size is not None:
        return group_size
    block = SMALLEST_BLOCK
    while block < min(columns, CHANNEL_BLOCK):
        block *= 2
    return block


def pack(weight: Floats, bits: int, block_size: int, chosen: Floats | None = None) -> Packed:
    """Quantize [N, K] block by block, symmetric.

    Args:
        chosen: scales [N, blocks] to round to nearest with; None: the ones that fit best.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    padded = np.pad(weight, ((0, 0), (0, blocks * block_size - columns)))
    groups = padded.reshape(rows, blocks, block_size)  # [N, blocks, block]
    half = 1 << (bits - 1)
    scales = _scales(groups, half) if chosen is None else chosen[..., None]  # [N, blocks, 1]
    levels = (_levels(groups, scales, half) + half).astype(np.uint8)  # [N, blocks, block]
    data: Bytes = levels if bits == 8 else (levels[..., 0::2] | (levels[..., 1::2] << 4)).astype(np.uint8)
    return Packed(data, scales[..., 0], bits, block_size, columns)


def unpack(packed: Packed) -> Floats:
    """What the runtime multiplies with, [N, K]."""
    if packed.bits == 8:
        levels = packed.data.astype(np.float32) - 128
    else:
        levels = NIBBLE_PAIRS[packed.data].view(np.float32)
    weight = levels.reshape(*packed.scales.shape, packed.block_size)
    weight *= packed.scales[..., None]
    return np.ascontiguousarray(weight.reshape(packed.scales.shape[0], -1)[:, : packed.columns])


def _levels(groups: Floats, scales: Floats, half: int) -> Floats:
    quotient = np.divide(groups, scales, out=np.zeros_like(groups), where=scales != 0)
    return np.clip(np.rint(quotient), -half, half - 1)


def _scales(groups: Floats, half: int) -> Floats:
    """One scale a group [N, blocks, 1]; at 4 bits the one of least squared error among a few."""
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)  # [N, blocks, 1]
    # the extreme takes the level -half, the one more level that two's complement has on the negative side
    widest: Floats = (extreme / np.float32(-half)).astype(np.float32)
    if half > 8:
        return widest  # at 8 bits another scale gains nothing
    best, least = widest, np.full(widest.shape, np.inf, np.float32)
    for part in TRIED:
        levels = _levels(groups, widest * np.float32(part), half)
        square = np.square(levels).sum(-1, keepdims=True)
        fitted = np.divide(
            (groups * levels).sum(-1, keepdims=True), square, out=np.zeros_like(widest), where=square > 0
        )
        error = np.square(_levels(groups, fitted, half) * fitted - groups).sum(-1, keepdims=True)
        best = np.where(error < least, fitted, best)
        least = np.minimum(error, least)
    return best
