"""MobileVlm -> three modules that torch.export and ExecuTorch take: vision_encoder, token_embedding, text_decoder."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer

from distill.models.mobilevlm import MobileVlm, selected_features
from distill.models.parts import CLIP
from distill.models.projector import LDPv2


class TanhGelu(nn.Module):
    """GELU by tanh, as 0.5 (1 + tanh u) = sigmoid(2 u): XNNPACK takes gelu's ``approximate="tanh"`` for the exact one.

    Seen with ExecuTorch 1.4.1, whose GeluVisitor drops the argument: visual tokens of a SigLIP off by 1.6e-4.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(TWO_ROOT_TWO_OVER_PI * x * (1 + 0.044715 * (x * x)))


TWO_ROOT_TWO_OVER_PI = 2 * math.sqrt(2 / math.pi)


def activation_of(name: str) -> nn.Module:
    """An activation by its name in configs."""
    return TanhGelu() if name == "gelu_pytorch_tanh" else ACT2FN[name]


class VisionEncoder(nn.Module):
    """pixel_values [1, 3, S, S] float32 -> visual tokens [1, N, D]."""

    def __init__(self, vlm: MobileVlm) -> None:
        super().__init__()
        tower, self.config = vlm.vision_tower, vlm.config
        self.has_class_token = vlm.config.vision_config.model_type == CLIP
        self.embeddings = tower.embeddings
        self.pre_norm = tower.pre_layrnorm if self.has_class_token else nn.Identity()
        self.layers = nn.ModuleList(VisionLayer(layer) for layer in tower.encoder.layers[: vlm.config.tower_layers])
        self.projector: Any = vlm.projector
        self.activation = activation_of(vlm.config.projector_activation)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The tower up to the selected layers, then the projector."""
        states = self.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [1, P, D_v]
        if self.has_class_token:
            first = self.embeddings.class_embedding.reshape(1, 1, -1)  # [1, 1, D_v]
            states = torch.cat([first, states], dim=1)  # [1, P+1, D_v]
        states = self.pre_norm(states + self.embeddings.position_embedding.weight[None])
        features = selected_features(self.config, states, list(self.layers))  # [1, P, D_v]
        if isinstance(self.projector, LDPv2):
            return self._pooled(self.projector, features)
        first, *others = self.projector.linears  # LLaVA's: patch by patch
        tokens = first(features)  # [1, P, D]
        for linear in others:
            tokens = linear(self.activation(tokens))
        return cast(torch.Tensor, tokens)

    def _pooled(self, projector: LDPv2, features: torch.Tensor) -> torch.Tensor:
        grid = self.config.patch_grid
        hidden = nn.functional.gelu(projector.linear_1(features))  # [1, P, D]
        plane = projector.linear_2(hidden).transpose(1, 2).reshape(1, -1, grid, grid)  # [1, D, grid, grid]
        # AdaptiveAvgPool2d(grid // 2), which ExecuTorch lacks: bins of 2 at stride 2, of 3 when the grid is odd
        plane = nn.functional.avg_pool2d(plane, kernel_size=2 + grid % 2, stride=2)  # [1, D, grid//2, grid//2]
        plane = plane + projector.position(plane)
        return plane.flatten(2).transpose(1, 2)  # [1, N, D]


class VisionLayer(nn.Module):
    """One layer of CLIP or SigLIP [1, P, D_v] -> [1, P, D_v] with attention written as two batched products.

    scaled_dot_product_attention would decompose into the safe softmax (eq -inf, any, where), which XNNPACK refuses.
    """

    def __init__(self, source: CLIPEncoderLayer | SiglipEncoderLayer) -> None:
        super().__init__()
        self.source = source
        self.activation = activation_of(source.mlp.config.hidden_act)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states + self._attend(self.source.self_attn, self.source.layer_norm1(states))
        mlp = self.source.mlp
        return states + mlp.fc2(self.activation(mlp.fc1(self.source.layer_norm2(states))))

    @staticmethod
    def _attend(attention: CLIPAttention | SiglipAttention, states: torch.Tensor) -> torch.Tensor:
        length, heads, width = states.shape[1], attention.num_heads, attention.head_dim

        def split(rows: torch.Tensor) -> torch.Tensor:
            return rows.view(length, heads, width).transpose(0, 1)  # [H, P, d]

        query = split(attention.q_proj(states) * attention.scale)
        weights = torch.bmm(query, split(attention.k_proj(states)).transpose(1, 2)).softmax(-1)  # [H, P, P]
        mixed = torch.bmm(weights, split(attention.v_proj(states)))  # [H, P, d]
        return cast(torch.Tensor, attention.out_proj(mixed.transpose(0, 1).reshape(1, length, -1)))  # [1, P, D_v]


class TokenEmbedding(nn.Module):
    """input_ids [1, T] int64 -> embeddings [1, T, D]."""

    def __init__(self, vlm: MobileVlm, context_length: int) -> None:
        super().__init__()
        self.context_length = context_length
        self.embed_tokens = vlm.language_model.embed_tokens

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        # without the layer's padding_idx, which ExecuTorch's fusion into embedding_byte does not know
        return nn.functional.embedding(input_ids, self.embed_tokens.weight).float()  # float16 rows leave as float32


class TextDecoder(nn.Module):
    """inputs_embeds [1, T, D], start position [1] int64 -> logits of the last row [1, V]; K and V stay inside.

    Args:
        vlm: the model whose decoder and head are used.
        context_length: rows of the KV cache.
    """

    def __init__(self, vlm: MobileVlm, context_length: int) -> None:
        super().__init__()
        self.context_length, self.width = context_length, vlm.config.text_config.hidden_size
        self.layers = nn.ModuleList(TextLayer(layer, context_length) for layer in vlm.language_model.layers)
        self.norm = vlm.language_model.norm
        self.lm_head = vlm.lm_head
        positions = torch.arange(context_length)[None]  # [1, C]
        cos, sin = vlm.language_model.rotary_emb(torch.zeros(1), positions)  # [1, C, d], its two halves equal
        half = cos.shape[-1] // 2
        self.cos = nn.Buffer(cos[:, :, None, :half].contiguous(), persistent=False)  # [1, C, 1, d/2]
        self.sin = nn.Buffer(sin[:, :, None, :half].contiguous(), persistent=False)

    def forward(self, inputs_embeds: torch.Tensor, start_position: torch.Tensor) -> torch.Tensor:
        start, length = cast(int, start_position[0].item()), inputs_embeds.shape[1]
        torch._check(start >= 0)
        torch._check(start + length <= self.context_length)
        cos = self.cos.narrow(1, start, length)  # [1, T, 1, d/2]
        sin = self.sin.narrow(1, start, length)
        states = inputs_embeds
        for layer in self.layers:
            states = layer(states, start, cos, sin)
        return cast(torch.Tensor, self.lm_head(rms_norm(states[:, -1], self.norm)))


class TextLayer(nn.Module):
    """One layer of LLaMA or Qwen2 [1, T, D] -> [1, T, D] that owns its K and V cache [1, C, H_kv, d], float32."""

    def __init__(self, source: LlamaDecoderLayer | Qwen2DecoderLayer, context_length: int) -> None:
        super().__init__()
        self.source = source
        config = source.self_attn.config
        self.heads, self.width = config.num_attention_heads, source.self_attn.head_dim
        self.kv_heads = config.num_key_value_heads or self.heads
        self.activation = activation_of(config.hidden_act)
        rows = (1, context_length, self.kv_heads, self.width)
        self.k_cache, self.v_cache = (nn.Buffer(torch.zeros(rows), persistent=False) for _ in range(2))

    def forward(self, states: torch.Tensor, start: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        states = states + self._attend(rms_norm(states, self.source.input_layernorm), start, cos, sin)
        hidden, mlp = rms_norm(states, self.source.post_attention_layernorm), self.source.mlp
        return states + mlp.down_proj(self.activation(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))

    def _attend(self, states: torch.Tensor, start: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        attention, length = self.source.self_attn, states.shape[1]
        query = rotate(attention.q_proj(states).view(1, length, self.heads, self.width), cos, sin)  # [1, T, H, d]
        key = rotate(attention.k_proj(states).view(1, length, self.kv_heads, self.width), cos, sin)  # [1, T, H_kv, d]
        value = attention.v_proj(states).view(1, length, self.kv_heads, self.width)
        torch.ops.llama.update_cache(key, self.k_cache, start)
        torch.ops.llama.update_cache(value, self.v_cache, start)
        # causal from `start`: rows of an earlier sequence beyond start + T are never read, so position 0 is a reset
        mixed = torch.ops.llama.custom_sdpa(query, self.k_cache, self.v_cache, start, None, 0.0, True)  # [1, T, H, d]
        return cast(torch.Tensor, attention.o_proj(mixed.reshape(1, length, -1)))


def rms_norm(states: torch.Tensor, norm: LlamaRMSNorm | Qwen2RMSNorm) -> torch.Tensor:
    """The decoders' norm over the last axis in products that XNNPACK takes (``pow`` stays outside of it)."""
    mean_square = (states * states).mean(-1, keepdim=True)
    return states * torch.rsqrt(mean_square + norm.variance_epsilon) * norm.weight


def rotate(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of rows [1, T, H, d] by cos and sin [1, T, 1, d/2], halves layout."""
    first, second = rows.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
