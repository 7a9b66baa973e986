"""Model and conversations -> states of the decoder layer by layer, and logits where it answers; weights are read once.

As in golden_lockstep.py, all conversations go through a layer before the next is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from export.model.streamed import LoadedModel
from export.quantize.calibration import Conversation

IMAGES_TOGETHER = 8  # 577 rows of 1024 each: activations of some 100 MB


@torch.no_grad()
def decoder_inputs(model: LoadedModel, conversations: Sequence[Conversation]) -> list[torch.Tensor]:
    """What the decoder is fed [1, L, D] for each conversation."""
    images = [one.pixels for one in conversations if one.pixels is not None]
    encoded = [model.vlm.encode_images(torch.cat(images[at : at + IMAGES_TOGETHER])) for at in _starts(images)]
    features = iter(torch.cat(encoded) if encoded else ())  # of [N, D]
    image_id, table = model.vlm.image_token_id, model.vlm.get_input_embeddings()
    flat = torch.tensor([token for one in conversations for token in one.ids if token != image_id])
    text = iter(table(flat[None])[0].split([sum(token != image_id for token in one.ids) for one in conversations]))
    rows = []
    for one in conversations:
        embedded = next(text)  # [T, D]
        if one.pixels is not None:
            at = one.ids.index(image_id)
            embedded = torch.cat([embedded[:at], next(features), embedded[at:]])  # [T + N, D]
        rows.append(embedded[None])
    return rows


def _starts(images: Sequence[torch.Tensor]) -> range:
    return range(0, len(images), IMAGES_TOGETHER)


@torch.no_grad()
def through_layer(model: LoadedModel, number: int, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """States [1, L, D] of each conversation before one decoder layer -> after it."""
    language = model.vlm.language_model
    layer: nn.Module = language.layers[number]
    after = []
    with model.held(layer):
        for x in states:
            at = torch.arange(x.shape[1])[None]  # [1, L]
            # no mask: the attention of one whole sequence is causal by itself
            after.append(layer(x, position_ids=at, position_embeddings=language.rotary_emb(x, at)))
    return after


@torch.no_grad()
def answer_rows(
    model: LoadedModel, states: Sequence[torch.Tensor], conversations: Sequence[Conversation]
) -> torch.Tensor:
    """Last states -> rows that the head is fed where the model answers [A, D], all conversations one after another."""
    norm = model.vlm.language_model.norm
    return torch.cat([norm(x[0, one.answered]) for x, one in zip(states, conversations, strict=True)])


@torch.no_grad()
def answer_logits(
    model: LoadedModel, states: Sequence[torch.Tensor], conversations: Sequence[Conversation]
) -> torch.Tensor:
    """Last states -> logits of the answer tokens [A, V]."""
    return model.vlm.lm_head(answer_rows(model, states, conversations))
