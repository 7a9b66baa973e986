"""Elementwise, shape and indexing operations of an ML program: name -> numpy function with MIL's parameter names.

Floats arrive and leave as float32, integers as int32: rounding to float16 is the caller's. Constant scalars arrive as
Python numbers, other constants as arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[Any]
Ints = Sequence[int] | NDArray[np.int32]
Operation = Callable[..., Any]

# float32 and int32 stand for every width: an ML program never relies on overflow
CAST_DTYPES: dict[str, type[np.generic]] = {
    "fp16": np.float32, "fp32": np.float32, "bool": np.bool_, "int32": np.int32, "int16": np.int32, "int8": np.int32,
    "uint16": np.int32, "uint8": np.int32,
}  # fmt: skip


def integers(values: Ints) -> list[int]:
    """A shape, axis list or index vector as Python ints."""
    return [int(value) for value in np.asarray(values).reshape(-1)]


def unary(function: Operation) -> Operation:
    """A numpy function under MIL's parameter name."""
    return lambda x: function(x)


def binary(function: Operation) -> Operation:
    """A numpy function of two arrays under MIL's parameter names."""
    return lambda x, y: function(x, y)


def relu(x: Array) -> Array:
    return np.maximum(x, np.float32(0))


def real_div(x: Array, y: Array) -> Array:
    quotient = np.divide(x, y)
    return quotient if np.issubdtype(np.result_type(x, y), np.floating) else np.trunc(quotient).astype(np.int32)


def cast(x: Array, dtype: str) -> Array:
    return np.asarray(x).astype(CAST_DTYPES[dtype])


def clip(x: Array, alpha: float, beta: float) -> Array:
    return np.clip(x, alpha, beta)


def gelu(x: Array, mode: str = "EXACT") -> Array:
    if mode == "EXACT":
        return x * special.ndtr(x)
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)))
    return x * special.expit(np.float32(1.702) * x)


def silu(x: Array) -> Array:
    return x * special.expit(x)


def log(x: Array, epsilon: float = 1e-45) -> Array:
    return np.log(x + np.float32(epsilon))


def rsqrt(x: Array, epsilon: float = 1e-12) -> Array:
    return 1 / np.sqrt(x + np.float32(epsilon))


def inverse(x: Array, epsilon: float = 1e-4) -> Array:
    return 1 / (x + np.float32(epsilon))


def shape(x: Array) -> Array:
    return np.array(x.shape, np.int32)


def reshape(x: Array, shape: Ints) -> Array:
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(integers(shape))])


def expand_dims(x: Array, axes: Ints) -> Array:
    return np.expand_dims(x, tuple(integers(axes)))


def squeeze(x: Array, axes: Ints | None = None) -> Array:
    return np.squeeze(x, None if axes is None else tuple(integers(axes)))


def split(x: Array, axis: int, split_sizes: Ints | None = None, num_splits: int | None = None) -> tuple[Array, ...]:
    if split_sizes is None:
        return tuple(np.split(x, int(num_splits or 1), axis))
    return tuple(np.split(x, np.cumsum(integers(split_sizes))[:-1].tolist(), axis))


def concat(values: Sequence[Array], axis: int, interleave: bool = False) -> Array:
    if interleave:
        raise NotImplementedError("concat with interleave")
    return np.concatenate([np.atleast_1d(value) for value in values], axis)


def stack(values: Sequence[Array], axis: int) -> Array:
    return np.stack(values, axis)


def tile(x: Array, reps: Ints) -> Array:
    return np.tile(x, integers(reps))


def select(cond: Array, a: Array, b: Array) -> Array:
    return np.where(cond, a, b)


def fill(shape: Ints, value: Any) -> Array:
    return np.full(integers(shape), value, np.asarray(value).dtype)


def range_1d(start: Any, end: Any, step: Any) -> Array:
    return np.arange(start, end, step, np.result_type(np.asarray(start), np.asarray(step)))


def index_of(
    rank: int, begin: Ints, end: Ints, stride: Ints | None, begin_mask: Any, end_mask: Any, squeeze_mask: Any
) -> tuple[int | slice, ...]:
    """MIL's begin/end/stride and masks as a numpy index; a squeezed dimension takes ``begin`` alone."""
    first, last = integers(begin), integers(end)
    step = [1] * rank if stride is None else integers(stride)
    open_begin, open_end, squeezed = (
        [False] * rank if mask is None else np.asarray(mask).tolist() for mask in (begin_mask, end_mask, squeeze_mask)
    )
    return tuple(
        first[axis]
        if squeezed[axis]
        else slice(None if open_begin[axis] else first[axis], None if open_end[axis] else last[axis], step[axis])
        for axis in range(rank)
    )


