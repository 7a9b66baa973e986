"""Target, precision -> how far a graph may be from its own dequantised weights in torch, stage by stage (relative L2)."""

from __future__ import annotations

from bundle.manifest import Precision, Stage, Target

# The same code made the prompt and the pixels; 1e-6 leaves room for another Pillow build's last bit.
PROMPT, PIXELS = 0.0, 1e-6


def _stages(visual_tokens: float, embeddings: float, first_logits: float, greedy_tokens: float) -> dict[Stage, float]:
    return {
        "prompt": PROMPT,
        "pixels": PIXELS,
        "visual_tokens": visual_tokens,
        "embeddings": embeddings,
        "first_logits": first_logits,
        "greedy_tokens": greedy_tokens,
    }


# Only the order of float32 sums differs: 1e-6 measured on every stage of the reference checkpoints.
FLOAT32 = _stages(1e-4, 1e-6, 1e-4, 1e-4)
# Integer kernels round activations to int8 per block or token, which the float reference does not: about 1e-2 per graph in a
# trained model, and up to 5e-2 behind the final norm of the reference checkpoints' random weights.
INT8_ACTIVATIONS = _stages(3e-2, 1e-6, 1e-1, 1e-1)
# Core ML computes in float16 (10 bits of mantissa): about 1e-3 per graph.
FLOAT16 = _stages(1e-2, 1e-3, 2e-2, 2e-2)

TOLERANCES: dict[Target, dict[Precision, dict[Stage, float]]] = {
    "onnx": {"int4": INT8_ACTIVATIONS, "int8": INT8_ACTIVATIONS, "fp16": FLOAT32, "fp32": FLOAT32},
    "executorch": {"int4": INT8_ACTIVATIONS, "int8": INT8_ACTIVATIONS, "fp16": FLOAT16, "fp32": FLOAT32},
    "coreml": {"int4": FLOAT16, "int8": FLOAT16, "fp16": FLOAT16, "fp32": FLOAT32},
}
