"""Config and tensor names of a LlavaForConditionalGeneration checkpoint <-> those of MobileVlm.

transformers has written these names in several ways over its versions (a leading ``model.``, ``language_model.model.``,
a ``vision_model.`` inside the tower). All are read; which one a file had is kept in ``MobileVlmConfig.llava_names``, so
that a trained model is written back under the names it came with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from bundle.errors import UsageError
from distill.models.mobilevlm import MobileVlm, MobileVlmConfig
from distill.models.parts import CLIP, TEXT_CONFIGS, VISION_CONFIGS

LLAVA_ARCHITECTURE = "LlavaForConditionalGeneration"
PROJECTOR = "mlp2x_gelu"
# our prefix -> what transformers has put there; the first that fits wins
PREFIXES = {
    "lm_head.": r"(language_model\.)?lm_head\.",
    "language_model.": r"(model\.)?language_model\.(model\.)?",
    "vision_tower.": r"(model\.)?vision_tower\.(vision_model\.)?",
    "projector.linears.0.": r"(model\.)?multi_modal_projector\.linear_1\.",
    "projector.linears.1.": r"(model\.)?multi_modal_projector\.linear_2\.",
}


def refuse_other_parts(raw: dict[str, Any], folder: Path) -> None:
    """Raise where config.json names a decoder or tower of another kind.

    Raises:
        UsageError: the part, its kind and the supported ones.
    """
    for part, kinds, default in (("text_config", TEXT_CONFIGS, "llama"), ("vision_config", VISION_CONFIGS, CLIP)):
        given = raw.get(part)
        kind = given.get("model_type", default) if isinstance(given, dict) else default
        if kind not in kinds:
            raise UsageError(
                f"{folder}: {part} model_type '{kind}' is not supported; supported: {', '.join(sorted(kinds))}"
            )


def llava_config(raw: dict[str, Any], folder: Path) -> MobileVlmConfig:
    """config.json of such a checkpoint -> MobileVlmConfig.

    Raises:
        UsageError: as ``refuse_other_parts``.
    """
    refuse_other_parts(raw, folder)
    theirs = LlavaConfig.from_dict(raw)
    text: Any = theirs.text_config  # both parts are configs by now, of the kinds that were checked
    vision: Any = theirs.vision_config
    text.tie_word_embeddings = theirs.tie_word_embeddings
    if text.pad_token_id is None:
        text.pad_token_id = raw.get("pad_token_id")
    return MobileVlmConfig(
        text_config=text,
        vision_config=vision,
        vision_select_layer=theirs.vision_feature_layer,
        vision_select_strategy=theirs.vision_feature_select_strategy,
        projector_type=PROJECTOR,
        projector_activation=theirs.projector_hidden_act,
        projector_bias=theirs.multimodal_projector_bias,
        image_token_id=theirs.image_token_index,
    )


def their_config(vlm: MobileVlm) -> LlavaConfig:
    """The config under which transformers opens the model."""
    config = vlm.config
    return LlavaConfig(
        architectures=[LLAVA_ARCHITECTURE],
        text_config=config.text_config,
        vision_config=config.vision_config,
        vision_feature_layer=config.vision_select_layer,
        vision_feature_select_strategy="full" if config.vision_select_strategy == "full" else "default",
        projector_hidden_act=config.projector_activation,
        multimodal_projector_bias=config.projector_bias,
        image_token_index=config.image_token_id,
        image_seq_length=config.visual_tokens,
        tie_word_embeddings=config.text_config.tie_word_embeddings,
        dtype=vlm.dtype,
    )


def our_names(stored: Iterable[str], folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Tensor names of a file -> (stored name -> ours, our prefix -> the file's prefix).

    Raises:
        UsageError: a name is of no LLaVA file, or the file mixes two ways of naming.
    """
    names: dict[str, str] = {}
    seen: dict[str, str] = {}
    for name in stored:
        ours, prefix = _prefix(name, folder)
        if seen.setdefault(ours, prefix) != prefix:
            raise UsageError(f"{folder}: tensors are named both '{seen[ours]}...' and '{prefix}...'; save it again")
        names[name] = ours + name.removeprefix(prefix)
    return names, seen


def their_tensors(vlm: MobileVlm) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of the file it came from; a tied lm_head is left out, as there."""
    given = vlm.config.llava_names
    assert given is not None
    tensors = {}
    for name, tensor in vlm.state_dict().items():
        ours = next(prefix for prefix in PREFIXES if name.startswith(prefix))
        if ours in given and not (ours == "lm_head." and vlm.config.text_config.tie_word_embeddings):
            tensors[given[ours] + name.removeprefix(ours)] = tensor.detach().contiguous()
    return tensors


def _prefix(name: str, folder: Path) -> tuple[str, str]:
    for ours, pattern in PREFIXES.items():
        if (found := re.match(pattern, name)) is not None:
            return ours, found[0]
    raise UsageError(f"{folder}: tensor '{name}' is not part of a {LLAVA_ARCHITECTURE} checkpoint")
