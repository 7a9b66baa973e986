"""One function of a written ML program -> nothing, or the first rule of the Neural Engine that it breaks.

The rules are from public reports (docs/exports.md); whether a phone's compiler places every operation on the engine
cannot be seen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bundle.errors import VerificationError
from bundle.manifest import Graph
from bundle.runtimes.mil_weights import FLOAT32
from export.coreml.ane_modules import MOST_CHANNELS, UNIT

MOST_AXES = 5
# silu falls to the CPU, fused attention is not split into heads, a linear layer's weight has no channels-first layout
FORBIDDEN = frozenset({"silu", "scaled_dot_product_attention", "linear", "batch_norm"})
ATTENTION = frozenset({"matmul", "softmax"})
STATE_AXES = 2  # rows and width; the others only count layers and heads


def check_engine_rules(package: Path, function: str, block: Any, graph: Graph) -> None:
    """Look at every value of a function.

    Raises:
        VerificationError: a dynamic size, more than 5 axes, a float32 value, an operation that the engine does not
            have, an attention whose last axis or a state whose size is no multiple of 32, too many channels.
    """
    for state in graph.states:
        odd = [size for size in state.shape[-STATE_AXES:] if size is None or size % UNIT]
        if odd:
            raise _broken(package, function, f"state '{state.name}' has size {odd[0]}, no multiple of {UNIT}")
    for operation in block.operations:
        if operation.type in FORBIDDEN:
            raise _broken(package, function, f"operation '{operation.type}' is not the engine's")
        for name, tensor in _values(operation):
            shape = [_size(dimension) for dimension in tensor.dimensions]
            problem = _problem(operation.type, tensor, shape)
            if problem:
                raise _broken(package, function, f"value '{name}' {problem}")


def _values(operation: Any) -> Iterator[tuple[str, Any]]:
    for output in operation.outputs:
        if output.type.WhichOneof("type") == "tensorType":
            yield output.name, output.type.tensorType


def _size(dimension: Any) -> int | None:
    return int(dimension.constant.size) if dimension.WhichOneof("dimension") == "constant" else None


def _problem(kind: str, tensor: Any, shape: list[int | None]) -> str | None:
    if None in shape:
        return f"has a dynamic size: {shape}"
    if len(shape) > MOST_AXES and not kind.startswith("constexpr"):
        return f"has {len(shape)} axes, more than {MOST_AXES}"
    if tensor.dataType == FLOAT32:
        return "is float32"
    last = shape[-1] if shape else None
    if kind in ATTENTION and last is not None and last % UNIT:
        return f"of an attention has a last axis of {last}, no multiple of {UNIT}"
    channels = shape[1] if kind == "conv" else None
    if channels is not None and channels > MOST_CHANNELS:
        return f"has {channels} channels, more than {MOST_CHANNELS}"
    return None


def _broken(package: Path, function: str, what: str) -> VerificationError:
    return VerificationError(f"{package.name}: function '{function}' breaks a rule of the Neural Engine: {what}")
