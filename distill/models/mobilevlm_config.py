"""Kinds and sizes of a model's three parts -> MobileVlmConfig, saved as config.json beside the weights."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from distill.models.parts import CLIP, TextConfig, VisionConfig, as_text_config, as_vision_config
from distill.models.projector import LDP_V1, LDP_V2, visual_tokens

IMAGE_TOKEN_ID = -200  # the published code's IMAGE_TOKEN_INDEX; never a row of the embedding table


class MobileVlmConfig(PreTrainedConfig):
    """Sizes of the three parts; saved as config.json beside the weights.

    Args:
        text_config: config of a decoder in ``distill.models.parts``, or its dict.
        vision_config: config of a tower in ``distill.models.parts``, or its dict.
        vision_select_layer: which hidden state of the tower is read (-2 in every published MobileVLM), or which ones,
            one after the other in the features.
        vision_select_strategy: "default" leaves out each image's first position, the class token of a CLIP tower, as
            transformers does for every tower; "full" keeps all.
        projector_type: a name of ``distill.models.projector``.
        projector_activation, projector_bias: of LLaVA's projectors.
        image_aspect_ratio: "pad" (square padding with the mean colour), "crop" or "stretch".
        image_token_id: the id that stands for one whole image.
        llava_names: our prefix of a tensor's name -> the prefix in the LLaVA file that the model came from, and by
            which it is saved; None for MobileVLM.
    """

    model_type = "alignkd_mobilevlm"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: TextConfig | dict[str, Any] | None = None,
        vision_config: VisionConfig | dict[str, Any] | None = None,
        vision_select_layer: int | list[int] = -2,
        vision_select_strategy: str = "default",
        projector_type: str = LDP_V2,
        projector_activation: str = "gelu",
        projector_bias: bool = True,
        image_aspect_ratio: str = "pad",
        image_token_id: int = IMAGE_TOKEN_ID,
        llava_names: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_config = as_text_config(text_config)
        self.vision_config = as_vision_config(vision_config)
        self.vision_select_layer = vision_select_layer
        self.vision_select_strategy = vision_select_strategy
        self.projector_type = projector_type
        self.projector_activation = projector_activation
        self.projector_bias = projector_bias
        self.image_aspect_ratio = image_aspect_ratio
        self.image_token_id = image_token_id
        self.llava_names = llava_names
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def patch_grid(self) -> int:
        """Patches per side of the tower."""
        size, patch = self.vision_config.image_size, self.vision_config.patch_size
        assert isinstance(size, int) and isinstance(patch, int)  # CLIP's and SigLIP's towers are square
        return size // patch

    @property
    def tower_states(self) -> tuple[int, ...]:
        """The hidden states of the tower that are read: 0 is the embedding, the last what its last layer makes."""
        select, states = self.vision_select_layer, self.vision_config.num_hidden_layers + 1
        return tuple(s if s >= 0 else states + s for s in ([select] if isinstance(select, int) else select))

    @property
    def tower_layers(self) -> int:
        """How many of the tower's layers are run."""
        return max(self.tower_states)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Positions and width of one image's tower features."""
        positions = self.patch_grid**2 + (self.vision_config.model_type == CLIP)
        dropped = self.vision_select_strategy == "default"
        return positions - dropped, self.vision_config.hidden_size * len(self.tower_states)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens per image (144 for 336 px, patch 14 and LDP, which halves the grid)."""
        if self.projector_type in (LDP_V1, LDP_V2):
            return visual_tokens(self.projector_type, self.patch_grid)
        return self.feature_shape[0]
