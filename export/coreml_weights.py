"""A written .mlpackage and the float weights it was made of -> the weights it really holds, checked one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bundle.errors import VerificationError
from bundle.runtimes.mil_graph import block_of, constexpr_inputs, decompress
from bundle.runtimes.mil_layers import CONSTEXPR, spread
from bundle.runtimes.mil_proto import read_spec, weight_path
from bundle.runtimes.mil_weights import DTYPES, SUB_BYTE_BITS, WeightFile, read_value

FLOAT16_STEP = 2.0**-11  # relative rounding error of float16
SMALLEST_FLOAT16 = 2.0**-24
# coremltools divides by the scale in float16, so a quotient near .5 may round either way: 0.53 steps seen for int8
STEP_SHARE = 0.55
CONVERTER_SUFFIXES = ("_quantized", "_to_fp16")


@dataclass(frozen=True)
class StoredWeight:
    """One constant of a program.

    Attributes:
        values: float32, as the program computes with it.
        step: the quantization step of each value; 0 where it is stored as a float.
        bits: per stored value, scales not counted.
    """

    values: NDArray[np.float32]
    step: NDArray[np.float32]
    bits: int


def flat_name(state_name: str) -> str:
    """The converter's spelling of a state-dict name."""
    return state_name.replace(".", "_")


def stored_weights(package: Path) -> dict[str, StoredWeight]:
    """Every float constant with a shape, by the converter's name without its suffixes."""
    weights = WeightFile(weight_path(package))
    found: dict[str, StoredWeight] = {}
    constants: dict[str, Any] = {}
    for operation in block_of(read_spec(package)).operations:
        name = operation.outputs[0].name if operation.outputs else ""
        if operation.type == "const":
            values = read_value(operation.attributes["val"], weights)
            if not isinstance(values, np.ndarray):
                continue
            constants[name] = values
            if values.ndim and np.issubdtype(values.dtype, np.floating):
                bits = values.dtype.itemsize * 8
                found[_plain(name)] = StoredWeight(values.astype(np.float32), np.zeros(1, np.float32), bits)
        elif operation.type in CONSTEXPR:
            found[_plain(name)] = _compressed(operation, weights, constants)
    return found


def _compressed(operation: Any, weights: WeightFile, constants: dict[str, Any]) -> StoredWeight:
    values = decompress(operation, weights, constants)
    scale = constexpr_inputs(operation, weights, constants)["scale"].astype(np.float32)
    argument = operation.inputs["data"].arguments[0]
    dtype = int(argument.value.type.tensorType.dataType)
    bits = SUB_BYTE_BITS.get(dtype) or np.dtype(DTYPES[dtype]).itemsize * 8
    return StoredWeight(values, spread(scale, values.shape), bits)


def _plain(name: str) -> str:
    for suffix in CONVERTER_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def read_back(package: Path, weights: Mapping[str, torch.Tensor], bits: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The package's own values of ``weights`` (state-dict name -> float tensor).

    Every value is compared with its float original: the bound is half the step of its own scale, so a constant that
    was given to the wrong layer, transposed or reordered cannot pass.

    Raises:
        VerificationError: a weight is missing, is stored with other than its ``bits``, has another size, or is further
            away than its step allows.
    """
    stored = stored_weights(package)
    by_name = {name: stored[flat_name(name)] for name in weights if flat_name(name) in stored}
    values: dict[str, torch.Tensor] = {}
    for name, wanted in weights.items():
        weight = by_name.get(name) or _twin(wanted, weights, by_name)
        if weight is None and _neutral(wanted):
            values[name] = wanted.clone()
            continue
        if weight is None:
            raise VerificationError(f"{package.name}: the converted program holds no constant for weight '{name}'")
        if weight.bits != bits[name]:
            raise VerificationError(
                f"{package.name}: weight '{name}' is stored in {weight.bits} bits, asked for {bits[name]}"
            )
        _compare(package, name, wanted.detach().numpy(), weight)
        values[name] = torch.from_numpy(weight.values.reshape(wanted.shape).copy())
    return values


def _twin(
    wanted: torch.Tensor, weights: Mapping[str, torch.Tensor], by_name: Mapping[str, StoredWeight]
) -> StoredWeight | None:
    """coremltools stores equal constants once: another weight with the same float values."""
    same = (name for name in by_name if weights[name].shape == wanted.shape and torch.equal(weights[name], wanted))
    return next((by_name[name] for name in same), None)


def _neutral(wanted: torch.Tensor) -> bool:
    """coremltools drops a product with ones and a sum with zeros, such as a norm that was never trained."""
    return bool((wanted == 1).all() or (wanted == 0).all())


def _compare(package: Path, name: str, wanted: NDArray[np.float32], weight: StoredWeight) -> None:
    if weight.values.size != wanted.size:
        raise VerificationError(
            f"{package.name}: weight '{name}' has shape {list(weight.values.shape)}, not {list(wanted.shape)}"
        )
    original = wanted.reshape(weight.values.shape)
    allowed = STEP_SHARE * weight.step
    if weight.bits < 32:
        allowed = allowed + 4 * FLOAT16_STEP * np.abs(original) + SMALLEST_FLOAT16
    distance = np.abs(weight.values - original)
    if not bool((distance <= allowed).all()):
        raise VerificationError(
            f"{package.name}: weight '{name}' is up to {float(np.nanmax(distance)):.2e} from the checkpoint's, more "
            f"than its {weight.bits}-bit steps allow"
        )
