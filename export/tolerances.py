"""Target, precision and a model's own sensitivity -> how far each stage may be from the dequantised weights in torch.

Integer kernels round activations, which the float reference does not. How much that moves the logits depends on the
model: int8 rounding per token was seen to move them by 0.01 in a trained model and by 0.2 in the reference checkpoints
with random weights. So the frame rounds activations in torch as the kernels do, and a stage may be off by a few times
what that moves it.
"""

from __future__ import annotations

from typing import Literal

from bundle.manifest import Precision, Stage, Target

Activations = Literal["float32", "float16", "int8"]

# What the runtime's matrix kernels are fed. Core ML keeps keys and values in float16 at every precision.
ACTIVATIONS: dict[Target, dict[Precision, Activations]] = {
    "onnx": {"int4": "int8", "int8": "int8", "fp16": "float32", "fp32": "float32"},
    "executorch": {"int4": "int8", "int8": "int8", "fp16": "float16", "fp32": "float32"},
    "coreml": {"int4": "float16", "int8": "float16", "fp16": "float16", "fp32": "float16"},
}

# Tolerance of a stage when rounding activations moves nothing (relative L2).
FLOORS: dict[Activations, dict[Stage, float]] = {
    "float32": {  # only the order of sums differs: at most 1.2e-5 measured on the reference checkpoints
        "prompt": 0.0,  # the same code made it
        "pixels": 1e-6,  # the same code again; the room is for another Pillow build's last bit
        "visual_tokens": 1e-4,
        "embeddings": 1e-6,
        "first_logits": 1e-4,
        "greedy_tokens": 1e-4,
    },
    "float16": {  # ten bits of mantissa; the softmax and the norms are rounded too, which the simulation leaves out
        "prompt": 0.0,
        "pixels": 1e-6,
        "visual_tokens": 5e-3,
        "embeddings": 1e-3,
        "first_logits": 1e-2,
        "greedy_tokens": 1e-2,
    },
    "int8": {
        "prompt": 0.0,
        "pixels": 1e-6,
        "visual_tokens": 1e-2,
        "embeddings": 1e-6,  # a table lookup is exact
        "first_logits": 1e-2,  # 1e-3 to 3e-3 measured on trained demo models
        "greedy_tokens": 1e-2,
    },
}
# Kernels differ from the simulation in block size, zero point and rounding: 1.9 times its error was measured at most.
MARGIN = 3.0
LARGEST = 0.9  # wrong graphs are off by 1 and more; the verifier counts a surely wrong token as 1


def stage_tolerances(target: Target, precision: Precision, rounding: dict[Stage, float]) -> dict[Stage, float]:
    """Tolerances of a bundle; ``rounding`` is the error that rounded activations cause in the model itself."""
    floors = FLOORS[ACTIVATIONS[target][precision]]
    return {stage: max(floor, min(LARGEST, MARGIN * rounding.get(stage, 0.0))) for stage, floor in floors.items()}
