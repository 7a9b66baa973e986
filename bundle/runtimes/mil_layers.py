"""Layers and weight decompression of an ML program: name -> numpy function with MIL's parameter names."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.runtimes.mil_ops import Array, Ints, Operation, integers, softmax
from bundle.runtimes.mil_weights import unpack_bits

Windows = NDArray[np.float32]


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    out = x @ weight.T
    return out if bias is None else out + bias


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    return (np.swapaxes(x, -1, -2) if transpose_x else x) @ (np.swapaxes(y, -1, -2) if transpose_y else y)


def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    scores = (query @ np.swapaxes(key, -1, -2)) * np.float32(query.shape[-1] ** -0.5)  # [..., L, S]
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == np.bool_ else scores + attn_mask
    return softmax(scores) @ value


def layer_norm(
    x: Array, axes: Ints, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5
) -> Array:
    over = tuple(integers(axes))
    centred = x - x.mean(over, keepdims=True)
    out = centred / np.sqrt((centred * centred).mean(over, keepdims=True) + np.float32(epsilon))
    out = out if gamma is None else out * gamma
    return out if beta is None else out + beta


def conv(
    x: Array, weight: Array, bias: Array | None = None, strides: Ints | None = None, pad_type: str = "valid",
    pad: Ints | None = None, dilations: Ints | None = None, groups: int = 1,
) -> Array:  # fmt: skip
    """2-D convolution: x [n, C, H, W], weight [K, C/groups, kh, kw] -> [n, K, H', W']."""
    padded = np.pad(x, _spatial_pad(pad_type, pad))
    views = windows(padded, weight.shape[2:], strides, dilations)  # [n, C, H', W', kh, kw]
    n, channels, height, width, kh, kw = views.shape
    per_group, filters = channels // groups, weight.shape[0] // groups
    if per_group == 1 and filters == 1:  # depthwise
        out = np.einsum("nchwij,cij->nchw", views, weight[:, 0])
    else:
        rows = views.reshape(n, groups, per_group, height, width, kh, kw).transpose(0, 1, 3, 4, 2, 5, 6)
        flat = rows.reshape(n, groups, height * width, per_group * kh * kw)
        kernel = weight.reshape(groups, filters, per_group * kh * kw)
        out = np.swapaxes(flat @ np.swapaxes(kernel, -1, -2), -1, -2).reshape(n, groups * filters, height, width)
    return out if bias is None else out + bias.reshape(1, -1, 1, 1)


def avg_pool(
    x: Array, kernel_sizes: Ints, strides: Ints | None = None, pad_type: str = "valid", pad: Ints | None = None,
    exclude_padding_from_average: bool = False, ceil_mode: bool = False,
) -> Array:  # fmt: skip
    """2-D average pooling of x [n, C, H, W]."""
    amounts = _spatial_pad(pad_type, pad)
    if ceil_mode or (exclude_padding_from_average and any(max(pair) for pair in amounts)):
        raise NotImplementedError("avg_pool with ceil_mode, or with padding left out of the average")
    return windows(np.pad(x, amounts), tuple(integers(kernel_sizes)), strides, None).mean((-2, -1))


def windows(x: Array, kernel: tuple[int, ...], strides: Ints | None, dilations: Ints | None) -> Windows:
    """Views [n, C, H', W', kh, kw] of every kernel position in x [n, C, H, W]."""
    step_h, step_w = (1, 1) if strides is None else integers(strides)
    gap_h, gap_w = (1, 1) if dilations is None else integers(dilations)
    reach = ((kernel[0] - 1) * gap_h + 1, (kernel[1] - 1) * gap_w + 1)
    views: Windows = np.lib.stride_tricks.sliding_window_view(x, reach, axis=(2, 3))  # type: ignore[call-overload]
    return views[:, :, ::step_h, ::step_w, ::gap_h, ::gap_w]


def _spatial_pad(pad_type: str, pad: Ints | None) -> list[tuple[int, int]]:
    if pad_type == "valid" or (pad_type == "custom" and pad is None):
        return [(0, 0)] * 4
    if pad_type == "custom" and pad is not None:
        top, bottom, left, right = integers(pad)
        return [(0, 0), (0, 0), (top, bottom), (left, right)]
    raise NotImplementedError(f"pad_type '{pad_type}'")


def spread(parameter: Array, shape: tuple[int, ...]) -> Array:
    """Repeat each value of ``parameter`` over the block of ``shape`` that it stands for."""
    for axis, size in enumerate(shape):
        if parameter.shape[axis] != 1:  # 1 broadcasts by itself
            parameter = np.repeat(parameter, size // parameter.shape[axis], axis)
    return parameter


def constexpr_blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """(data - offset) * scale, with one scale and offset per block; as float32."""
    sizes = [(blocks, size // blocks) for blocks, size in zip(scale.shape, data.shape, strict=True)]
    values = data.astype(np.float32).reshape([size for pair in sizes for size in pair])  # blocks, block, blocks, ..
    of_block = [size for blocks in scale.shape for size in (blocks, 1)]
    if offset is not None:
        values -= offset.astype(np.float32).reshape(of_block)
    values *= scale.astype(np.float32).reshape(of_block)
    return values.reshape(data.shape)


def constexpr_affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Any) -> Array:
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1

    def along(parameter: Array) -> Array:
        values = np.asarray(parameter).astype(np.float32)
        return values.reshape(shape) if values.ndim else values

    return along(scale) * (quantized_data.astype(np.float32) - along(zero_point))


def constexpr_lut_to_dense(
    indices: Array, lut: Array, shape: Ints | None = None, vector_axis: int | None = None
) -> Array:
    """Palettised weights: iOS 18 tables per block (lut of rank K+2), or one iOS 16 table with packed indices."""
    if shape is not None:
        size = integers(shape)
        bits = int(lut.size).bit_length() - 1
        return lut.astype(np.float32)[unpack_bits(indices, int(np.prod(size)), bits, signed=False)].reshape(size)
    if lut.shape[-1] != 1:
        raise NotImplementedError(f"constexpr_lut_to_dense with vectors of {lut.shape[-1]} on axis {vector_axis}")
    tables = lut.shape[:-2]
    table = spread(np.arange(int(np.prod(tables))).reshape(tables), indices.shape)  # which table each value reads
    return lut.astype(np.float32).reshape(-1, lut.shape[-2])[table, indices]


LAYERS: dict[str, Operation] = {
    "linear": linear, "matmul": matmul, "scaled_dot_product_attention": scaled_dot_product_attention,
    "layer_norm": layer_norm, "conv": conv, "avg_pool": avg_pool,
}  # fmt: skip

# Weights: stored compressed, evaluated once when the program is opened.
CONSTEXPR: dict[str, Operation] = {
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
    "constexpr_affine_dequantize": constexpr_affine_dequantize,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
}
