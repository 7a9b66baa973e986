"""Model, weights that the files hold, questions -> the golden folder, and what explains a distance from its vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bundle.constants import CONSTANTS_FILE
from bundle.golden import CASES_FILE, write_golden
from bundle.manifest import Golden, Precision, Stage, Target, VectorSet
from bundle.tolerances import KERNELS, SIMULATED, quantization_tolerances, tolerances
from distill.models.mobilevlm import MobileVlm
from export.dequantized import load_dequantized, rounded_weights
from export.golden_record import (
    Floats,
    Outputs,
    Probe,
    forced_errors,
    golden_case,
    golden_vectors,
    run_forced,
    run_stages,
)
from export.rounding import rounded_activations


@dataclass(frozen=True)
class Recorded:
    """The written golden folder.

    Attributes:
        activation_error: what rounding activations as the kernels do moves, on top of the stored weights.
        rounding_error: what plain rounding of the weights to nearest at the recipe's widths moves.
    """

    cases: str
    vectors: dict[VectorSet, str]
    activation_error: dict[Stage, float]
    rounding_error: dict[Stage, float]

    def golden(self, target: Target, precision: Precision) -> Golden:
        """The manifest's entry."""
        return Golden(
            cases=self.cases,
            vectors=self.vectors,
            constants=CONSTANTS_FILE,
            activation_error=self.activation_error,
            tolerances=tolerances(target, precision, self.activation_error),
            quantization_tolerances=quantization_tolerances(self.rounding_error),
        )


@torch.no_grad()
def record(
    vlm: MobileVlm,
    dequantized: Mapping[str, torch.Tensor],
    questions: Sequence[Probe],
    target: Target,
    precision: Precision,
    folder: Path,
) -> Recorded:
    """Write the golden vectors of the checkpoint in float32 and of the weights that the files hold.

    ``vlm`` holds the dequantised weights afterwards: a second copy of a large model would not fit into memory. Both
    sets are fed the float model's own greedy tokens.

    Raises:
        VerificationError: a weight is too far from the checkpoint's to be its rounding.
    """
    in_float = [run_stages(vlm, probe) for probe in questions]
    sets: dict[VectorSet, Sequence[Outputs]] = {"float": in_float}
    stored = in_float
    rounding_error: dict[Stage, float] = {}
    if dequantized:
        with rounded_weights(vlm, target, precision):
            rounding_error = forced_errors(vlm, questions, in_float)
        load_dequantized(vlm, dequantized, target, precision)
        stored = [run_forced(vlm, probe, out.fed_ids) for probe, out in zip(questions, in_float, strict=True)]
        sets["dequantized"] = stored
    with rounded_activations(vlm, SIMULATED[KERNELS[target][precision]]):
        activation_error = forced_errors(vlm, questions, stored)
    files = write_golden(
        folder,
        [golden_case(probe, out) for probe, out in zip(questions, in_float, strict=True)],
        {of: _named(questions, outputs) for of, outputs in sets.items()},
        {probe.image_file: probe.image for probe in questions if probe.image_file and probe.image},
    )
    return Recorded(CASES_FILE, files, activation_error, rounding_error)


def _named(questions: Sequence[Probe], outputs: Sequence[Outputs]) -> dict[str, Floats]:
    return {name: v for probe, out in zip(questions, outputs, strict=True) for name, v in golden_vectors(probe, out)}
