"""Model, weights that the files hold, questions -> the golden folder, and what explains a distance from its vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bundle.constants import CONSTANTS_FILE
from bundle.golden import CASES_FILE, write_golden
from bundle.manifest import Golden, Precision, Stage, Target, VectorSet
from bundle.runtimes.contract import Floats
from bundle.tolerances import KERNELS, SIMULATED, quantization_tolerances, tolerances
from export.golden.lockstep import forced_errors_together, golden_work, run_forced_together, run_stages_together
from export.golden.record import Outputs, Probe, golden_case, golden_vectors
from export.golden.rounding import ROUNDINGS, rounded_activations
from export.job.meter import Meter
from export.model.streamed import LoadedModel
from export.weights.dequantized import RoundedWeights, check_stored
from export.weights.plan import StoragePlan


@dataclass(frozen=True)
class Recorded:
    """The written golden folder.

    Attributes:
        activation_error: what rounding activations as the kernels do moves, on top of the stored weights; the most of
            several ways to round.
        rounding_error: what rounding of the weights at the recipe's widths moves: plain, or as the codes were chosen.
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


def record(
    model: LoadedModel,
    dequantized: Mapping[str, torch.Tensor],
    questions: Sequence[Probe],
    plan: StoragePlan,
    folder: Path,
    progress: Callable[[str], None],
) -> Recorded:
    """Write the golden vectors of the checkpoint in float32 and of the weights that the files hold.

    Both sets are fed the float model's own greedy tokens. Other weights than the checkpoint's lie in memory part by
    part: a second copy of a large model, and of a streamed one the first, would not fit.

    Raises:
        VerificationError: a weight is too far from the checkpoint's to be its rounding.
    """
    roundings = ROUNDINGS[SIMULATED[KERNELS[plan.target][plan.precision]]]
    forced_rounds = len(roundings) + (2 if dequantized else 0)
    advance = Meter("golden vectors", golden_work(model.vlm, questions, 1, forced_rounds), progress).advance
    in_float = run_stages_together(model, questions, advance)
    sets: dict[VectorSet, Sequence[Outputs]] = {"float": in_float}
    stored = in_float
    rounding_error: dict[Stage, float] = {}
    if dequantized:
        model.use(RoundedWeights(model.weights, plan))
        rounding_error = forced_errors_together(model, questions, in_float, advance)
        model.use({})  # so that its buffers do not lie beside those of the check
        check_stored(model.weights, dequantized, plan)
        model.use(dequantized)
        stored = run_forced_together(model, questions, [out.fed_ids for out in in_float], advance)
        sets["dequantized"] = stored
    activation_error: dict[Stage, float] = {}
    for rounding in roundings:
        with rounded_activations(model.vlm, rounding):
            found = forced_errors_together(model, questions, stored, advance)
        activation_error = {stage: max(error, activation_error.get(stage, 0.0)) for stage, error in found.items()}
    model.use({})
    files = write_golden(
        folder,
        [golden_case(probe, out) for probe, out in zip(questions, in_float, strict=True)],
        {of: _named(questions, outputs) for of, outputs in sets.items()},
        {probe.image_file: probe.image for probe in questions if probe.image_file and probe.image},
    )
    return Recorded(CASES_FILE, files, activation_error, rounding_error)


def _named(questions: Sequence[Probe], outputs: Sequence[Outputs]) -> dict[str, Floats]:
    return {name: v for probe, out in zip(questions, outputs, strict=True) for name, v in golden_vectors(probe, out)}
