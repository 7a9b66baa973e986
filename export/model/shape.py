"""MobileVlm and a context length -> ModelShape, the sizes that writers and runners allocate by."""

from __future__ import annotations

from bundle.manifest import ModelShape
from distill.models.mobilevlm import MobileVlm


def model_shape(vlm: MobileVlm, context_length: int) -> ModelShape:
    """Read the sizes off a model's config."""
    text = vlm.config.text_config
    return ModelShape(
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads or text.num_attention_heads,
        head_dim=vlm.language_model.layers[0].self_attn.head_dim,  # Qwen2's config need not name it
        vocab_size=text.vocab_size,
        context_length=context_length,
        visual_tokens=vlm.config.visual_tokens,
    )
