"""A LLaMA decoder and positions -> hidden states there, with little kept and the last layer run on these rows alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb


def can_skip(decoder: nn.Module) -> bool:
    """Whether ``states_at`` can run this decoder.

    Not where layers are of another family, wrapped (LoRA), quantized, or gathered only while they run as a whole
    (FSDP2): the last layer's parts are called one by one here.
    """
    if not isinstance(decoder, LlamaModel) or decoder.config._attn_implementation != "sdpa":
        return False
    if decoder.config.attention_dropout:
        return False
    layer = decoder.layers[-1]
    if not isinstance(layer, LlamaDecoderLayer):
        return False
    parts = [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.down_proj]
    return all(type(part) is nn.Linear and type(part.weight) is nn.Parameter and part.weight.numel() for part in parts)


def states_at(decoder: LlamaModel, states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Hidden states after the final norm where ``wanted``, 0 elsewhere.

    Args:
        states: [B, L, D], what the first layer reads; right-padded, so that the causal rule alone hides padding.
        wanted: [B, L], True on the positions whose states are needed.
    """
    position = torch.arange(states.shape[1], device=states.device)[None]  # [1, L]
    turns = decoder.rotary_emb(states, position_ids=position)  # cos, sin [1, L, d]
    for layer in decoder.layers[:-1]:
        assert isinstance(layer, LlamaDecoderLayer)
        if layer.gradient_checkpointing and layer.training:
            states = layer(states, attention_mask=None, position_embeddings=turns, position_ids=position)  # [B, L, D]
            continue
        mixed, _ = layer.self_attn(layer.input_layernorm(states), position_embeddings=turns, attention_mask=None)
        states = _add_mlp(layer, states + mixed)  # [B, L, D]
    last = decoder.layers[-1]
    assert isinstance(last, LlamaDecoderLayer)
    found = decoder.norm(layer_rows(last, states, turns, wanted))  # [S, D]
    return torch.zeros_like(states).index_put(wanted.nonzero(as_tuple=True), found.to(states.dtype))  # [B, L, D]


def layer_rows(
    layer: LlamaDecoderLayer, states: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], wanted: torch.Tensor
) -> torch.Tensor:
    """One layer's output [S, D] on the wanted positions [B, L] in reading order; the others give keys and values."""
    attention, (batch, length) = layer.self_attn, wanted.shape
    sample, column = wanted.nonzero(as_tuple=True)  # [S], [S]
    slot = wanted.cumsum(1)[sample, column] - 1  # [S] a row's place among its sample's wanted rows
    rows = max(1, int(wanted.sum(1).max()))  # R
    normed = layer.input_layernorm(states)  # [B, L, D]
    keys, values = (
        part(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for part in (attention.k_proj, attention.v_proj)
    )  # [B, H_kv, L, d]
    queries = attention.q_proj(normed[sample, column]).unflatten(-1, (-1, attention.head_dim))  # [S, H, d]
    queries, _ = apply_rotary_pos_emb(queries, queries, turns[0][0, column], turns[1][0, column])
    keys, _ = apply_rotary_pos_emb(keys, keys, *turns)
    padded = queries.new_zeros(batch, rows, *queries.shape[1:]).index_put((sample, slot), queries)  # [B, R, H, d]
    at = column.new_zeros(batch, rows).index_put((sample, slot), column)  # [B, R] filler looks at the first key
    seen = torch.arange(length, device=at.device) <= at[..., None]  # [B, R, L]
    mixed = F.scaled_dot_product_attention(
        padded.transpose(1, 2),
        keys.repeat_interleave(attention.num_key_value_groups, dim=1),
        values.repeat_interleave(attention.num_key_value_groups, dim=1),
        attn_mask=seen[:, None],
        scale=attention.scaling,
    )  # [B, H, R, d]
    own = states[sample, column] + attention.o_proj(mixed.transpose(1, 2)[sample, slot].flatten(1))  # [S, D]
    return _add_mlp(layer, own)


def _add_mlp(layer: LlamaDecoderLayer, states: torch.Tensor) -> torch.Tensor:
    """The layer's second half, any shape [..., D].

    Its activation and product are made again in the backward pass, two elementwise operations, instead of kept: half of
    what the MLP would keep, a quarter of the layer's. (The checkpoint stops before the matrix product.)
    """
    mlp, normed = layer.mlp, layer.post_attention_layernorm(states)

    def out(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return mlp.down_proj(mlp.act_fn(gate) * up)

    gate, up = mlp.gate_proj(normed), mlp.up_proj(normed)  # [..., I]
    if not torch.is_grad_enabled():
        return states + out(gate, up)
    return states + checkpoint(out, gate, up, use_reentrant=False, preserve_rng_state=False)
