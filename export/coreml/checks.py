"""A written .mlpackage and what it should be -> nothing, or the first property that is wrong; needs no Mac."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.errors import VerificationError
from bundle.manifest import Engine, Graph, Tensor
from bundle.runtimes.mil_graph import KNOWN_OPERATIONS, block_of, description_of
from bundle.runtimes.mil_proto import read_spec, weight_path
from bundle.runtimes.mil_weights import FLOAT32
from export.coreml.ane_checks import check_engine_rules
from export.coreml.fill import MAIN
from export.coreml.parts import with_rows

SPECIFICATION_VERSION = 9  # iOS 18: states, per-block int4
# FeatureTypes.proto, ArrayFeatureType.ArrayDataType
ARRAY_DTYPES = {65568: "float32", 65552: "float16", 131104: "int32"}
BLOB_OVERHEAD_BYTES = 128  # metadata record and alignment of one constant in weight.bin
BLOBS_PER_WEIGHT = 3  # values, scales, a zero bias


@dataclass(frozen=True)
class Budget:
    """How large weight.bin may be.

    Attributes:
        bits: weight -> bits per stored value.
        sizes: weight -> number of values.
        spare_bytes: other constants that the program may hold (RoPE tables, scales, zero biases).
    """

    bits: Mapping[str, int]
    sizes: Mapping[str, int]
    spare_bytes: int


def check_package(
    package: Path, graph: Graph, functions: Mapping[str, int | None], longest: int, budget: Budget, engine: Engine
) -> None:
    """Compare a package with its row in the manifest, with the recipe and with the engine's rules.

    Args:
        functions: entry point -> rows that it takes at once; None: any number.
        longest: upper bound of every dynamic dimension.

    Raises:
        VerificationError: the first property that differs, with both values.
    """
    spec = read_spec(package)
    _expect(package, "specification version", spec.specificationVersion, SPECIFICATION_VERSION)
    _expect(package, "functions", sorted(spec.mlProgram.functions), sorted(functions))
    for function, rows in functions.items():
        described = description_of(spec, None if function == MAIN else function)
        wanted = with_rows(graph, rows)
        _check_features(package, "input", described.input, wanted.inputs, longest)
        _check_features(package, "output", described.output, wanted.outputs, longest)
        _check_states(package, described, graph)
        block = block_of(spec, function)
        unknown = sorted({operation.type for operation in block.operations} - KNOWN_OPERATIONS)
        _expect(package, "operations outside the tested ones", unknown, [])
        if all(tensor.dtype != "float32" for tensor in (*graph.inputs, *graph.outputs)):
            _expect(package, "float32 results in a float16 program", _float32_results(block), [])
        if engine == "ane":
            check_engine_rules(package, function, block, graph)
    _check_bytes(package, budget)


def _check_features(package: Path, kind: str, features: Any, wanted: tuple[Tensor, ...], longest: int) -> None:
    _expect(package, f"{kind} names", sorted(f.name for f in features), sorted(tensor.name for tensor in wanted))
    by_name = {feature.name: feature.type.multiArrayType for feature in features}
    for tensor in wanted:
        array = by_name[tensor.name]
        _expect(package, f"dtype of {kind} '{tensor.name}'", ARRAY_DTYPES.get(array.dataType), tensor.dtype)
        if kind == "input":
            _expect(package, f"sizes of input '{tensor.name}'", _bounds(array), _wanted_bounds(tensor, longest))


def _bounds(array: Any) -> list[tuple[int, int]]:
    if array.WhichOneof("ShapeFlexibility") == "shapeRange":
        return [(int(size.lowerBound), int(size.upperBound)) for size in array.shapeRange.sizeRanges]
    return [(int(size), int(size)) for size in array.shape]


def _wanted_bounds(tensor: Tensor, longest: int) -> list[tuple[int, int]]:
    return [(1, longest) if size is None else (size, size) for size in tensor.shape]


def _check_states(package: Path, described: Any, graph: Graph) -> None:
    found = {
        state.name: (
            ARRAY_DTYPES.get(state.type.stateType.arrayType.dataType),
            tuple(state.type.stateType.arrayType.shape),
        )
        for state in described.state
    }
    _expect(package, "states", found, {tensor.name: (tensor.dtype, tensor.shape) for tensor in graph.states})


def _float32_results(block: Any) -> list[str]:
    return [
        output.name
        for operation in block.operations
        for output in operation.outputs
        if operation.type != "const" and output.type.tensorType.dataType == FLOAT32
    ]


def _check_bytes(package: Path, budget: Budget) -> None:
    """A weight that was stored twice, or not quantized, shows in the size of the file."""
    found = weight_path(package).stat().st_size
    weights = sum(budget.sizes[name] * bits // 8 for name, bits in budget.bits.items())
    allowed = weights + budget.spare_bytes + BLOBS_PER_WEIGHT * BLOB_OVERHEAD_BYTES * len(budget.bits)
    if found > allowed:
        count = sum(budget.sizes.values())
        raise VerificationError(
            f"{package.name}: weight.bin has {found} bytes; its {count} weights take at most {allowed}"
        )


def _expect(package: Path, what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise VerificationError(f"{package.name}: {what}: {found}, expected {wanted}")
