"""A MobileVlm + sizes -> a fresh MobileVlm with the same vision tower, its projector and decoder random."""

from __future__ import annotations

import torch
from transformers import CLIPVisionModel, LlamaConfig

from bundle.errors import UsageError
from distill.models.mobilevlm import MobileVlm, MobileVlmConfig


def create_student(
    teacher: MobileVlm, hidden_size: int, layers: int, heads: int, intermediate_size: int, seed: int = 0
) -> MobileVlm:
    """Build a student that sees what the teacher sees: its tower, its vocabulary, its number of visual tokens.

    Raises:
        UsageError: a size is not positive, or the width is no multiple of twice the heads.
    """
    _check_sizes(hidden_size, layers, heads, intermediate_size)
    theirs = teacher.config.text_config
    text = LlamaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate_size,
        vocab_size=theirs.vocab_size,
        max_position_embeddings=theirs.max_position_embeddings,
        rms_norm_eps=theirs.rms_norm_eps,
        rope_parameters=theirs.rope_parameters,
        bos_token_id=theirs.bos_token_id,
        eos_token_id=theirs.eos_token_id,
        pad_token_id=theirs.pad_token_id,
        initializer_range=theirs.initializer_range,  # a narrow teacher's is wide: LLaMA's 0.02 is for wide decoders
        tie_word_embeddings=False,
    )
    return create_vlm(text, teacher.vision_tower, teacher.config, seed)


def create_vlm(text: LlamaConfig, tower: CLIPVisionModel, like: MobileVlmConfig, seed: int = 0) -> MobileVlm:
    """Build a MobileVlm around a trained tower; ``like`` gives the layer that is read and the image strategy."""
    config = MobileVlmConfig(
        text_config=text,
        vision_config=tower.config.to_dict(),
        vision_select_layer=like.vision_select_layer,
        projector_type=like.projector_type,
        image_aspect_ratio=like.image_aspect_ratio,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm = MobileVlm(config)
    vlm.vision_tower.load_state_dict(tower.state_dict())
    return vlm.eval()


def _check_sizes(hidden_size: int, layers: int, heads: int, intermediate_size: int) -> None:
    sizes = {
        "hidden-size": hidden_size,
        "layers": layers,
        "heads": heads,
        "intermediate-size": intermediate_size,
    }
    wrong = [f"--{name} {value}" for name, value in sizes.items() if value < 1]
    if wrong:
        raise UsageError(f"{', '.join(wrong)}: sizes must be 1 or more")
    if hidden_size % (2 * heads):
        raise UsageError(
            f"--hidden-size {hidden_size} must be a multiple of twice --heads {heads}: "
            "rotary positions turn pairs of values in each head"
        )
