"""Written .mlpackages -> the weights that they really hold, each held against the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bundle.errors import VerificationError
from bundle.runtimes.mil_graph import blocks_of, constexpr_inputs, decompress
from bundle.runtimes.mil_layers import CONSTEXPR, spread
from bundle.runtimes.mil_proto import read_spec, weight_path
from bundle.runtimes.mil_weights import DTYPES, SUB_BYTE_BITS, WeightFile, read_value
from export.coreml.convert import flat_name, plain_name
from export.coreml.layout import Layout
from export.weights.lazy import LazyWeights
from export.weights.palette import to_nearest
from export.weights.recipe import Storage

FLOAT16_STEP = 2.0**-11  # relative rounding error of float16
SMALLEST_FLOAT16 = 2.0**-24
# A quotient near .5 may round either way, because the scale is rounded to float16 behind the division.
STEP_SHARE = 0.55


@dataclass(frozen=True)
class StoredWeight:
    """One constant of a program.

    Attributes:
        values: float32, as the program computes with it.
        reach: the quantization step of each value; 0 where it is stored as a float or by a table.
        bits: per stored value, scales and tables not counted.
    """

    values: NDArray[np.float32]
    reach: NDArray[np.float32]
    bits: int


class Package:
    """The constants of one .mlpackage by the converter's name without its suffixes, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._weights = WeightFile(weight_path(path))
        self._operations: dict[str, Any] = {}
        for block in blocks_of(read_spec(path)):
            for operation in block.operations:
                if operation.type in CONSTEXPR or (operation.type == "const" and _is_float_array(operation)):
                    self._operations.setdefault(plain_name(operation.outputs[0].name), operation)

    def __contains__(self, name: str) -> bool:
        return name in self._operations

    def __getitem__(self, name: str) -> StoredWeight:
        operation = self._operations[name]
        if operation.type == "const":
            values = read_value(operation.attributes["val"], self._weights)
            assert isinstance(values, np.ndarray)
            return StoredWeight(values.astype(np.float32), np.zeros(1, np.float32), values.dtype.itemsize * 8)
        inputs = constexpr_inputs(operation, self._weights, {})
        stored = "indices" if "lut" in inputs else "data"
        dtype = int(operation.inputs[stored].arguments[0].value.type.tensorType.dataType)
        bits = SUB_BYTE_BITS.get(dtype) or np.dtype(DTYPES[dtype]).itemsize * 8
        values = decompress(operation, self._weights, {})
        if stored == "indices":
            return StoredWeight(values, np.zeros(1, np.float32), bits)
        return StoredWeight(values, spread(inputs["scale"].astype(np.float32), values.shape), bits)

    def __iter__(self) -> Iterator[str]:
        return iter(self._operations)

    def table_of(self, name: str) -> NDArray[np.float32] | None:
        """Rising entries [tables, entries] of a palettized weight; table i is of the i-th equal share of the rows."""
        operation = self._operations[name]
        if operation.type != "constexpr_lut_to_dense":
            return None
        tables = constexpr_inputs(operation, self._weights, {})["lut"].astype(np.float32)
        return np.sort(tables.reshape(-1, tables.shape[-2]), -1)


@dataclass(frozen=True)
class Held:
    """Which constant of which package holds a parameter."""

    package: Package
    constant: str
    layout: Layout


