"""Tiny random LlavaForConditionalGeneration checkpoints, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

VOCABULARY, IMAGE_ID = 120, 110
KINDS = [(text, tower) for text in ("llama", "qwen2") for tower in ("clip_vision_model", "siglip_vision_model")]


def make_llava(
    text: str = "llama", tower: str = "clip_vision_model", seed: int = 0, text_changes: dict[str, Any] | None = None,
    tower_changes: dict[str, Any] | None = None, **changes: Any,
) -> LlavaForConditionalGeneration:  # fmt: skip
    """A model with 9 (CLIP) or 9 (SigLIP) patches; weights large enough that every part shows in the logits."""
    decoder = {
        "model_type": text, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": VOCABULARY, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    } | (text_changes or {})  # fmt: skip
    vision = {
        "model_type": tower, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 32, "image_size": 24, "patch_size": 8,
    } | (tower_changes or {})  # fmt: skip
    strategy = "default" if tower.startswith("clip") else "full"
    fields = {"image_token_index": IMAGE_ID, "vision_feature_select_strategy": strategy} | changes
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=decoder, vision_config=vision, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write_llava(folder: Path, model: LlavaForConditionalGeneration, **options: Any) -> Path:
    """Save it as transformers does."""
    model.save_pretrained(folder, **options)
    return folder
