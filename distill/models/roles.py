"""A MobileVlm and a batch -> what losses need: hidden states, visual tokens, first-layer text-to-image attention."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from distill.models.last_layer import can_skip, states_at
from distill.models.mobilevlm import PADDING_KIND, TEXT_KIND, VISION_KIND, Expanded, MobileVlm


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
    hidden: torch.Tensor  # [B, L, D] after the final norm; [B, 0, D] where no layer was run
    layer_inputs: tuple[torch.Tensor, ...]  # [B, L, D] what decoder layer 0, or every layer, reads


def look(
    vlm: MobileVlm,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    visual_tokens: torch.Tensor | None,
    every_layer: bool = False,
    mask: str = "all",
) -> Roles:
    """Run the decoder once, without lm_head.

    Args:
        input_ids, attention_mask, labels: [B, T].
        visual_tokens: [n, N, D] of the batch's images in reading order; None for a text-only batch.
        every_layer: keep the input of every decoder layer, not of the first alone.
        mask: of ``predicting_rows``: hidden states of other positions may be left 0; "none" leaves all of them out and
            runs no decoder layer.
    """
    expanded = vlm.expand(input_ids, attention_mask, visual_tokens, labels)
    decoder, embedded = vlm.language_model, expanded.inputs_embeds
    if mask == "none":
        return Roles(expanded, embedded.new_zeros(len(embedded), 0, embedded.shape[-1]), (embedded,))
    if mask != "all" and not every_layer and can_skip(decoder):
        wanted = F.pad(predicting(expanded, mask), (0, 1))  # [B, L]
        return Roles(expanded, states_at(decoder, embedded, wanted), (embedded,))
    # rows are right-padded, so the causal rule alone hides padding from real positions: no mask, SDPA's fast path
    output = vlm.language_model(inputs_embeds=expanded.inputs_embeds, use_cache=False, output_hidden_states=every_layer)
    inputs = output.hidden_states[:-1] if every_layer else (expanded.inputs_embeds,)
    return Roles(expanded, output.last_hidden_state, inputs)


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


def text_to_image_attention(vlm: MobileVlm, roles: Roles, spans: Spans, layer: int = 0) -> torch.Tensor:
    """One layer's softmax attention, text rows x vision columns [n, H, R, N], computed from its q and k alone.

    The softmax runs over every key that a row sees (causal, no padding); only then is the image cut out.
    """
    weights = attention_rows(vlm, roles.layer_inputs[layer], spans.sample, spans.rows, layer)  # [n, H, R, L]
    image = torch.arange(len(spans.sample), device=weights.device)[:, None]  # [n, 1]
    return weights.transpose(1, 3)[image, spans.columns].transpose(1, 3)  # [n, H, R, N]


def attention_rows(
    vlm: MobileVlm, states: torch.Tensor, sample: torch.Tensor, rows: torch.Tensor, layer: int = 0
) -> torch.Tensor:
    """Some rows of one layer's softmax attention [n, H, R, L].

    Args:
        states: [B, L, D], the layer's input; right-padded.
        sample: [n], the batch row that each entry looks at.
        rows: [n, R], query positions.
    """
    block = vlm.language_model.layers[layer]  # of LLaMA or Qwen2: their names are the same
    attention = block.self_attn
    normed = block.input_layernorm(states)  # [B, L, D]
    position = torch.arange(states.shape[1], device=states.device)[None]  # [1, L]
    cos, sin = vlm.language_model.rotary_emb(states, position_ids=position)  # [1, L, d]
    q = _heads(attention.q_proj(normed[sample[:, None], rows]), attention.head_dim)  # [n, H, R, d]
    k = _heads(attention.k_proj(normed), attention.head_dim)  # [B, H_kv, L, d]
    q, _ = apply_rotary_pos_emb(q, q, cos[0][rows], sin[0][rows])
    k, _ = apply_rotary_pos_emb(k, k, cos, sin)
    k = k.repeat_interleave(attention.num_key_value_groups, dim=1)[sample]  # [n, H, L, d]
    scores = (q @ k.transpose(-1, -2)).float() * attention.scaling  # [n, H, R, L]
    unseen = position[:, None] > rows[..., None]  # [n, R, L]; padding lies to the right of every real row
    if (window := sliding_window(vlm, layer)) is not None:
        unseen = unseen | (position[:, None] <= rows[..., None] - window)
    return scores.masked_fill(unseen[:, None], float("-inf")).softmax(-1)


def sliding_window(vlm: MobileVlm, layer: int) -> int | None:
    """How many keys a row of this decoder layer sees, itself included; None where it sees all before it."""
    config = vlm.config.text_config
    if not isinstance(config, Qwen2Config) or config.layer_types is None:
        return None
    return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None


def predicting_rows(roles: Roles, mask: str = "answer") -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that predict something a loss looks at.

    Args:
        mask: "answer": the next token is supervised; "answer+vision": and every visual token; "all": every real
            position that has a next one.

    Returns:
        Hidden states [S, D], and the supervised next tokens [S], -100 where the next token is not supervised.
    """
    kept, labels = predicting(roles.expanded, mask), roles.expanded.labels
    assert labels is not None
    return roles.hidden[:, :-1][kept], labels[:, 1:][kept]


def predicting(expanded: Expanded, mask: str) -> torch.Tensor:
    """[B, L - 1], True on the positions that ``predicting_rows`` keeps."""
    labels, kinds = expanded.labels, expanded.kinds
    assert labels is not None
    kept = labels[:, 1:] != -100
    if mask == "answer+vision":
        return kept | (kinds[:, :-1] == VISION_KIND)
    return kinds[:, 1:] != PADDING_KIND if mask == "all" else kept


def tower_hash(vlm: MobileVlm, dtype: torch.dtype = torch.float32) -> str:
    """SHA-256 over the tower's weights and what is read of it: equal hashes give equal features of equal pixels.

    ``dtype``: hash the weights as they would be held in it, to compare with a tower that is.
    """
    config = vlm.config
    digest = hashlib.sha256(f"{config.vision_config.model_type} {config.tower_states}".encode())
    digest.update(config.vision_select_strategy.encode())
    for name, tensor in sorted(vlm.vision_tower.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to(dtype).float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def unused_tower_parameters(vlm: MobileVlm) -> list[nn.Parameter]:
    """Parameters of the tower behind the hidden state that is read: they never get a gradient."""
    tower = vlm.vision_tower
    behind = [p for layer in tower.encoder.layers[vlm.config.tower_layers :] for p in layer.parameters()]
    head = [p for name, p in tower.named_parameters() if name.startswith("head.")]  # SigLIP's pooling
    return behind + list(tower.post_layernorm.parameters()) + head


def _heads(states: torch.Tensor, head_dim: int) -> torch.Tensor:
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # [b, L, H*d] -> [b, H, L, d]