class PackageWeights(LazyWeights):
    """State-dict name -> the weight as the packages hold it, decompressed when it is asked for."""

    def __init__(self, held: Mapping[str, tuple[Held, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._held, self._shapes = dict(held), shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = [
            entry.layout.restored(torch.from_numpy(entry.package[entry.constant].values), self._shapes[name])
            for entry in self._held[name]
        ]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)

    def read_into(self, name: str, out: torch.Tensor) -> None:
        out.copy_(self[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def check_weights(
    path: Path, layouts: Mapping[str, Layout], storages: Mapping[str, Storage], weights: Mapping[str, torch.Tensor]
) -> dict[str, tuple[Held, ...]]:
    """Compare every value in a package with its original; one weight at a time is in memory.

    The bound is half the step of the value's own scale, or the nearest entry of its own table, so a constant that was
    given to the wrong layer, transposed or reordered cannot pass.

    Args:
        layouts: parameter of the converted module -> the weight that it is made of.
        storages: by parameter.
        weights: state-dict name -> the checkpoint's weight.

    Returns:
        State-dict name -> where it is held, but for weights whose values are the same in any storage.

    Raises:
        VerificationError: a weight is missing, is stored with other than its bits, has another size, or is further away
            than its storage allows.
    """
    package = Package(path)
    held: dict[str, list[Held]] = {}
    for parameter, layout in layouts.items():
        wanted = layout.stored(weights[layout.name]).float()
        constant = flat_name(parameter)
        if constant not in package:
            twin = _twin(package, wanted, layouts, weights)
            if twin is None and _neutral(wanted):
                continue
            if twin is None:
                raise VerificationError(
                    f"{path.name}: the converted program holds no constant for weight '{parameter}'"
                )
            constant = twin
        bits, found = storages[parameter].bits, package[constant]
        if found.bits != bits:
            raise VerificationError(
                f"{path.name}: weight '{parameter}' is stored in {found.bits} bits, asked for {bits}"
            )
        _compare(path, parameter, wanted.numpy(), found, package.table_of(constant))
        if bits < 32:
            held.setdefault(layout.name, []).append(Held(package, constant, layout))
    return {name: tuple(entries) for name, entries in held.items()}


def _twin(
    package: Package, wanted: torch.Tensor, layouts: Mapping[str, Layout], weights: Mapping[str, torch.Tensor]
) -> str | None:
    """coremltools stores equal constants once: another weight with the same float values."""
    for parameter, layout in layouts.items():
        if flat_name(parameter) in package and len(weights[layout.name]) == len(wanted):
            other = layout.stored(weights[layout.name]).float()
            if other.shape == wanted.shape and torch.equal(other, wanted):
                return flat_name(parameter)
    return None


def _neutral(wanted: torch.Tensor) -> bool:
    """coremltools drops a product with ones and a sum with zeros, such as a norm that was never trained."""
    return bool((wanted == 1).all() or (wanted == 0).all())


def _compare(
    path: Path, name: str, wanted: NDArray[np.float32], found: StoredWeight, tables: NDArray[np.float32] | None
) -> None:
    if found.values.size != wanted.size:
        raise VerificationError(
            f"{path.name}: weight '{name}' has shape {list(found.values.shape)}, not {list(wanted.shape)}"
        )
    original = wanted.reshape(found.values.shape)
    allowed = STEP_SHARE * found.reach if tables is None else _to_nearest(original, tables)
    if found.bits < 32:
        allowed = allowed + 4 * FLOAT16_STEP * np.abs(original) + SMALLEST_FLOAT16
    distance = np.abs(found.values - original)
    if not bool((distance <= allowed).all()):
        raise VerificationError(
            f"{path.name}: weight '{name}' is up to {float(np.nanmax(distance)):.2e} from the checkpoint's, more "
            f"than its {found.bits}-bit {'steps' if tables is None else 'table'} allows"
        )


def _to_nearest(original: NDArray[np.float32], tables: NDArray[np.float32]) -> NDArray[np.float32]:
    """``to_nearest`` with a table for each equal share of the rows."""
    shares = original.reshape(len(tables), -1)
    allowed = [to_nearest(values, table) for values, table in zip(shares, tables, strict=True)]
    return np.stack(allowed).reshape(original.shape)


def _is_float_array(operation: Any) -> bool:
    """A constant of floats with a shape: a weight, or a table."""
    tensor = operation.attributes["val"].type.tensorType
    return tensor.rank > 0 and np.issubdtype(DTYPES.get(int(tensor.dataType), np.bool_), np.floating)
