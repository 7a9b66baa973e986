"""Kind of a decoder or tower, as configs name it -> transformers' classes for it: LLaMA or Qwen2, CLIP or SigLIP."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

TextConfig = LlamaConfig | Qwen2Config
VisionConfig = CLIPVisionConfig | SiglipVisionConfig
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
TEXT_CONFIGS: dict[str, type[LlamaConfig] | type[Qwen2Config]] = {"llama": LlamaConfig, "qwen2": Qwen2Config}
# Any: mypy cannot see that a model's class and its config's class go together
DECODERS: dict[str, Any] = {"llama": LlamaModel, "qwen2": Qwen2Model}
VISION_CONFIGS: dict[str, type[CLIPVisionConfig] | type[SiglipVisionConfig]] = {
    CLIP: CLIPVisionConfig,
    SIGLIP: SiglipVisionConfig,
}
TOWERS: dict[str, Any] = {CLIP: CLIPVisionModel, SIGLIP: SiglipVisionModel}


def as_text_config(value: TextConfig | dict[str, Any] | None) -> TextConfig:
    """A decoder's config from its dict; LLaMA where the dict names no kind.

    Raises:
        ValueError: the kind is not in TEXT_CONFIGS.
    """
    if isinstance(value, LlamaConfig | Qwen2Config):
        return value
    fields = dict(value or {})
    return _known(TEXT_CONFIGS, str(fields.pop("model_type", "llama")), "text_config")(**fields)


def as_vision_config(value: VisionConfig | dict[str, Any] | None) -> VisionConfig:
    """A tower's config from its dict; CLIP where the dict names no kind.

    Raises:
        ValueError: the kind is not in VISION_CONFIGS.
    """
    if isinstance(value, CLIPVisionConfig | SiglipVisionConfig):
        return value
    fields = dict(value or {})
    return _known(VISION_CONFIGS, str(fields.pop("model_type", CLIP)), "vision_config")(**fields)


def _known(kinds: dict[str, Any], kind: str, part: str) -> Any:
    if kind not in kinds:
        raise ValueError(f"{part} model_type '{kind}' is not supported; supported: {', '.join(kinds)}")
    return kinds[kind]
