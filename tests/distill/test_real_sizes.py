"""Published sizes without published weights: shapes and names on the meta device, one forward pass of 1.7B (slow)."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.initialization import no_init_weights

from distill.models.checkpoint import published_name
from distill.models.mobilevlm import IMAGE_TOKEN_ID, MobileVlm, MobileVlmConfig

# name: hidden, layers, heads, intermediate; parameters of decoder and head together
SIZES = {
    "1.7B": ((2048, 24, 16, 5632), 1_364_297_728),  # MobileLLaMA-1.4B
    "3B": ((2560, 32, 32, 6912), 2_701_560_320),  # MobileLLaMA-2.7B
    "7B": ((4096, 32, 32, 11008), 6_738_415_616),  # Vicuna-7B v1.5
}
TOWER_PARAMETERS = 303_507_456  # CLIP ViT-L/14-336
LAYER = (
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
    "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight",
    "post_attention_layernorm.weight",
)  # fmt: skip
TOWER_LAYER = [
    f"{part}.{kind}"
    for part in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "layer_norm1",
                 "layer_norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]  # fmt: skip


def config(hidden: int, layers: int, heads: int, intermediate: int) -> MobileVlmConfig:
    text = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=intermediate,
        vocab_size=32000, max_position_embeddings=2048, rms_norm_eps=1e-6,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    return MobileVlmConfig(text_config=text, vision_config=vision)


def published_names(layers: int) -> set[str]:
    """Every tensor of such a file, as published."""
    tower = "model.vision_tower.vision_tower.vision_model."
    return {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        *(f"model.layers.{number}.{name}" for number in range(layers) for name in LAYER),
        *(f"model.mm_projector.{part}.{kind}" for part in ("mlp.mlp.0", "mlp.mlp.2", "peg.peg.0")
          for kind in ("weight", "bias")),
        tower + "embeddings.class_embedding", tower + "embeddings.patch_embedding.weight",
        tower + "embeddings.position_embedding.weight",
        *(f"{tower}{norm}.{kind}" for norm in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")),
        *(f"{tower}encoder.layers.{number}.{name}" for number in range(24) for name in TOWER_LAYER),
    }  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_shapes_and_names_of_the_published_sizes(name: str) -> None:
    sizes, parameters = SIZES[name]
    with torch.device("meta"):
        vlm = MobileVlm(config(*sizes))
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in vlm.named_children()}
    assert count["language_model"] + count["lm_head"] == parameters
    assert count["vision_tower"] == TOWER_PARAMETERS
    width = sizes[0]
    assert count["projector"] == 1024 * width + width + width * width + width + 10 * width
    assert vlm.config.visual_tokens == 144 and vlm.config.feature_shape == (576, 1024)
    ours = {published_name(published, "ldpnetv2", Path("checkpoint")) for published in published_names(sizes[1])}
    assert ours == set(vlm.state_dict())


@pytest.mark.slow
def test_one_forward_pass_of_1_7b_in_bfloat16() -> None:
    """Needs 4 GiB and a minute of one core; the peak stays below twice the weights, so nothing is held in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():
            vlm = MobileVlm(config(*SIZES["1.7B"][0])).eval()
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.normal_(std=0.02)
    ids = torch.tensor([[1, *range(100, 140), IMAGE_TOKEN_ID, *range(200, 220)]])
    with torch.inference_mode():
        logits = vlm.logits(ids, None, torch.randn(1, 3, 336, 336))
    assert logits.shape == (1, 61 + 144, 32000) and torch.isfinite(logits).all()
    weights = sum(parameter.nbytes for parameter in vlm.parameters())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 2 * weights
