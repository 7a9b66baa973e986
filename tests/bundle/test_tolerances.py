"""bundle.tolerances: one table, its arithmetic, and docs/verification.md that prints it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from bundle.manifest import STAGES, Family, Precision, Stage, Target
from bundle.tolerances import (
    INT8_FLOOR,
    KERNELS,
    LARGEST,
    QUANTIZATION_FLOOR,
    RULES,
    SIMULATED,
    quantization_tolerances,
    tolerances,
)

DOCS = Path(__file__).parents[2] / "docs/verification.md"


def test_tolerances_grow_with_sensitivity_between_floor_and_cap() -> None:
    noise: dict[Stage, float] = {"visual_tokens": 1e-9, "first_logits": 0.05, "greedy_tokens": 7.0}
    vnni = tolerances("onnx", "int4", noise)["x86_64-vnni"]
    assert vnni["visual_tokens"] == INT8_FLOOR[0]
    assert vnni["first_logits"] == pytest.approx(0.175)
    assert vnni["greedy_tokens"] == LARGEST < 1
    assert (vnni["prompt"], vnni["pixels"]) == (0.0, 1e-6)
    assert tolerances("onnx", "fp32", {})["x86_64-vnni"]["first_logits"] == 1e-4


def test_arm_int8_kernels_are_allowed_what_was_measured_of_them() -> None:
    noise: dict[Stage, float] = {"first_logits": 0.02}
    table = {family: row["first_logits"] for family, row in tolerances("onnx", "int4", noise).items()}
    assert table["arm64-dotprod"] / table["x86_64-vnni"] >= 1.54e-2 / 9.48e-3, "the ratio under QEMU"
    assert table["x86_64-vnni"] == table["arm64"] < table["arm64-i8mm"] < table["x86_64-avx2"]


def test_the_evaluator_is_held_to_less_than_a_device() -> None:
    for precision in get_args(Precision):
        rows = tolerances("coreml", precision, {"first_logits": 1e-3, "visual_tokens": 1e-3})
        assert set(rows) == {"apple", "evaluator"}
        assert all(rows["evaluator"][stage] <= rows["apple"][stage] for stage in STAGES)


@pytest.mark.parametrize("target", get_args(Target))
def test_every_bundle_has_every_stage_of_each_family(target: Target) -> None:
    for precision in get_args(Precision):
        table = tolerances(target, precision, {})
        assert table and all(set(row) == set(STAGES) for row in table.values())
        assert KERNELS[target][precision] in SIMULATED
    families = {family for rows in RULES.values() for family in rows}
    assert families == set(get_args(Family))
    assert all(rule.source for rows in RULES.values() for rule in rows.values()), "a number without a reason"


def test_quantization_tolerances_are_a_few_times_plain_rounding() -> None:
    found = quantization_tolerances({"visual_tokens": 0.01, "greedy_tokens": 0.1})
    assert found == {
        "visual_tokens": pytest.approx(0.02),
        "embeddings": QUANTIZATION_FLOOR,
        "first_logits": QUANTIZATION_FLOOR,
        "greedy_tokens": pytest.approx(0.4),
    }


def test_the_docs_print_this_table(load_script: Callable[[str], ModuleType]) -> None:
    table = load_script("tolerance_table").table()
    assert table in DOCS.read_text(encoding="utf-8"), "paste the output of scripts/tolerance_table.py"
