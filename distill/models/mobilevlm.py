"""A LLaVA-like model (tower, projector, decoder) of any supported parts: ids with one image id per image -> logits.

One class serves MobileVLM and the Hugging Face LLaVA family alike: their checkpoints differ in names and in the kind of
the three parts, not in what is computed. So losses, exporters and generation know one type, and a layout is only a
matter of reading and writing files (checkpoint.py, llava.py, save.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.models.mobilevlm_config import IMAGE_TOKEN_ID as IMAGE_TOKEN_ID
from distill.models.mobilevlm_config import MobileVlmConfig as MobileVlmConfig
from distill.models.parts import CLIP, DECODERS, TOWERS
from distill.models.projector import LDP_V1, LDP_V2, make_projector

PADDING_KIND, TEXT_KIND, VISION_KIND = 0, 1, 2


class Expanded:
    """A batch after every image id was replaced by its visual tokens.

    Attributes:
        inputs_embeds: [B, L, D].
        attention_mask: [B, L], 1 on real positions.
        kinds: [B, L], PADDING_KIND, TEXT_KIND or VISION_KIND.
        labels: [B, L] with -100 on vision and padding, or None.
        visual_tokens: [n_images, N, D], or None for a text-only batch.
    """

    def __init__(
        self,
        inputs_embeds: torch.Tensor,
        kinds: torch.Tensor,
        labels: torch.Tensor | None,
        visual_tokens: torch.Tensor | None,
    ) -> None:
        self.inputs_embeds = inputs_embeds
        self.kinds = kinds
        self.attention_mask = (kinds != PADDING_KIND).long()
        self.labels = labels
        self.visual_tokens = visual_tokens


def selected_features(
    config: MobileVlmConfig, states: torch.Tensor, layers: Sequence[Callable[[torch.Tensor], torch.Tensor]]
) -> torch.Tensor:
    """A tower's embedded image [n, S, D_v] through its first layers -> what the projector reads, [n, P, D_v * states].

    Exporters bring layers of their own, so that which states are read, and what is left out of them, is said once.
    """
    read = {0: states}
    for number, layer in enumerate(layers, start=1):
        states = layer(states)
        if number in config.tower_states:
            read[number] = states
    features = torch.cat([read[number] for number in config.tower_states], -1)
    return features[:, 1:] if config.vision_select_strategy == "default" else features


class MobileVlm(PreTrainedModel):
    """The model. ``logits`` is the whole forward pass; the parts are public for losses and exporters."""

    config_class = MobileVlmConfig
    config: MobileVlmConfig
    base_model_prefix = "mobilevlm"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: MobileVlmConfig) -> None:
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        if not all(0 <= number <= vision.num_hidden_layers for number in config.tower_states):
            raise ValueError(
                f"layer {config.vision_select_layer} of a tower of {vision.num_hidden_layers} layers is to be read"
            )
        if config.projector_type in (LDP_V1, LDP_V2) and config.feature_shape[0] != config.patch_grid**2:
            raise ValueError(f"projector '{config.projector_type}' reads a grid of patches alone")
        self.vision_tower: Any = TOWERS[vision.model_type](vision)  # of two kinds, whose parts mypy cannot tell apart
        self.projector = make_projector(
            config.projector_type,
            config.feature_shape[1],
            text.hidden_size,
            config.patch_grid,
            config.projector_activation,
            config.projector_bias,
        )
        self.language_model: Any = DECODERS[text.model_type](text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()
        self.tie_head()

    def tie_head(self) -> None:
        """Make lm_head the embedding table where the decoder's config asks for that; replaced tensors need it again."""
        if self.config.text_config.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    @property
    def image_token_id(self) -> int:
        """The id that stands for one whole image in ``input_ids``."""
        return self.config.image_token_id

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def tower_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values [n, 3, S, S] -> patch features [n, P, D_v] of the selected layers, class token dropped."""
        tower = self.vision_tower  # not called as a whole: the layers behind the selected ones would run for nothing
        states = tower.embeddings(pixel_values.to(self.dtype))  # [n, P + 1, D_v], [n, P, D_v] of SigLIP
        if self.config.vision_config.model_type == CLIP:
            states = tower.pre_layrnorm(states)
        layers = tower.encoder.layers[: self.config.tower_layers]
        return selected_features(self.config, states, [partial(layer, attention_mask=None) for layer in layers])

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values [n, 3, S, S] -> projected visual tokens [n, N, D]."""
        return self.projector(self.tower_features(pixel_values))

    def expand(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        visual_tokens: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Expanded:
        """Replace each image id by its N visual tokens, rows kept right-padded.

        Args:
            input_ids: [B, T], ``image_token_id`` once per image.
            attention_mask: [B, T]; 0 marks padding. None means no padding.
            visual_tokens: [n_images, N, D] in reading order of the batch's image ids.
            labels: [B, T] aligned with ``input_ids``, -100 where unsupervised.

        Raises:
            ValueError: the number of image ids differs from the number of images.
        """
        is_image = input_ids == self.image_token_id  # [B, T]
        images = 0 if visual_tokens is None else visual_tokens.shape[0]
        if int(is_image.sum()) != images:
            raise ValueError(f"input_ids hold {int(is_image.sum())} image ids, but {images} images were given")
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
        per_image = 1 if visual_tokens is None else visual_tokens.shape[1]
        spread = torch.where(is_image, per_image, 1) * real  # [B, T] positions each id takes
        lengths = spread.sum(1)
        end = spread.cumsum(1)  # [B, T]
        batch, length = input_ids.shape[0], int(lengths.max())
        kinds = input_ids.new_zeros(batch, length)
        width, device = self.config.text_config.hidden_size, input_ids.device  # offloaded weights are elsewhere
        embeds = self.lm_head.weight.new_zeros(batch, length, width, device=device)  # [B, L, D]
        kinds[torch.arange(length, device=kinds.device)[None] < lengths[:, None]] = VISION_KIND
        text_at = (real.bool() & ~is_image).nonzero(as_tuple=True)
        target = (text_at[0], end[text_at] - 1)
        kinds[target] = TEXT_KIND
        embeds = embeds.index_put(target, self.get_input_embeddings()(input_ids[text_at]).to(embeds.dtype))
        if visual_tokens is not None:
            embeds = embeds.index_put(
                (kinds == VISION_KIND).nonzero(as_tuple=True), visual_tokens.flatten(0, 1).to(embeds.dtype)
            )
        spread_labels = None
        if labels is not None:
            spread_labels = labels.new_full((batch, length), -100)
            spread_labels[target] = labels[text_at]
        return Expanded(embeds, kinds, spread_labels, visual_tokens)

    def hidden_states(self, expanded: Expanded) -> torch.Tensor:
        """Expanded batch -> last hidden states after the final norm [B, L, D]."""
        return self.language_model(
            inputs_embeds=expanded.inputs_embeds, attention_mask=expanded.attention_mask, use_cache=False
        ).last_hidden_state

    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ids [B, T], mask [B, T], images [n, 3, S, S] -> logits [B, L, V] over the expanded positions."""
        visual = None if pixel_values is None else self.encode_images(pixel_values)
        return self.lm_head(self.hidden_states(self.expand(input_ids, attention_mask, visual)))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same as ``logits``."""
        return self.logits(input_ids, attention_mask, pixel_values)

    @torch.no_grad()
    def greedy(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        max_new_tokens: int,
        eos_ids: tuple[int, ...] = (),
    ) -> list[int]:
        """Greedy continuation of one sequence [1, T] with a KV cache; stops after an id of ``eos_ids``."""
        visual = None if pixel_values is None else self.encode_images(pixel_values)
        step: torch.Tensor = self.expand(input_ids, None, visual).inputs_embeds  # [1, L, D]
        cache, ids = None, []
        for _ in range(max_new_tokens):
            out = self.language_model(inputs_embeds=step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            ids.append(int(self.lm_head(out.last_hidden_state[:, -1]).argmax(-1)))
            if ids[-1] in eos_ids:
                break
            step = self.get_input_embeddings()(torch.tensor([[ids[-1]]], device=step.device))
        return ids