def slice_by_index(
    x: Array, begin: Ints, end: Ints, stride: Ints | None = None,
    begin_mask: Any = None, end_mask: Any = None, squeeze_mask: Any = None,
) -> Array:  # fmt: skip
    return x[index_of(x.ndim, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


def slice_by_size(x: Array, begin: Ints, size: Ints) -> Array:
    bounds = zip(integers(begin), integers(size), strict=True)
    return x[tuple(slice(first, None if count == -1 else first + count) for first, count in bounds)]


def slice_update(
    x: Array, update: Array, begin: Ints, end: Ints, stride: Ints | None = None,
    begin_mask: Any = None, end_mask: Any = None, squeeze_mask: Any = None,
) -> Array:  # fmt: skip
    return slice_update_in_place(x.copy(), update, begin, end, stride, begin_mask, end_mask, squeeze_mask)


def slice_update_in_place(
    x: Array, update: Array, begin: Ints, end: Ints, stride: Ints | None = None,
    begin_mask: Any = None, end_mask: Any = None, squeeze_mask: Any = None,
) -> Array:  # fmt: skip
    """slice_update where nothing reads the old ``x`` any more: a KV cache of 400 MB is not copied at every layer."""
    x[index_of(x.ndim, begin, end, stride, begin_mask, end_mask, squeeze_mask)] = update
    return x


def gather(x: Array, indices: Array, axis: int, batch_dims: int = 0, validate_indices: bool = False) -> Array:
    if batch_dims:
        raise NotImplementedError("gather with batch_dims")
    return np.take(x, indices, axis)


def gather_along_axis(x: Array, indices: Array, axis: int, validate_indices: bool = False) -> Array:
    return np.take_along_axis(x, indices, axis)


def pad(x: Array, pad: Ints, mode: str = "constant", constant_val: float = 0.0) -> Array:
    amounts = integers(pad)
    pairs = [(0, 0)] * (x.ndim - len(amounts) // 2) + list(zip(amounts[::2], amounts[1::2], strict=True))
    if mode == "constant":
        return np.pad(x, pairs, constant_values=constant_val)
    return np.pad(x, pairs, mode="reflect" if mode == "reflect" else "edge")


def reducer(reduce: Operation) -> Operation:
    """A numpy reduction with MIL's ``axes`` and ``keep_dims``."""

    def operation(x: Array, axes: Ints | None = None, keep_dims: bool = False) -> Array:
        return reduce(x, axis=None if axes is None else tuple(integers(axes)), keepdims=keep_dims)

    return operation


def softmax(x: Array, axis: int = -1) -> Array:
    weights = np.exp(x - x.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def transpose(x: Array, perm: Ints) -> Array:
    return x.transpose(integers(perm))


# These only place values, so a float16 value needs no second rounding after them.
MOVES: dict[str, Operation] = {
    "identity": np.asarray, "shape": shape, "reshape": reshape, "transpose": transpose, "expand_dims": expand_dims,
    "squeeze": squeeze, "split": split, "concat": concat, "stack": stack, "tile": tile, "select": select,
    "slice_by_index": slice_by_index, "slice_by_size": slice_by_size, "slice_update": slice_update, "gather": gather,
    "gather_along_axis": gather_along_axis,
}  # fmt: skip

ARITHMETIC: dict[str, Operation] = {
    "add": binary(np.add), "sub": binary(np.subtract), "mul": binary(np.multiply), "real_div": real_div,
    "floor_div": binary(np.floor_divide), "mod": binary(np.mod), "pow": binary(np.power),
    "maximum": binary(np.maximum), "minimum": binary(np.minimum), "equal": binary(np.equal),
    "not_equal": binary(np.not_equal), "greater": binary(np.greater), "greater_equal": binary(np.greater_equal),
    "less": binary(np.less), "less_equal": binary(np.less_equal), "logical_and": binary(np.logical_and),
    "logical_or": binary(np.logical_or), "logical_not": unary(np.logical_not), "abs": unary(np.abs),
    "sign": unary(np.sign), "exp": unary(np.exp), "sqrt": unary(np.sqrt), "square": unary(np.square),
    "tanh": unary(np.tanh), "cos": unary(np.cos), "sin": unary(np.sin), "floor": unary(np.floor),
    "ceil": unary(np.ceil), "round": unary(np.round), "erf": unary(special.erf), "sigmoid": unary(special.expit),
    "relu": relu, "silu": silu, "gelu": gelu, "clip": clip, "cast": cast, "log": log, "rsqrt": rsqrt,
    "inverse": inverse, "softmax": softmax, "fill": fill, "range_1d": range_1d, "pad": pad,
    "reduce_mean": reducer(np.mean), "reduce_sum": reducer(np.sum), "reduce_max": reducer(np.max),
    "reduce_min": reducer(np.min),
}  # fmt: skip
