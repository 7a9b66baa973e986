"""The graph of an .mlpackage -> a callable: arrays in, arrays out, states changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bundle.errors import UsageError
from bundle.runtimes.mil_graph import (
    OPERATIONS,
    STATE_OPERATIONS,
    UPDATE_STATE,
    WRITE_STATE,
    MilGraph,
    Node,
    Shared,
    read_graph,
)
from bundle.runtimes.mil_ops import MOVES, Array, Operation, slice_update_in_place
from bundle.runtimes.mil_states import in_place_updates

Rounding = Literal["float32", "float16"]


@dataclass(frozen=True)
class Step:
    """One operation at run time, as positions in the environment, the list of all values."""

    call: Operation
    singles: tuple[tuple[str, int], ...]  # parameter, position
    lists: tuple[tuple[str, tuple[int, ...]], ...]
    outputs: tuple[int, ...]
    rounds: bool
    spent: tuple[int, ...]  # values that no later step reads


class Program:
    """One function of an ML program, evaluated by numpy.

    Args:
        package: an .mlpackage folder.
        rounding: "float32" computes as if every float were float32, so that only errors of the graph remain; "float16"
            rounds the result of each operation that the program declares float16, as a phone's GPU would.
        function: of a package with several.
        shared: as for ``read_graph``.

    Raises:
        UsageError: a damaged package, an operation that the evaluator does not know, or no such function.
    """

    def __init__(
        self,
        package: Path,
        rounding: Rounding = "float32",
        function: str | None = None,
        shared: Shared | None = None,
    ) -> None:
        graph = read_graph(package, function, shared)
        self.name = package.name
        self.state_shapes = graph.states
        self._rounds = rounding == "float16"
        self._positions: dict[str, int] = {}
        for name in (*graph.inputs, *graph.states, *graph.constants):
            self._position(name)
        self._declared_float16 = graph.inputs
        self._outputs = graph.outputs
        self._steps = self._compile(graph)
        self._environment: list[Any] = [None] * len(self._positions)
        for name, value in graph.constants.items():
            self._environment[self._positions[name]] = value

    def make_states(self) -> dict[str, Array]:
        """Empty states, e.g. a KV cache."""
        return {name: np.zeros(shape, np.float32) for name, shape in self.state_shapes.items()}

    def __call__(self, inputs: Mapping[str, Array], states: dict[str, Array] | None = None) -> dict[str, Array]:
        """Run once on every input by name; the dict ``states`` gets the new states.

        Raises:
            UsageError: a variant of an operation that the evaluator does not compute.
        """
        environment = self._environment.copy()
        for name, declared_float16 in self._declared_float16.items():
            environment[self._positions[name]] = self._enter(np.asarray(inputs[name]), declared_float16)
        for name in self.state_shapes:
            environment[self._positions[name]] = (states or {})[name]
        with np.errstate(over="ignore"):  # float16 overflows to infinity, as on the device
            self._run(environment)
        for name in self.state_shapes:
            (states or {})[name] = environment[self._positions[name]]
        return {name: environment[self._positions[name]] for name in self._outputs}

    def _run(self, environment: list[Any]) -> None:
        for step in self._steps:
            arguments = {parameter: environment[position] for parameter, position in step.singles}
            for parameter, positions in step.lists:
                arguments[parameter] = [environment[position] for position in positions]
            try:
                result = step.call(**arguments)
            except NotImplementedError as error:
                raise UsageError(
                    f"{self.name}: the evaluator does not compute {error}; run the package on macOS"
                ) from error
            results = result if isinstance(result, tuple) else (result,)
            for position, value in zip(step.outputs, results, strict=True):
                environment[position] = _to_float16(value) if step.rounds else value
            for position in step.spent:
                environment[position] = None

    def _enter(self, value: Array, declared_float16: bool) -> Array:
        if not np.issubdtype(value.dtype, np.floating):
            return value.astype(np.int32)
        value = value.astype(np.float32)
        return _to_float16(value) if self._rounds and declared_float16 else value

    def _position(self, name: str) -> int:
        return self._positions.setdefault(name, len(self._positions))

    def _compile(self, graph: MilGraph) -> list[Step]:
        in_place = in_place_updates(graph.nodes)
        keep = {*graph.inputs, *graph.states, *graph.constants, *graph.outputs}
        last_read: dict[str, int] = {name: index for index, node in enumerate(graph.nodes) for name in node.reads()}
        spent: dict[int, list[str]] = {}
        for name, index in last_read.items():
            if name not in keep:
                spent.setdefault(index, []).append(name)
        return [self._step(node, index in in_place, spent.get(index, [])) for index, node in enumerate(graph.nodes)]

    def _step(self, node: Node, in_place: bool, spent: list[str]) -> Step:
        call, outputs = _operation(node, in_place)
        inputs = {} if node.kind in STATE_OPERATIONS else node.inputs
        singles = [(parameter, name) for parameter, name in inputs.items() if isinstance(name, str)]
        if node.kind in STATE_OPERATIONS:
            singles = [("value", str(node.inputs[_SOURCES[node.kind]]))]
        return Step(
            call=call,
            singles=tuple((parameter, self._position(name)) for parameter, name in singles),
            lists=tuple(
                (parameter, tuple(self._position(name) for name in names))
                for parameter, names in inputs.items()
                if not isinstance(names, str)
            ),
            outputs=tuple(self._position(name) for name in outputs),
            rounds=self._rounds and node.float16 and node.kind not in MOVES and node.kind not in STATE_OPERATIONS,
            spent=tuple(self._position(name) for name in spent),
        )


def open_programs(
    package: Path, functions: Sequence[str | None] = (None,), rounding: Rounding = "float32"
) -> dict[str | None, Program]:
    """Functions of an .mlpackage folder, which share its weights; None is the only one's.

    Raises:
        UsageError: a damaged package, an operation that the evaluator does not know, or no such function.
    """
    shared: Shared = {}
    return {function: Program(package, rounding, function, shared) for function in functions}


_SOURCES = {"read_state": "input", WRITE_STATE: "data", UPDATE_STATE: "value"}  # what each state operation passes on


def _operation(node: Node, in_place: bool) -> tuple[Operation, tuple[str, ...]]:
    """The function of a node and the values it fills; writing a state fills the state's own place."""
    if node.kind == WRITE_STATE:
        return _same, (str(node.inputs["input"]),)
    if node.kind == UPDATE_STATE:
        return _twice, (*node.outputs, str(node.inputs["state"]))
    if node.kind in STATE_OPERATIONS:
        return _same, node.outputs
    return slice_update_in_place if in_place else OPERATIONS[node.kind], node.outputs


def _same(value: Array) -> Array:
    return value


def _twice(value: Array) -> tuple[Array, Array]:
    return value, value


def _to_float16(value: Any) -> Any:
    return value.astype(np.float16).astype(np.float32) if value.dtype == np.float32 else value
