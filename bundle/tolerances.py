"""Target, precision and a model's own sensitivity -> how far each stage may be from its vectors, by processor family.

The one table of tolerances; docs/verification.md prints it (a test compares the two). A stage may be off by the larger
of its floor, which is what the order of sums and the number format of the kernels explain, and ``margin`` times the
bundle's ``activation_error``, which is what rounding activations moves in this very model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bundle.manifest import STAGES, Family, Precision, Stage, Target

Activations = Literal["float32", "float16", "int8"]
Kernels = Literal[
    "float32", "float16", "int8", "mlprogram-float16", "mlprogram-float32", "coreai-float16", "coreai-float32"
]

# What the matrix kernels of a bundle compute with; weights are another matter.
KERNELS: dict[Target, dict[Precision, Kernels]] = {
    "onnx": {"int4": "int8", "int8": "int8", "fp16": "float32", "fp32": "float32"},
    "executorch": {"int4": "int8", "int8": "int8", "fp16": "float16", "fp32": "float32"},
    "coreml": {
        "int4": "mlprogram-float16",
        "int8": "mlprogram-float16",
        "fp16": "mlprogram-float16",
        "fp32": "mlprogram-float32",
    },
    "coreai": {
        "int4": "coreai-float16",
        "int8": "coreai-float16",
        "fp16": "coreai-float16",
        "fp32": "coreai-float32",
    },
}
# What the exporter rounds in torch to learn how much it moves. Core ML keeps keys and values in float16 at fp32 too.
SIMULATED: dict[Kernels, Activations] = {
    "float32": "float32",
    "float16": "float16",
    "int8": "int8",
    "mlprogram-float16": "float16",
    "mlprogram-float32": "float16",
    "coreai-float16": "float16",
    "coreai-float32": "float32",
}


@dataclass(frozen=True)
class Rule:
    """How far the stages may be off on one family.

    Attributes:
        floor: of visual tokens, embeddings, first logits and greedy tokens; the prompt must be the same and pixels may
            differ by PIXELS everywhere.
        margin: times the model's own activation error.
        source: where the numbers come from.
    """

    floor: tuple[float, float, float, float]
    margin: float
    source: str


PIXELS = 1e-6  # the same code made them; the room is for another Pillow build's last bit
FLOAT32_FLOOR = (1e-4, 1e-6, 1e-4, 1e-4)
FLOAT16_FLOOR = (5e-3, 1e-3, 1e-2, 1e-2)
INT8_FLOOR = (1e-2, 1e-6, 1e-2, 1e-2)  # a table lookup is exact
UNMEASURED = "not measured; as x86_64-vnni"
RULES: dict[Kernels, dict[Family, Rule]] = {
    "float32": {
        "x86_64-vnni": Rule(FLOAT32_FLOOR, 3.0, "at most 1.2e-5 measured on the reference checkpoints"),
        "x86_64-avx2": Rule(FLOAT32_FLOOR, 3.0, UNMEASURED),
        "arm64-i8mm": Rule(FLOAT32_FLOOR, 3.0, "9.6e-7 for four MatMulNBits in float under QEMU (cpu max)"),
        "arm64-dotprod": Rule(FLOAT32_FLOOR, 3.0, "9.6e-7, the same under QEMU (neoverse-n1)"),
        "arm64": Rule(FLOAT32_FLOOR, 3.0, "9.6e-7, the same under QEMU (cortex-a53)"),
    },
    "float16": {
        "x86_64-vnni": Rule(FLOAT16_FLOOR, 3.0, "4e-4 first logits, 2.5e-3 greedy measured on the demo student"),
        "x86_64-avx2": Rule(FLOAT16_FLOOR, 3.0, UNMEASURED),
        "arm64-i8mm": Rule(FLOAT16_FLOOR, 3.0, "not measured; sums may be kept in float16 too, so the floor is wide"),
        "arm64-dotprod": Rule(FLOAT16_FLOOR, 3.0, "not measured; as arm64-i8mm"),
        "arm64": Rule(FLOAT16_FLOOR, 3.0, "not measured; as arm64-i8mm"),
    },
    "int8": {
        "x86_64-vnni": Rule(
            INT8_FLOOR, 3.5, "kernels differ from the three simulations in order and detail: 2.4x at most of 10 bundles"
        ),
        "x86_64-avx2": Rule(
            INT8_FLOOR, 7.0, "not measured; sums of two u8 x s8 products saturate at 16 bits without VNNI"
        ),
        "arm64-i8mm": Rule(
            INT8_FLOOR, 5.7, "MatMulNBits under QEMU (cpu max): 1.54e-2 against 0.95e-2 on x86, 1.6x; 3.5 x 1.63"
        ),
        "arm64-dotprod": Rule(INT8_FLOOR, 5.7, "the same under QEMU (neoverse-n1): 1.54e-2; 3.5 x 1.63"),
        "arm64": Rule(
            INT8_FLOOR, 3.5, "MatMulNBits falls back to float (9.6e-7 under QEMU, cortex-a53); XNNPACK rounds as on x86"
        ),
    },
    "mlprogram-float16": {
        "apple": Rule(
            FLOAT16_FLOOR,
            3.0,
            "no device measured; with every result rounded to float16 the evaluator is off by 9.6e-4, then 5.6e-3",
        ),
        "evaluator": Rule(
            (1e-4, 1e-6, 1e-3, 5e-3), 1.0, "float32 on tables stored in float16: 1e-4 first logits, 1.4e-3 greedy"
        ),
    },
    "mlprogram-float32": {
        "apple": Rule(FLOAT16_FLOOR, 3.0, "no device measured; keys and values are float16"),
        "evaluator": Rule(FLOAT32_FLOOR, 0.0, "nothing is rounded: 2e-6 at most on the demo student"),
    },
    "coreai-float16": {
        "apple": Rule(
            FLOAT16_FLOOR, 3.0, "no device measured; the wheel in float16, sums too, is off by 4.6e-3, then 1.7e-2"
        ),
        "evaluator": Rule(
            (1e-4, 1e-6, 1e-3, 5e-3), 1.0, "widened to float32: 7e-5 first logits, 1.7e-3 greedy on the demo models"
        ),
    },
    "coreai-float32": {
        "apple": Rule(FLOAT32_FLOOR, 3.0, "no device measured"),
        "evaluator": Rule(FLOAT32_FLOOR, 0.0, "nothing is rounded: 2e-6 at most on the demo models"),
    },
}
LARGEST = 0.9  # wrong graphs are off by 1 and more; the verifier counts a surely wrong token as 1

# The weights may move a stage by so many times what plain rounding to nearest at the same widths moves it. The worst of
# some hundred answer tokens is one where the model hardly decides: 2.0 times was seen there, 1.1 times elsewhere.
QUANTIZATION_MARGIN: dict[Stage, float] = {
    "visual_tokens": 2.0,
    "embeddings": 2.0,
    "first_logits": 2.0,
    "greedy_tokens": 4.0,
}
QUANTIZATION_FLOOR = 1e-5  # two runs of one model, with a cache and in one pass, differ by 2e-6


def tolerances(
    target: Target, precision: Precision, activation_error: Mapping[Stage, float]
) -> dict[Family, dict[Stage, float]]:
    """Tolerance of the graph error for each family that can run the target."""
    return {
        family: {
            "prompt": 0.0,
            "pixels": PIXELS,
            **{
                stage: max(floor, min(LARGEST, rule.margin * activation_error.get(stage, 0.0)))
                for stage, floor in zip(STAGES[2:], rule.floor, strict=True)
            },
        }
        for family, rule in RULES[KERNELS[target][precision]].items()
    }


def quantization_tolerances(rounding_error: Mapping[Stage, float]) -> dict[Stage, float]:
    """Tolerance of the quantization error; ``rounding_error`` is that of plain rounding to nearest."""
    return {
        stage: max(QUANTIZATION_FLOOR, margin * rounding_error.get(stage, 0.0))
        for stage, margin in QUANTIZATION_MARGIN.items()
    }
