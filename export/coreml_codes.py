"""A converted ML program and chosen codes -> the program with these codes and scales in place of the float constants.

linear_quantize_weights rounds with scales of its own; what it does to the program is done here with scales that are
given: each constant becomes a constexpr_blockwise_shift_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from export.coreml_convert import load_coremltools, quiet
from export.quantize.chosen import ChosenWeights


def store_codes(model: Any, chosen: ChosenWeights, constants: Mapping[str, str]) -> Any:
    """Replace float16 constants, named in ``constants`` by state-dict name -> constant's name, by the chosen codes."""
    if not constants:
        return model
    load_coremltools()
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.models.utils import _apply_graph_pass  # what all of coremltools.optimize goes through

    states = {constant: name for name, constant in constants.items()}

    class StoreCodes(AbstractGraphPass):
        def apply(self, program: Any) -> None:
            for function in program.functions.values():
                for operation in [op for op in function.operations if op.op_type == "const" and op.name in states]:
                    self.replace(function, operation)

        @staticmethod
        def replace(block: Any, operation: Any) -> None:
            coded = chosen.coded(states.pop(operation.name))
            with block:
                packed = mb.constexpr_blockwise_shift_scale(
                    data=coded.codes.numpy().astype(types.nptype_from_builtin(types.int4)),
                    scale=coded.scales.numpy().astype(np.float16),  # exact: export/quantize/grid.py
                    before_op=operation,
                    name=f"{operation.name}_quantized",
                )
            block.replace_uses_of_var_after_op(
                anchor_op=operation,
                old_var=operation.outputs[0],
                new_var=packed,
                force_replace=True,
            )
            block.remove_ops([operation])

    with quiet():
        model = _apply_graph_pass(model, StoreCodes())
    assert not states, f"the program has no constants {sorted(states)}"
    return model
