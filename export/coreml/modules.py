"""MobileVlm -> three modules that trace into Core ML programs: vision encoder, token embedding, stateful decoder."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from distill.models.mobilevlm import MobileVlm, selected_features
from distill.models.parts import CLIP
from distill.models.projector import LDPv2
from export.model.shape import model_shape

# Attribute paths below repeat MobileVlm's, so that the constants of a converted program carry state-dict names.


class CoreMlVision(nn.Module):
    """pixel_values [1, 3, S, S] -> visual_tokens [1, N, D]; the tower stops at the layer that the projector reads."""

    vision_tower: Any
    projector: Any

    def __init__(self, vlm: MobileVlm) -> None:
        super().__init__()
        vision: Any = vlm.config.vision_config
        self.config, self.has_class_token = vlm.config, vision.model_type == CLIP
        self.grid, self.patch, self.heads = vlm.config.patch_grid, vision.patch_size, vision.num_attention_heads
        self.width, self.positions = vision.hidden_size, self.grid * self.grid + self.has_class_token
        self.vision_tower = nn.Module()
        self.vision_tower.embeddings = patch_embeddings(vlm)
        if self.has_class_token:
            self.vision_tower.pre_layrnorm = vlm.vision_tower.pre_layrnorm
        self.vision_tower.encoder = nn.Module()
        self.vision_tower.encoder.layers = nn.ModuleList(
            list(vlm.vision_tower.encoder.layers)[: vlm.config.tower_layers]
        )
        self.projector = vlm.projector

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        layers = [partial(self.layer, layer) for layer in self.vision_tower.encoder.layers]
        features = selected_features(self.config, self.embed(pixel_values), layers)  # [1, P, D_v]
        return self.project(features) if isinstance(self.projector, LDPv2) else self.projector(features)  # [1, N, D]

    def layer(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """One layer of CLIP or SigLIP [1, S, D_v] -> [1, S, D_v]."""
        hidden = hidden + self.attend(layer.self_attn, layer.layer_norm1(hidden))
        return hidden + layer.mlp(layer.layer_norm2(hidden))

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patches by reshape and one matrix product: the Neural Engine takes no convolution of stride 14 or 16."""
        grid, patch, embeddings = self.grid, self.patch, self.vision_tower.embeddings
        size = grid * patch
        rows = pixel_values[0, :, :size, :size].reshape(3, grid, patch, grid, patch)
        patches = rows.permute(1, 3, 0, 2, 4).reshape(1, grid * grid, 3 * patch * patch)  # [1, P, 3*p*p]
        tokens = self.embed_patches(patches)  # [1, P, D_v]
        if not self.has_class_token:
            return tokens + embeddings.position_embedding.weight
        tokens = torch.cat((embeddings.class_embedding, tokens), 1)  # [1, P+1, D_v]
        return self.vision_tower.pre_layrnorm(tokens + embeddings.position_embedding.weight)

    def embed_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """[1, P, 3*p*p] -> [1, P, D_v]."""
        return self.vision_tower.embeddings.patch_embedding(patches)

    def attend(self, attention: Any, x: torch.Tensor) -> torch.Tensor:
        heads, positions = self.heads, self.positions
        shape = (1, positions, heads, self.width // heads)
        q = attention.q_proj(x).reshape(shape).transpose(1, 2)  # [1, h, S, d]
        k = attention.k_proj(x).reshape(shape).transpose(1, 2)
        v = attention.v_proj(x).reshape(shape).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [1, S, h, d]
        return attention.out_proj(out.reshape(1, positions, self.width))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """LDPv2 with constant sizes: features [1, P, D_v] -> [1, N, D]."""
        hidden = self.projector.linear_2(F.gelu(self.projector.linear_1(features)))  # [1, P, D]
        plane = hidden.transpose(1, 2).reshape(1, -1, self.grid, self.grid)  # [1, D, grid, grid]
        plane = self.projector.pool(plane)  # [1, D, pooled, pooled]
        plane = plane + self.projector.position(plane)
        return plane.flatten(2).transpose(1, 2)


def patch_embeddings(vlm: MobileVlm) -> Any:
    """The tower's embeddings with the patch convolution as a linear layer; weights are shared, not copied."""
    theirs: Any = vlm.vision_tower.embeddings
    width = vlm.config.vision_config.hidden_size
    kernel = theirs.patch_embedding.weight  # [D_v, 3, p, p]
    ours: Any = nn.Module()
    ours.patch_embedding = nn.Linear(kernel[0].numel(), width, bias=False)
    ours.patch_embedding.weight = nn.Parameter(kernel.detach().reshape(width, -1))
    ours.patch_embedding.bias = theirs.patch_embedding.bias  # CLIP has none
    if vlm.config.vision_config.model_type == CLIP:
        ours.class_embedding = nn.Parameter(theirs.class_embedding.detach().reshape(1, 1, -1))
    ours.position_embedding = theirs.position_embedding
    return ours


class CoreMlEmbedding(nn.Module):
    """input_ids [1, T] int32 -> embeddings [1, T, D]."""

    language_model: Any

    def __init__(self, vlm: MobileVlm) -> None:
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.embed_tokens = vlm.language_model.embed_tokens

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(input_ids, self.language_model.embed_tokens.weight)


class CoreMlDecoder(nn.Module):
    """inputs_embeds [1, Q, D], causal_mask [1, 1, Q, E] -> logits [1, 1, V] of the last row; E = tokens so far + Q.

    The caches k_cache, v_cache [L, kvH, context, head_dim] are buffers; the converter turns them into states.
    """

    language_model: Any
    lm_head: Any
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, vlm: MobileVlm, context_length: int) -> None:
        super().__init__()
        text, sizes = vlm.config.text_config, model_shape(vlm, context_length)
        self.heads, self.kv_heads, self.head_dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
        self.hidden, self.eps = text.hidden_size, text.rms_norm_eps
        self.language_model = nn.Module()
        self.language_model.layers = vlm.language_model.layers
        self.language_model.norm = vlm.language_model.norm
        self.lm_head = vlm.lm_head
        shape = (sizes.num_layers, self.kv_heads, context_length, self.head_dim)
        self.register_buffer("k_cache", torch.zeros(shape))
        self.register_buffer("v_cache", torch.zeros(shape))
        cos, sin = rope_tables(vlm, context_length)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, inputs_embeds: torch.Tensor, causal_mask: torch.Tensor) -> torch.Tensor:
        end = causal_mask.shape[-1]
        start = end - inputs_embeds.shape[1]
        x = inputs_embeds  # [1, Q, D]
        for index, layer in enumerate(self.language_model.layers):
            x = x + self.attend(layer.self_attn, self.norm(layer.input_layernorm, x), causal_mask, index, start, end)
            x = x + layer.mlp(self.norm(layer.post_attention_layernorm, x))
        return self.lm_head(self.norm(self.language_model.norm, x[:, -1:]))  # [1, 1, V]

    def attend(
        self, attention: Any, x: torch.Tensor, mask: torch.Tensor, index: int, start: int, end: int
    ) -> torch.Tensor:
        cos, sin = self.cos[start:end], self.sin[start:end]  # [Q, d]
        q = rotate(self.split(attention.q_proj(x), self.heads), cos, sin)  # [1, H, Q, d]
        k = rotate(self.split(attention.k_proj(x), self.kv_heads), cos, sin)  # [1, kvH, Q, d]
        self.k_cache[index : index + 1, :, start:end, :] = k
        self.v_cache[index : index + 1, :, start:end, :] = self.split(attention.v_proj(x), self.kv_heads)
        keys = self.k_cache[index : index + 1, :, :end, :]  # [1, kvH, E, d]
        values = self.v_cache[index : index + 1, :, :end, :]
        repeats = self.heads // self.kv_heads
        if repeats > 1:  # heads that share keys become more query rows: no copy of the cache
            q = q.reshape(1, self.kv_heads, -1, self.head_dim)  # [1, kvH, repeats*Q, d]
            mask = torch.cat([mask] * repeats, 2)  # [1, 1, repeats*Q, E]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        if repeats > 1:
            out = out.reshape(1, self.heads, -1, self.head_dim)  # [1, H, Q, d]
        return attention.o_proj(out.transpose(1, 2).reshape(1, -1, self.heads * self.head_dim))

    def split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.reshape(1, -1, heads, self.head_dim).transpose(1, 2)  # [1, heads, Q, d]

    def norm(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        """RMSNorm as the layer norm of (x, -x), whose mean is 0: x*x itself overflows float16 above 255."""
        mirrored = F.layer_norm(torch.cat((x, -x), -1), (2 * self.hidden,), eps=self.eps)
        return mirrored[..., : self.hidden] * norm.weight


def rope_tables(vlm: MobileVlm, context_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [context, head_dim] as the model's own rotary embedding gives them."""
    rotary = vlm.language_model.rotary_emb
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(context_length)[None])
    return cos[0], sin[0]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of x [1, heads, Q, d] by cos, sin [Q, d]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
