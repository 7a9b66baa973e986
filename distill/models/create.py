"""A MobileVlm + sizes -> a fresh MobileVlm with the same vision tower, its projector and decoder random."""

from __future__ import annotations

import torch
from transformers import CLIPVisionModel, SiglipVisionModel

from bundle.errors import UsageError
from distill.models.mobilevlm import MobileVlm, MobileVlmConfig
from distill.models.parts import TextConfig, as_text_config


def create_student(
    teacher: MobileVlm, hidden_size: int, layers: int, heads: int, intermediate_size: int, seed: int = 0
) -> MobileVlm:
    """Build a student that sees what the teacher sees: its tower, its vocabulary, its number of visual tokens.

    Raises:
        UsageError: a size is not positive, or the width is no multiple of twice the heads.
    """
    _check_sizes(hidden_size, layers, heads, intermediate_size)
    theirs = teacher.config.text_config
    # of the teacher's kind, with its vocabulary, positions, and width of initial values: a narrow teacher's is wide
    text = as_text_config(
        {name: value for name, value in theirs.to_dict().items() if name not in ("head_dim", "layer_types")}
        | {
            "hidden_size": hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "intermediate_size": intermediate_size,
            "tie_word_embeddings": False,
        }
    )
    return create_vlm(text, teacher.vision_tower, teacher.config, seed)


def create_vlm(
    text: TextConfig, tower: CLIPVisionModel | SiglipVisionModel, like: MobileVlmConfig, seed: int = 0
) -> MobileVlm:
    """Build a MobileVlm around a trained tower; ``like`` gives all that is neither tower nor decoder."""
    names = like.llava_names
    if names is not None and "lm_head." not in names:  # a file whose lm_head was tied; this one's is not
        old = names["language_model."].startswith("language_model.")
        names = names | {"lm_head.": "language_model.lm_head." if old else "lm_head."}
    config = MobileVlmConfig(
        text_config=text,
        vision_config=tower.config.to_dict(),
        vision_select_layer=like.vision_select_layer,
        vision_select_strategy=like.vision_select_strategy,
        projector_type=like.projector_type,
        projector_activation=like.projector_activation,
        projector_bias=like.projector_bias,
        image_aspect_ratio=like.image_aspect_ratio,
        image_token_id=like.image_token_id,
        llava_names=names,
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
