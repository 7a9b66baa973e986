"""MobileVlm -> vision encoder and decoder for the Neural Engine: static sizes, channels first, 1x1 convolutions.

Activations are [1, channels, 1, rows]. Attribute paths repeat MobileVlm's, as in coreml_modules.py; a weight that is
kept in another layout than the checkpoint's is named in ``layouts``.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bundle.errors import UsageError
from distill.models.mobilevlm import MobileVlm
from distill.models.parts import CLIP
from distill.models.projector import LDPv2
from export.coreml.layout import Layout
from export.model.shape import model_shape

UNIT = 32  # float16 values of 64 bytes, in which the engine stores the last axis and wants the sizes of states
MOST_CHANNELS = 16384  # of a convolution's result
ROOT_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm")
MASKED = -1e4  # float16 holds it, and its exponential is 0


class Pointwise(nn.Module):
    """A linear layer, or a convolution without overlap, as a 1x1 convolution: [1, C, 1, S] -> [1, K, 1, S]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().reshape(weight.shape[0], -1, 1, 1))
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, self.bias)


class ChannelNorm(nn.Module):
    """A layer norm over axis 1 of [1, C, 1, S]."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().reshape(1, -1, 1, 1))
        self.bias = nn.Parameter(norm.bias.detach().reshape(1, -1, 1, 1))
        self.eps = norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalised(x, self.eps) * self.weight + self.bias


class RootNorm(nn.Module):
    """RMSNorm over axis 1 as the layer norm of (x, -x), whose mean is 0: x*x itself overflows float16 above 255."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().reshape(1, -1, 1, 1))
        self.channels, self.eps = norm.weight.numel(), norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalised(torch.cat((x, -x), 1), self.eps)[:, : self.channels] * self.weight


def normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / deviation over axis 1, in the steps that coremltools turns into one layer_norm."""
    centred = x - x.mean(1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(1, keepdim=True) + eps)


def channels_first(module: nn.Module) -> nn.Module:
    """A copy of a part of the model for [1, C, 1, S]: other linear layers and norms, the same parameters."""
    copied = deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    for name, part in list(copied.named_modules()):
        other: nn.Module | None = None
        if isinstance(part, nn.Linear):
            other = Pointwise(part.weight, part.bias)
        elif isinstance(part, nn.LayerNorm):
            other = ChannelNorm(part)
        elif type(part).__name__ in ROOT_NORMS:
            other = RootNorm(part)
        if other is not None and part is copied:
            return other
        if other is not None:
            copied.set_submodule(name, other)
    return copied


class AneVision(nn.Module):
    """pixel_values [1, 3, S, S] -> visual_tokens [1, N, D].

    The tower's rows are the P patches, then the class token, then padding that no row attends to, up to a whole UNIT.
    """

    vision_tower: Any
    projector: Any
    key_mask: torch.Tensor

    def __init__(self, vlm: MobileVlm) -> None:
        super().__init__()
        vision: Any = vlm.config.vision_config
        self.config, self.has_class_token = vlm.config, vision.model_type == CLIP
        self.grid, self.patch, self.heads = vlm.config.patch_grid, vision.patch_size, vision.num_attention_heads
        self.width, self.patches = vision.hidden_size, vlm.config.patch_grid**2
        self.rows = self.patches + self.has_class_token
        self.padding = -self.rows % UNIT
        theirs: Any = vlm.vision_tower
        self.vision_tower = nn.Module()
        self.vision_tower.embeddings = self._embeddings(theirs.embeddings)
        if self.has_class_token:
            self.vision_tower.pre_layrnorm = channels_first(theirs.pre_layrnorm)
        self.vision_tower.encoder = nn.Module()
        read = nn.ModuleList(list(theirs.encoder.layers)[: vlm.config.tower_layers])
        self.vision_tower.encoder.layers = channels_first(read)
        self.projector = channels_first(vlm.projector)
        mask = torch.zeros(1, 1, 1, self.rows + self.padding)
        mask[..., self.rows :] = MASKED
        self.register_buffer("key_mask", mask)

    @property
    def layouts(self) -> dict[str, Layout]:
        """Parameter -> where it comes from, unless it is the weight of its own name."""
        table = "vision_tower.embeddings.position_embedding.weight"
        return {table: Layout(table, channels_first=True, first_last=self.has_class_token)}

    def _embeddings(self, theirs: Any) -> Any:
        ours: Any = nn.Module()
        ours.patch_embedding = Pointwise(theirs.patch_embedding.weight, theirs.patch_embedding.bias)
        if self.has_class_token:
            ours.class_embedding = nn.Parameter(theirs.class_embedding.detach().reshape(1, -1, 1, 1))
        ours.position_embedding = nn.Module()
        (layout,) = self.layouts.values()
        ours.position_embedding.weight = nn.Parameter(layout.stored(theirs.position_embedding.weight.detach()))
        return ours

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        read = [self.embed(pixel_values)]  # of [1, D_v, 1, S]
        for layer in self.vision_tower.encoder.layers:
            hidden = read[-1] + self.attend(layer.self_attn, layer.layer_norm1(read[-1]))
            read.append(hidden + layer.mlp(layer.layer_norm2(hidden)))
        features = torch.cat([read[number] for number in self.config.tower_states], 1)
        return self.project(self.select(features))  # [1, N, D]

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patches by reshape and a 1x1 convolution: a stride of 14 or 16 is none of the engine's."""
        grid, patch, embeddings = self.grid, self.patch, self.vision_tower.embeddings
        size = grid * patch
        pieces = pixel_values[0, :, :size, :size].reshape(3, grid, patch, grid, patch)
        pieces = pieces.permute(0, 2, 4, 1, 3).reshape(1, 3 * patch * patch, 1, self.patches)
        rows = embeddings.patch_embedding(pieces)  # [1, D_v, 1, P]
        if self.has_class_token:
            rows = torch.cat((rows, embeddings.class_embedding), 3)  # [1, D_v, 1, P+1]
        rows = rows + embeddings.position_embedding.weight
        if self.padding:
            rows = F.pad(rows, (0, self.padding))  # [1, D_v, 1, S]
        return self.vision_tower.pre_layrnorm(rows) if self.has_class_token else rows

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """Rows [1, C, 1, S] as the tower has them, class token first, and of these what the projector reads."""
        dropped = int(self.config.vision_select_strategy == "default")
        if not self.has_class_token or dropped:
            return states[..., dropped - self.has_class_token : self.patches]
        return torch.cat((states[..., self.patches : self.rows], states[..., : self.patches]), 3)

    def attend(self, attention: Any, x: torch.Tensor) -> torch.Tensor:
        head = self.width // self.heads
        split = (1, self.heads, head, self.rows + self.padding)
        q = (attention.q_proj(x) * head**-0.5).reshape(split)  # [1, h, d, S]
        k, v = attention.k_proj(x).reshape(split), attention.v_proj(x).reshape(split)
        seen = []
        for at in range(self.heads):
            scores = q[:, at : at + 1].transpose(2, 3) @ k[:, at : at + 1] + self.key_mask  # [1, 1, S, S]
            seen.append(v[:, at : at + 1] @ scores.softmax(-1).transpose(2, 3))  # [1, 1, d, S]
        return attention.out_proj(torch.cat(seen, 1).reshape(1, self.width, 1, -1))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """features [1, C, 1, P] -> [1, N, D]."""
        if not isinstance(self.projector, LDPv2):
            return self.projector(features)[:, :, 0].transpose(1, 2)
        hidden = self.projector.linear_2(F.gelu(self.projector.linear_1(features)))  # [1, D, 1, P]
        plane = self.projector.pool(hidden.reshape(1, -1, self.grid, self.grid))  # [1, D, pooled, pooled]
        plane = plane + self.projector.position(plane)
        return plane.flatten(2).transpose(1, 2)


