"""x [1, T, K] and int8 matrices -> x times their transposes, activations rounded to 8 bits with one scale per token.

For graphs of many rows. Measured on a [577, 1024] x [4096, 1024] product, one AVX-512 thread, against MatMulNBits at
8 bits: 2.0 times as fast at error 1.1e-2 against 0.9e-2. At one row, as in decoding, it is 4 times slower.
"""

from __future__ import annotations

import numpy as np

from export.onnx.linear import ModelWriter
from export.onnx.stored import StoredChannels
from export.onnx.writer import MICROSOFT
from export.weights.blocks import Floats

# onnxruntime's fast kernels take unsigned activations and signed weights; signed by signed is 14 times slower on x86.
ZERO_POINT = 128
LEVELS = 127
TINY = 1e-30  # scale of a row of zeros


def token_linear(
    writer: ModelWriter, x: str, names: list[str], bias: str | None = None, output: str | None = None
) -> str:
    """``ModelWriter.linear`` for many rows: matrices at 8 bits go to integer kernels, rounded per token."""
    if writer.storage(names[0]).bits != 8:
        return writer.linear(x, names, output, bias)
    matrix, channel_scales = _channel_matrix(writer, names)
    token_scales = _token_scales(writer, x)  # [1, T, 1]
    zero, one = (
        _constant(writer, "token_zero_point", np.uint8(ZERO_POINT)),
        _constant(writer, "token_unit", np.float32(1)),
    )
    # a scale per row inside the operator: dividing before it would write all of x once more
    row_scales = writer.op("Reshape", [token_scales, _constant(writer, "token_flat", np.array([-1]))])  # [T]
    one_zero = _constant(writer, "token_zero_points", np.array([ZERO_POINT], np.uint8))
    zeros = writer.op("Expand", [one_zero, writer.op("Shape", [row_scales])])  # [T]
    levels = writer.op("QuantizeLinear", [x, row_scales, zeros], axis=1)  # [1, T, K]
    product = writer.op("MatMulIntegerToFloat", [levels, matrix, one, channel_scales, zero], None, MICROSOFT)
    scaled = writer.op("Mul", [product, token_scales], output if bias is None else None)  # [1, T, N]
    return scaled if bias is None else writer.op("Add", [scaled, bias], output)


def _token_scales(writer: ModelWriter, x: str) -> str:
    """Largest magnitude of each row over the levels; of two reductions, for an Abs writes all of x once more."""
    axis = _constant(writer, "token_last_axis", np.array([-1], np.int64))
    top, bottom = (writer.op(reduction, [x, axis], keepdims=1) for reduction in ("ReduceMax", "ReduceMin"))
    largest = writer.op("Max", [top, writer.op("Neg", [bottom])])  # [1, T, 1]
    scales = writer.op("Mul", [largest, _constant(writer, "token_per_level", np.float32(1 / LEVELS))])
    return writer.op("Max", [scales, _constant(writer, "token_tiny", np.float32(TINY))])


def _constant(writer: ModelWriter, name: str, value: np.generic | np.ndarray) -> str:
    return name if writer.has(name) else writer.constant(name, np.asarray(value))


def _channel_matrix(writer: ModelWriter, names: list[str]) -> tuple[str, str]:
    """Add the matrices as int8 [K, sum of N] with one scale per channel -> names of the matrix and its scales."""
    weights = [writer.weight(name) for name in names]
    scales = [(np.abs(weight).max(1) / LEVELS).astype(np.float32) for weight in weights]
    levels = [_round(weight, scale) for weight, scale in zip(weights, scales, strict=True)]
    matrix = np.ascontiguousarray(np.concatenate(levels).T)  # [K, N]
    data_at = writer.stream(f"{names[0]}_int8", matrix.dtype, matrix.shape, [matrix])
    scales_at = writer.stream(f"{names[0]}_scales", np.dtype(np.float32), [matrix.shape[1]], scales)
    first = 0
    for name, scale in zip(names, scales, strict=True):
        writer.stored[name] = StoredChannels(
            file=writer.data_path.name,
            data_at=data_at,
            scales_at=scales_at,
            shape=matrix.shape,
            first=first,
            rows=len(scale),
        )
        first += len(scale)
    return f"{names[0]}_int8", f"{names[0]}_scales"


def _round(weight: Floats, scale: Floats) -> np.ndarray:
    quotient = np.divide(weight, scale[:, None], out=np.zeros_like(weight), where=scale[:, None] != 0)
    return np.rint(quotient).astype(np.int8)
