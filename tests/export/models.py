"""Small random models of shapes that the reference student does not have."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from distill.models.mobilevlm import MobileVlm, MobileVlmConfig


def random_vlm(
    hidden: int = 64, heads: int = 4, kv_heads: int = 2, head_dim: int = 32, feed_forward: int = 96, patch: int = 16
) -> MobileVlm:
    """A seeded model with 2 decoder layers and a tower of 3 on 96 pixels; 9 visual tokens for patches of 16 or 13."""
    torch.manual_seed(hidden + heads + patch)
    text = LlamaConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=feed_forward,
        num_hidden_layers=2,
        vocab_size=48,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    vision = CLIPVisionConfig(
        hidden_size=48,
        num_attention_heads=3,
        intermediate_size=80,
        num_hidden_layers=3,
        image_size=96,
        patch_size=patch,
        hidden_act="gelu" if patch == 13 else "quick_gelu",
    )
    vlm = MobileVlm(MobileVlmConfig(text, vision)).eval()
    for parameter in vlm.parameters():  # biases and norms too: a zero bias would hide a missing one
        torch.nn.init.normal_(parameter, mean=0.0, std=0.1)
    for name, parameter in vlm.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return vlm
