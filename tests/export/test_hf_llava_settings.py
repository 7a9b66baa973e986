"""What a Hugging Face LLaVA may say otherwise than the plain ones: its ONNX bundle answers as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from export.frame import ExportJob, export_bundle
from tests.distill.llava_checkpoints import INTERLEAVE
from tests.export.hf_answers import assert_same_answers
from tests.export.hf_checkpoints import write_checkpoint

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
# What a checkpoint of the family may say otherwise than the four plain ones.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied embeddings": ("qwen2", "clip_vision_model", {"text_changes": {"tie_word_embeddings": True}}),
    "biases everywhere, wide heads": (
        "llama",
        "clip_vision_model",
        {"text_changes": {"attention_bias": True, "mlp_bias": True, "head_dim": 32}},
    ),
    "scaled rotary": ("llama", "siglip_vision_model", {"text_changes": {"rope_parameters": LLAMA3_ROPE}}),
    "one key head, another base": (
        "qwen2",
        "siglip_vision_model",
        {
            "text_changes": {
                "num_key_value_heads": 1,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "layer_types": ["full_attention"] * 2,
            }
        },
    ),
    "several layers of the tower, class token kept": (
        "llama",
        "clip_vision_model",
        {"vision_feature_layer": [-2, 1, 0], "vision_feature_select_strategy": "full"},
    ),
    "last layer, first patch dropped, plain projector": (
        "qwen2",
        "siglip_vision_model",
        {
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "relu",
            "multimodal_projector_bias": False,
        },
    ),
    "a line feed before each text": ("qwen2", "siglip_vision_model", {"chat": INTERLEAVE}),
    "window as wide as the context": (
        "qwen2",
        "clip_vision_model",
        {"text_changes": {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 1}},
    ),
}


@pytest.mark.parametrize(("text", "tower", "changes"), VARIANTS.values(), ids=VARIANTS.keys())
def test_answers_of_other_settings_are_too(text: str, tower: str, changes: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", text, tower, **changes)
    export_bundle(ExportJob(tmp_path / "m", "onnx", "fp32", tmp_path / "b"), progress=lambda line: None)
    assert_same_answers(tmp_path / "m", tmp_path / "b")