class AneDecoder(nn.Module):
    """Q rows at a place in the cache -> logits [1, 1, V] of one of them; every size is fixed.

    Inputs: inputs_embeds [1, Q, D]; position [1], place of the first row; cos, sin [1, 1, Q, d] of the rows' places;
    causal_mask [1, 1, Q, C], added to the scores; last_row [1, 1, 1, Q], 1 at the row whose logits are asked for and 0
    elsewhere. Rows behind it are padding: they fill cache rows that are written again before any row sees them.
    The caches k_cache, v_cache [L, kvH, C, d] are buffers; the converter turns them into states.
    """

    language_model: Any
    lm_head: Any
    k_cache: torch.Tensor
    v_cache: torch.Tensor

    def __init__(self, vlm: MobileVlm, cache_rows: int, rows: int) -> None:
        super().__init__()
        sizes = model_shape(vlm, cache_rows)
        self.rows, self.heads, self.kv_heads, self.head_dim = rows, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
        self.language_model = nn.Module()
        self.language_model.layers = channels_first(vlm.language_model.layers)
        self.language_model.norm = channels_first(vlm.language_model.norm)
        self.lm_head = nn.Module()
        self.parts = head_parts(sizes.vocab_size)
        for part, (first, last) in self.parts.items():
            setattr(self.lm_head, part, Pointwise(vlm.lm_head.weight[first:last], None))
        shape = (sizes.num_layers, self.kv_heads, cache_rows, self.head_dim)
        self.register_buffer("k_cache", torch.zeros(shape))
        self.register_buffer("v_cache", torch.zeros(shape))

    @property
    def layouts(self) -> dict[str, Layout]:
        """Parameter -> where it comes from, unless it is the weight of its own name."""
        return {f"lm_head.{part}.weight": Layout("lm_head.weight", rows) for part, rows in self.parts.items()}

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        causal_mask: torch.Tensor,
        last_row: torch.Tensor,
    ) -> torch.Tensor:
        start = position[0]
        x = inputs_embeds.transpose(1, 2)[:, :, None]  # [1, D, 1, Q]
        for index, layer in enumerate(self.language_model.layers):
            normed = layer.input_layernorm(x)
            x = x + self.attend(layer.self_attn, normed, index, start, cos, sin, causal_mask)
            x = x + feed_forward(layer.mlp, layer.post_attention_layernorm(x))
        row = self.language_model.norm((x * last_row).sum(-1, keepdim=True))  # [1, D, 1, 1]
        logits = [getattr(self.lm_head, part)(row).reshape(1, 1, -1) for part in self.parts]
        return torch.cat(logits, -1)  # [1, 1, V]

    def attend(
        self,
        attention: Any,
        x: torch.Tensor,
        index: int,
        start: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        q = turned(self.split(attention.q_proj(x), self.heads), cos, sin) * self.head_dim**-0.5  # [1, H, Q, d]
        k = turned(self.split(attention.k_proj(x), self.kv_heads), cos, sin)  # [1, kvH, Q, d]
        end = start + self.rows
        self.k_cache[index : index + 1, :, start:end, :] = k
        self.v_cache[index : index + 1, :, start:end, :] = self.split(attention.v_proj(x), self.kv_heads)
        keys, values = self.k_cache[index : index + 1], self.v_cache[index : index + 1]  # [1, kvH, C, d]
        seen = []
        for head in range(self.heads):
            at = head // (self.heads // self.kv_heads)
            scores = q[:, head : head + 1] @ keys[:, at : at + 1].transpose(2, 3) + mask  # [1, 1, Q, C]
            seen.append(scores.softmax(-1) @ values[:, at : at + 1])  # [1, 1, Q, d]
        rows = torch.cat(seen, 1).transpose(2, 3)  # [1, H, d, Q]
        return attention.o_proj(rows.reshape(1, self.heads * self.head_dim, 1, self.rows))

    def split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """[1, heads*d, 1, Q] -> [1, heads, Q, d]."""
        return x.reshape(1, heads, self.head_dim, self.rows).transpose(2, 3)


def feed_forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """LLaMA's gated layers; in this order coremltools finds no silu in them, which the engine does not have."""
    gate = mlp.gate_proj(x)
    return mlp.down_proj(gate * (torch.sigmoid(gate) * mlp.up_proj(x)))


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of x [1, heads, Q, d] by cos, sin [1, 1, Q, d]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def head_parts(vocab_size: int) -> dict[str, tuple[int, int]]:
    """Name -> first and last row of each part of lm_head: as few as the engine takes, whole units but for the last."""
    count = -(-vocab_size // MOST_CHANNELS)
    size = -(-vocab_size // (count * UNIT)) * UNIT
    return {f"part_{at}": (at * size, min((at + 1) * size, vocab_size)) for at in range(count)}


def refuse_for_engine(vlm: MobileVlm) -> None:
    """Raise when the Neural Engine would not take the model's sizes.

    Raises:
        UsageError: a decoder with another activation than SiLU, or heads that are no multiple of 32 wide.
    """
    config, width = vlm.config, model_shape(vlm, 1).head_dim
    if width % UNIT:
        raise UsageError(
            f"--engine ane: the decoder's heads are {width} wide and the Neural Engine wants states in multiples of "
            f"{UNIT}; use --engine gpu"
        )
    if config.text_config.hidden_act != "silu":
        raise UsageError(
            f"--engine ane: activation '{config.text_config.hidden_act}' of the decoder is not supported; supported: "
            "silu; use --engine gpu"
        )
    if "silu" in (config.vision_config.hidden_act, config.projector_activation):
        raise UsageError("--engine ane: the Neural Engine has no silu, as tower or projector want it; use --engine gpu")
