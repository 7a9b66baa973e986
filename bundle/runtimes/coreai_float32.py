"""An .aimodel -> the same program with every float16 widened to float32: the graph's own errors, without the rounding.

The wheel's CPU runtime sums products in float16 where the program says float16: one matrix product over 2048 values is
then off by 6.6e-3, and takes a hundred times what the same takes in float32 (64 x 2048 x 2048: 24.6 s and 0.2 s). No
phone computes like that, so nothing could be learnt from it. Constants keep the values that the file holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from bundle.runtimes.coreai_asset import CONSTANT, copy_constant, open_asset

GRAPH, SIGNATURE, VALUE = "coreai.graph", "function_type", "value"


def widened(source: Path, target: Path) -> Any:
    """Write the widened program of ``source`` to ``target`` -> its AIModelAsset.

    Raises:
        UsageError, VerificationError: as ``open_asset``.
    """
    program = open_asset(source).program
    _Widening(program._module._mlir_module).run()
    return program.save_asset(target)


class _Widening:
    """One pass over a program in memory: types of values, of signatures and of constants."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._ir = import_module("coreai._compiler.ir")
        self._handle = import_module("coreai._compiler.dialects.coreai").HandleType
        self._elements = import_module("coreai._compiler.dialects.coreai.constant").create_elements_attr

    def run(self) -> None:
        with self._module.context, self._ir.Location.unknown():
            self._float32 = self._ir.F32Type.get()
            for block in _blocks(self._module.operation):
                for argument in block.arguments:
                    argument.set_type(self._wide(argument.type))
                for operation in block.operations:
                    self._widen(operation.operation)

    def _widen(self, operation: Any) -> None:
        if operation.name == CONSTANT:
            self._widen_constant(operation)
            return
        for result in operation.results:
            result.set_type(self._wide(result.type))
        if operation.name == GRAPH:
            signature = self._ir.TypeAttr(operation.attributes[SIGNATURE]).value
            inputs, results = ([self._wide(kind) for kind in kinds] for kinds in (signature.inputs, signature.results))
            operation.attributes[SIGNATURE] = self._ir.TypeAttr.get(self._ir.FunctionType.get(inputs, results))

    def _widen_constant(self, operation: Any) -> None:
        kind = operation.results[0].type
        wide = self._wide(kind)
        if wide == kind:
            return
        values = copy_constant(operation).view(np.float16).astype(np.float32).reshape(tuple(kind.shape))
        operation.attributes[VALUE] = self._elements(self._ir.Location.unknown(), wide, values)
        operation.results[0].set_type(wide)

    def _wide(self, kind: Any) -> Any:
        if isinstance(kind, self._handle):
            return self._handle.get(self._wide(kind.inner_type))
        if isinstance(kind, self._ir.RankedTensorType) and isinstance(kind.element_type, self._ir.F16Type):
            return self._ir.RankedTensorType.get(kind.shape, self._float32, kind.encoding)
        return kind


def _blocks(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            yield block
            for inner in block.operations:
                yield from _blocks(inner.operation)
