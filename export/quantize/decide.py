"""Checkpoint and what the user asks -> recipe, chosen codes and the record of both that goes into the bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bundle.manifest import CalibrationRecord, RecipeRecord, RuleRecord, Target
from bundle.staging import write_text_whole
from distill.models.processing import Processing
from export.model.streamed import LoadedModel, open_streamed
from export.quantize.blame import Blame, blame_rows
from export.quantize.budget import MB, choose_bits, weight_bytes
from export.quantize.calibration import Calibration, read_calibration
from export.quantize.parts import parts_of, recipe_of
from export.quantize.recipe_file import check_recipe
from export.quantize.request import AUTO, Quantizing
from export.quantize.search import choose_codes
from export.quantize.sensitivity import Sensitivity
from export.weights.chosen import ChosenWeights
from export.weights.dequantized import RoundedWeights
from export.weights.plan import StoragePlan
from export.weights.recipe import QuantRule, Recipe, Storage

CODES_FOLDER, CHOICE_FILE = "codes", "choice.json"  # a folder of their own: *.json beside it are graphs


# onnxruntime multiplies whatever scale it finds; XNNPACK refuses scales below 0, and of Core ML nothing is known.
SIGNED_SCALES: tuple[Target, ...] = ("onnx",)


@dataclass(frozen=True)
class Decision:
    """How the weights will be stored.

    Attributes:
        chosen: None where the target's packer rounds to nearest.
    """

    recipe: Recipe
    chosen: ChosenWeights | None
    record: RecipeRecord
    blame: Blame | None


@dataclass(frozen=True)
class Case:
    """What is to be exported, and where notes may be kept that outlive a kill."""

    checkpoint: Path
    target: Target
    processing: Processing
    context_length: int
    shapes: Mapping[str, tuple[int, ...]]
    overrides: dict[str, Storage]
    notes: Path


def decide(case: Case, asked: Quantizing, progress: Callable[[str], None]) -> Decision:
    """Choose the recipe if that is asked for, then the codes.

    The search has a model of its own, read from the files part by part: exporters trace theirs without hooks.

    Raises:
        UsageError: the calibration data or the recipe does not fit the model, or the budget is too small.
    """
    if asked.recipe is not None:
        check_recipe(asked.recipe, case.shapes, case.target)
        if asked.method == "rtn":
            return Decision(asked.recipe, None, _record(asked.recipe, asked, None), None)
    model = open_streamed(case.checkpoint)
    data = None
    if asked.calibration is not None:
        data = read_calibration(asked.calibration, case.processing, model.vlm.config, case.context_length)
        progress(f"{len(data.conversations)} conversations to calibrate on")
    recipe, blame = asked.recipe, None
    if recipe is None:
        assert data is not None and asked.budget_mb is not None, "the options were checked together"
        recipe, blame = _choose_recipe(case, model, data, asked.budget_mb, progress)
    chosen = None
    if asked.method != "rtn":
        chosen = ChosenWeights(case.notes / CODES_FOLDER)
        plan = StoragePlan(case.target, recipe.precision, case.overrides, recipe)
        storages = {name: plan.storage(name, shape) for name, shape in case.shapes.items()}
        choose_codes(model, storages, asked.method, data, chosen, case.target in SIGNED_SCALES, progress)
    return Decision(recipe, chosen, _record(recipe, asked, data), blame)


def _choose_recipe(
    case: Case, model: LoadedModel, data: Calibration, budget_mb: float, progress: Callable[[str], None]
) -> tuple[Recipe, Blame]:
    note = case.notes / CODES_FOLDER / CHOICE_FILE
    note.parent.mkdir(exist_ok=True)
    if note.is_file():  # of the run that was killed; its work folder is of the same job
        kept = json.loads(note.read_text(encoding="utf-8"))
        rules = tuple(QuantRule(*rule) for rule in kept["rules"])
        return Recipe(AUTO, "int4", rules), Blame.model_validate(kept["blame"])
    shapes, config = case.shapes, model.vlm.config
    parts = parts_of(shapes, config.tower_layers, len(model.vlm.language_model.layers))
    sensitivity = Sensitivity(model, data.conversations)
    losses = sensitivity.measure(parts, progress)
    bits = choose_bits(parts, losses, shapes, case.target, round(budget_mb * MB))
    recipe = recipe_of(AUTO, [(part, bits[part.name]) for part in parts])
    blame = Blame(
        rows=blame_rows(parts, losses, bits, shapes, case.target),
        together=sensitivity.of_weights(RoundedWeights(model.weights, StoragePlan("onnx", "int4", recipe=recipe))),
        weights_mb=weight_bytes(shapes, recipe, case.target) / MB,
        budget_mb=budget_mb,
    )
    rules_json = [[rule.pattern, rule.bits, rule.group_size] for rule in recipe.rules]
    write_text_whole(note, json.dumps({"rules": rules_json, "blame": blame.model_dump(mode="json")}))
    return recipe, blame


def _record(recipe: Recipe, asked: Quantizing, data: Calibration | None) -> RecipeRecord:
    return RecipeRecord(
        name=recipe.name,
        method=asked.method,
        rules=tuple(
            RuleRecord(pattern=rule.pattern, bits=rule.bits, group_size=rule.group_size) for rule in recipe.rules
        ),
        calibration=None if data is None else CalibrationRecord(sha256=data.sha256, rows=len(data.conversations)),
        budget_mb=asked.budget_mb,
    )
