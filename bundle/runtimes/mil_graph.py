"""An .mlpackage -> its graph with the constants evaluated: what is left is what must run on every call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bundle.errors import UsageError
from bundle.runtimes.mil_layers import CONSTEXPR, LAYERS
from bundle.runtimes.mil_ops import ARITHMETIC, MOVES, Array, Operation
from bundle.runtimes.mil_proto import read_spec, weight_path
from bundle.runtimes.mil_weights import FLOAT16, WeightFile, read_value, shape_of

READ_STATE, WRITE_STATE, UPDATE_STATE = "read_state", "write_state", "coreml_update_state"
STATE_OPERATIONS = (READ_STATE, WRITE_STATE, UPDATE_STATE)
OPERATIONS: dict[str, Operation] = {**MOVES, **ARITHMETIC, **LAYERS, **CONSTEXPR}
KNOWN_OPERATIONS = frozenset({"const", *STATE_OPERATIONS, *OPERATIONS})


@dataclass(frozen=True)
class Node:
    """One operation: parameter -> name of a value (or names, for a list), and the values it makes."""

    kind: str
    inputs: dict[str, str | tuple[str, ...]]
    outputs: tuple[str, ...]
    float16: bool  # its results are declared float16

    def reads(self) -> tuple[str, ...]:
        """The names of all values it reads."""
        return tuple(name for value in self.inputs.values() for name in ((value,) if isinstance(value, str) else value))


@dataclass(frozen=True)
class MilGraph:
    """One function of an ML program.

    Attributes:
        inputs: input name -> whether it is declared float16.
        states: state name -> shape.
        constants: value name -> array (floats as float32, integers as int32), Python scalar or string.
        nodes: the operations that depend on an input or a state, in order.
    """

    package: Path
    inputs: dict[str, bool]
    states: dict[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    constants: dict[str, Any]
    nodes: tuple[Node, ...]


def block_of(spec: Any, function: str = "main") -> Any:
    """The operations of one function for the opset that it was made for."""
    body = spec.mlProgram.functions[function]
    return body.block_specializations[body.opset]


def blocks_of(spec: Any) -> Iterator[Any]:
    """The operations of each function."""
    return (block_of(spec, function) for function in sorted(spec.mlProgram.functions))


def description_of(spec: Any, function: str | None) -> Any:
    """Inputs, outputs and states: of a package with one function (None) or of one of several."""
    if function is None:
        return spec.description
    return next(described for described in spec.description.functions if described.name == function)


# Decompressed weights by kind and place in weight.bin: functions of one package share them.
Shared = dict[tuple[Any, ...], Array]


def read_graph(package: Path, function: str | None = None, shared: Shared | None = None) -> MilGraph:
    """Open a package and evaluate every operation that depends on constants alone.

    Args:
        function: of several; None where there is one.
        shared: filled with large weights, and asked for them first.

    Raises:
        UsageError: a damaged package, an operation that the evaluator does not know, or no such function.
    """
    spec = read_spec(package)
    known = sorted(spec.mlProgram.functions)
    if (function or "main") not in known:
        raise UsageError(f"{package.name} has no function '{function or 'main'}', it has {', '.join(known)}")
    block, description = block_of(spec, function or "main"), description_of(spec, function)
    unknown = sorted({operation.type for operation in block.operations} - KNOWN_OPERATIONS)
    if unknown:
        raise UsageError(
            f"{package.name}: the evaluator does not know the ML program operation '{unknown[0]}'; run the package on "
            "macOS, where Core ML itself computes it"
        )
    weights = WeightFile(weight_path(package))
    constants: dict[str, Any] = {}
    nodes = []
    for operation in block.operations:
        node = _node(operation, constants, weights, {} if shared is None else shared)
        if node is not None and not _fold(node, constants):
            nodes.append(node)
    used = {name for node in nodes for name in node.reads()} | set(block.outputs)
    return MilGraph(
        package=package,
        inputs={item.name: item.type.multiArrayType.dataType == _ARRAY_FLOAT16 for item in description.input},
        states={state.name: tuple(state.type.stateType.arrayType.shape) for state in description.state},
        outputs=tuple(block.outputs),
        constants={name: value for name, value in constants.items() if name in used},
        nodes=tuple(nodes),
    )


_ARRAY_FLOAT16 = 65552  # FeatureTypes.proto, ArrayFeatureType.FLOAT16


def _node(operation: Any, constants: dict[str, Any], weights: WeightFile, shared: Shared) -> Node | None:
    """The operation with its immediate values put among the constants; None for a constant or compressed weight."""
    outputs = tuple(output.name for output in operation.outputs)
    if operation.type == "const" or operation.type in CONSTEXPR:
        place = _place(operation)
        value = shared.get(place) if place else None
        if value is None and operation.type == "const":
            value = run_value(read_value(operation.attributes["val"], weights))
        elif value is None:
            value = decompress(operation, weights, constants)
        if place:
            shared[place] = value
        constants[outputs[0]] = value
        return None
    inputs: dict[str, str | tuple[str, ...]] = {}
    for parameter, argument in operation.inputs.items():
        names = []
        for position, binding in enumerate(argument.arguments):
            if binding.WhichOneof("binding") == "name":
                names.append(binding.name)
            else:
                names.append(f"{(outputs or ('write',))[0]}/{parameter}/{position}")
                constants[names[-1]] = run_value(read_value(binding.value, weights))
        inputs[parameter] = tuple(names) if parameter == "values" else names[0]
    float16 = any(output.type.tensorType.dataType == FLOAT16 for output in operation.outputs)
    return Node(operation.type, inputs, outputs, float16)


def _place(operation: Any) -> tuple[Any, ...]:
    """Kind and offsets of a constant whose values all lie in weight.bin; empty for others."""
    values = [operation.attributes["val"]] if operation.type == "const" else []
    values += [argument.arguments[0].value for argument in operation.inputs.values()]
    if not values or any(value.WhichOneof("value") != "blobFileValue" for value in values):
        return ()
    sizes = shape_of(operation.outputs[0].type.tensorType)
    return operation.type, sizes, *(int(value.blobFileValue.offset) for value in values)


def decompress(operation: Any, weights: WeightFile, constants: dict[str, Any]) -> Array:
    """A compressed weight as float32, rounded to float16 where the program declares it so."""
    values = constexpr_inputs(operation, weights, constants)
    result = np.asarray(CONSTEXPR[operation.type](**values), np.float32)
    if operation.outputs[0].type.tensorType.dataType == FLOAT16:
        result = result.astype(np.float16).astype(np.float32)
    return result


def constexpr_inputs(operation: Any, weights: WeightFile, constants: dict[str, Any]) -> dict[str, Any]:
    """Parameter -> stored value of a constexpr operation: inputs since iOS 18, attributes before."""
    values = {name: read_value(value, weights) for name, value in operation.attributes.items() if name != "name"}
    for parameter, argument in operation.inputs.items():
        binding = argument.arguments[0]
        named = binding.WhichOneof("binding") == "name"
        values[parameter] = constants[binding.name] if named else read_value(binding.value, weights)
    return values


def run_value(value: Array | str | list[str]) -> Any:
    """A stored constant as the operations take it: float32, int32 or bool arrays, Python scalars."""
    if not isinstance(value, np.ndarray):
        return value
    if np.issubdtype(value.dtype, np.floating):
        value = value.astype(np.float32)
    elif value.dtype != np.bool_:
        value = value.astype(np.int32)
    return value if value.ndim else value.item()


def _fold(node: Node, constants: dict[str, Any]) -> bool:
    if node.kind in STATE_OPERATIONS or any(name not in constants for name in node.reads()):
        return False
    arguments = {
        parameter: constants[name] if isinstance(name, str) else [constants[item] for item in name]
        for parameter, name in node.inputs.items()
    }
    result = OPERATIONS[node.kind](**arguments)
    results = result if isinstance(result, tuple) else (result,)
    for name, value in zip(node.outputs, results, strict=True):
        constants[name] = run_value(np.asarray(value))
    return True
