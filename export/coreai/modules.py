"""Core ML's modules -> those of Core AI: inputs and outputs of Apple's VLM runner, weights as integers and scales."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bundle.runtimes.coreml_inputs import MASKED
from export.coreai.weights import FloatDtype, PackedWeight
from export.coreml.modules import CoreMlDecoder, CoreMlEmbedding, CoreMlVision

LOGICAL: dict[int, torch.dtype] = {4: torch.int4, 8: torch.int8}  # type: ignore[attr-defined]


class CoreAiVision(CoreMlVision):
    """pixel_values [1, 3, S, S] float32 -> image_features [1, N, D] in the type of the weights."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return super().forward(pixel_values.to(self.vision_tower.embeddings.position_embedding.weight.dtype))

    def embed_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """SigLIP's in two pieces: coreai-core 1.0.0b3 makes a bias and the positions that are added behind it one
        constant, which is neither; it does not do so across a concatenation, which CLIP's class token is as well."""
        embed = self.vision_tower.embeddings.patch_embedding
        return embed(patches) if embed.bias is None else torch.cat((embed(patches[:, :1]), embed(patches[:, 1:])), 1)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """LDPv2: features [1, P, D_v] -> [1, N, D]; the converter has no adaptive pooling to a single token."""
        hidden = self.projector.linear_2(F.gelu(self.projector.linear_1(features)))  # [1, P, D]
        plane = hidden.transpose(1, 2).reshape(1, -1, self.grid, self.grid)  # [1, D, grid, grid]
        plane = F.avg_pool2d(plane, kernel_size=2 + self.grid % 2, stride=2)  # [1, D, pooled, pooled]
        plane = plane + self.projector.position(plane)
        return plane.flatten(2).transpose(1, 2)


class CoreAiEmbedding(CoreMlEmbedding):
    """input_ids [1, T] int32 -> embeddings [1, T, D]."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.language_model.embed_tokens(input_ids)


class CoreAiDecoder(CoreMlDecoder):
    """inputs_embeds [1, Q, D], position_ids [1, E] -> logits [1, 1, V] of the last row; E = tokens so far + Q.

    Positions are 0 to E - 1, the second input of Apple's runner. That one makes room for the logits of all Q rows; but
    with a dynamic size in the output, coreai-core 1.0.0b3 makes of decoders of two layers a program that fails when it
    is called ("coreai.slice: Expected tensor input at index 0"), whatever operation comes last.
    """

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        start = position_ids.shape[1] - inputs_embeds.shape[1]
        columns = position_ids[0]  # [E]
        hidden = columns[None] > columns[start:, None]  # [Q, E]
        return super().forward(inputs_embeds, (hidden.to(inputs_embeds.dtype) * MASKED)[None, None])


class _Stored(nn.Module):
    """A weight as buffers ``codes`` [N, K] and ``scale`` [N, groups]; the op becomes Core AI's own dequantization."""

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scale", packed.scale)
        self.logical = LOGICAL[packed.bits]

    @property
    def weight(self) -> torch.Tensor:
        return torch.ops.coreai.constexpr_blockwise_shift_scale(
            self.codes, self.scale, None, None, self.logical, None
        )  # [N, K]


class StoredLinear(_Stored):
    """A linear layer of a packed weight."""

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__(packed)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class StoredEmbedding(_Stored):
    """A table of a packed weight."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(input_ids, self.weight)


def with_weights(
    module: nn.Module,
    floats: Mapping[str, torch.Tensor],
    packed: Mapping[str, PackedWeight],
    dtype: FloatDtype,
) -> nn.Module:
    """A copy of ``module`` that holds these weights, by their names in it; the original's are not touched.

    Args:
        floats, packed: together every parameter; floats of the parameter's number of values, in any shape.
        dtype: of everything that is no integer.
    """
    memo: dict[int, Any] = {}  # deepcopy takes these for copies it has made: no second float32 weight is in memory
    for name, parameter in module.named_parameters():
        value = torch.empty(0) if name in packed else floats[name].detach().reshape(parameter.shape).to(dtype)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    twin = copy.deepcopy(module, memo)
    for name, weight in packed.items():
        owner, _, kind = name.removesuffix(".weight").rpartition(".")
        parent = twin.get_submodule(owner)
        old: Any = getattr(parent, kind)
        new = StoredEmbedding(weight) if isinstance(old, nn.Embedding) else StoredLinear(weight, old.bias)
        setattr(parent, kind, new)
    return twin.to(dtype).eval()  # buffers: tables and caches
