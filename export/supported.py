"""Model, its files' rules and a context length -> nothing, or the one line that names what cannot be exported.

Looked at before any work: what the graphs are written for is said here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from bundle.errors import UsageError
from bundle.manifest import Target
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing
from distill.models.projector import LDP_V1, LDP_V2, LINEAR
from distill.models.roles import sliding_window
from export.model.shape import model_shape
from export.targets import TARGETS

PROJECTORS = f"{LDP_V2}, {LINEAR}, mlp2x_gelu (any number of layers)"
# Of towers, projectors and decoders: all that CLIP, SigLIP, LLaVA, LLaMA and Qwen2 checkpoints name.
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "relu", "silu")
# Tables of cos and sin for every position can be made of these; the others turn by how long the prompt is.
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


# Widths of a head that a target's attention takes; onnxruntime's GroupQueryAttention refuses others when it runs.
HEAD_MULTIPLES: dict[Target, int] = {"onnx": 16}


def check_supported(
    checkpoint: Path, vlm: MobileVlm, processing: Processing, context_length: int, target: Target
) -> None:
    """Refuse what the target's exporter does not compute.

    Raises:
        UsageError: the first part that is not supported, its value, what is supported, and what to do.
    """
    for problem in chain(_of_any_target(vlm, processing, context_length), _of(target, vlm)):
        raise UsageError(f"{checkpoint}: {problem}")


def _of_any_target(vlm: MobileVlm, processing: Processing, context_length: int) -> Iterator[str]:
    config, text = vlm.config, vlm.config.text_config
    wanted = config.vision_config.image_size
    if processing.image.size != wanted:
        yield (
            f"preprocessor_config.json makes images of {processing.image.size} pixels, the vision tower takes {wanted}"
            "; copy preprocessor_config.json of the tower it was trained with"
        )
    if config.projector_type == LDP_V1:
        yield (
            f"projector '{LDP_V1}' can be trained but not exported; exported are {PROJECTORS}; distil into a student "
            "with one of them: alignkd-distill --help"
        )
    for part, name in (
        ("text_config hidden_act", text.hidden_act),
        ("vision_config hidden_act", config.vision_config.hidden_act),
        ("projector_hidden_act", config.projector_activation),
    ):
        if name not in ACTIVATIONS:
            yield f"{part} '{name}' can be trained but not exported; exported are {', '.join(ACTIVATIONS)}"
    rope = (text.rope_parameters or {}).get("rope_type", "default")
    if rope not in ROPE_KINDS:
        yield f"rope_type '{rope}' can be trained but not exported; exported are {', '.join(ROPE_KINDS)}"
    if text.num_attention_heads % (text.num_key_value_heads or text.num_attention_heads):
        yield (
            f"num_attention_heads {text.num_attention_heads} is no multiple of num_key_value_heads "
            f"{text.num_key_value_heads}"
        )
    windows = {sliding_window(vlm, layer) for layer in range(text.num_hidden_layers)} - {None}
    narrow = [window for window in windows if window is not None and window < context_length]
    if narrow:
        yield (
            f"layers attend to a sliding window of {min(narrow)} tokens, exported ones to all {context_length} of the "
            f"context; they are the same up to --context-length {min(narrow)}"
        )


def _of(target: Target, vlm: MobileVlm) -> Iterator[str]:
    width, multiple = model_shape(vlm, 1).head_dim, HEAD_MULTIPLES.get(target, 1)
    if width % multiple:
        others = " or ".join(f"--target {other}" for other in TARGETS if other not in HEAD_MULTIPLES)
        yield f"heads are {width} wide, {target} takes multiples of {multiple}; export with {others}"
