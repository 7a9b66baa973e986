"""A MobileVlm and a batch -> what losses need: hidden states, visual tokens, first-layer text-to-image attention."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from distill.models.mobilevlm import TEXT_KIND, VISION_KIND, Expanded, MobileVlm


@dataclass(frozen=True)
class Spans:
    """Where each image of a batch lies, and the text that follows it in the same conversation.

    Attributes:
        sample: [n], the batch row of each image.
        columns: [n, N], positions of its visual tokens.
        rows: [n, R], positions of the text after it, then filler.
        row_mask: [n, R], True on real rows.
    """

    sample: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor
    row_mask: torch.Tensor


@dataclass(frozen=True)
class Roles:
    """One model's view of a batch."""

    expanded: Expanded
    hidden: torch.Tensor  # [B, L, D] after the final norm


def look(
    vlm: MobileVlm,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    features: torch.Tensor | None,
) -> Roles:
    """Run the decoder once, without lm_head.

    Args:
        input_ids, attention_mask, labels: [B, T].
        features: tower features [n, P, D_v] of the batch's images in reading order; None for a text-only batch.
    """
    visual = None if features is None else vlm.projector(features.to(vlm.dtype))  # [n, N, D]
    expanded = vlm.expand(input_ids, attention_mask, visual, labels)
    # rows are right-padded, so the causal rule alone hides padding from real positions: no mask, SDPA's fast path
    hidden = vlm.language_model(inputs_embeds=expanded.inputs_embeds, use_cache=False).last_hidden_state
    return Roles(expanded, hidden)


def spans_of(expanded: Expanded) -> Spans:
    """Read the spans off the kinds of the expanded positions; batches may mix rows with and without images."""
    kinds = expanded.kinds  # [B, L]
    images, per_image = expanded.visual_tokens.shape[:2] if expanded.visual_tokens is not None else (0, 1)
    at = (kinds == VISION_KIND).nonzero().view(images, per_image, 2)  # reading order
    sample, columns = at[:, 0, 0], at[:, :, 1]  # [n], [n, N]
    position = torch.arange(kinds.shape[1], device=kinds.device)
    after = (kinds[sample] == TEXT_KIND) & (position > columns[:, -1:])  # [n, L]
    longest = int(after.sum(1).max()) if images else 0
    rows = after.long().argsort(dim=1, descending=True, stable=True)[:, :longest]  # [n, R] real rows first
    return Spans(sample, columns, rows, after.gather(1, rows))


def text_to_image_attention(vlm: MobileVlm, expanded: Expanded, spans: Spans) -> torch.Tensor:
    """The first layer's softmax attention, text rows x vision columns [n, H, R, N], computed from its q and k alone.

    The softmax runs over every key that a row sees (causal, no padding); only then is the image cut out.
    """
    layer, embeds = vlm.language_model.layers[0], expanded.inputs_embeds  # [B, L, D]
    assert isinstance(layer, LlamaDecoderLayer)
    attention = layer.self_attn
    normed = layer.input_layernorm(embeds)  # [B, L, D]
    position = torch.arange(embeds.shape[1], device=embeds.device)[None]  # [1, L]
    cos, sin = vlm.language_model.rotary_emb(embeds, position_ids=position)  # [1, L, d]
    image = torch.arange(len(spans.sample), device=embeds.device)[:, None]  # [n, 1]
    q = _heads(attention.q_proj(normed[spans.sample[:, None], spans.rows]), attention.head_dim)  # [n, H, R, d]
    k = _heads(attention.k_proj(normed), attention.head_dim)  # [B, H_kv, L, d]
    q, _ = apply_rotary_pos_emb(q, q, cos[0][spans.rows], sin[0][spans.rows])
    k, _ = apply_rotary_pos_emb(k, k, cos, sin)
    k = k.repeat_interleave(attention.num_key_value_groups, dim=1)[spans.sample]  # [n, H, L, d]
    scores = (q @ k.transpose(-1, -2)).float() * attention.scaling  # [n, H, R, L]
    unseen = position[:, None] > spans.rows[..., None]  # [n, R, L]; padding lies to the right of every real row
    weights = scores.masked_fill(unseen[:, None], float("-inf")).softmax(-1)  # [n, H, R, L]
    return weights.transpose(1, 3)[image, spans.columns].transpose(1, 3)  # [n, H, R, N]


def supervised_rows(roles: Roles) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [S, D] of the positions whose next token is a label, and those labels [S]."""
    labels = roles.expanded.labels
    assert labels is not None
    targets = labels[:, 1:]
    kept = targets != -100  # [B, L - 1]
    return roles.hidden[:, :-1][kept], targets[kept]


def tower_hash(vlm: MobileVlm) -> str:
    """SHA-256 over the tower's weights and the layer that is read: equal hashes give equal features."""
    digest = hashlib.sha256(str(vlm.config.vision_select_layer).encode())
    for name, tensor in sorted(vlm.vision_tower.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def unused_tower_parameters(vlm: MobileVlm) -> list[nn.Parameter]:
    """Parameters of the tower behind the hidden state that is read: they never get a gradient."""
    tower = vlm.vision_tower
    behind = [p for layer in tower.encoder.layers[vlm.config.tower_layers :] for p in layer.parameters()]
    return behind + list(tower.post_layernorm.parameters())


def _heads(states: torch.Tensor, head_dim: int) -> torch.Tensor:
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # [b, L, H*d] -> [b, H, L, d]
