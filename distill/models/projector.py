"""Tower features [n, grid*grid, D_v] -> visual tokens [n, N, D]: the projectors of MobileVLM V2, V1 and LLaVA by name.

Names are those of the published ``mm_projector_type``: ldpnetv2, ldpnet, linear, mlp2x_gelu (and mlp3x_gelu, ...).
"""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers.activations import ACT2FN

LDP_V2, LDP_V1, LINEAR = "ldpnetv2", "ldpnet", "linear"
SUPPORTED = f"{LDP_V2}, {LDP_V1}, {LINEAR}, mlp2x_gelu (any number of layers)"
SQUEEZE = 4  # MobileNetV3: the gate's narrow layer has a quarter of the channels, rounded to a multiple of 8


def make_projector(
    name: str, vision_width: int, hidden_size: int, patch_grid: int, activation: str = "gelu", bias: bool = True
) -> nn.Module:
    """The projector of this name; ``activation`` and ``bias`` are LLaVA's to choose.

    Raises:
        ValueError: the name is not one of SUPPORTED.
    """
    if name == LDP_V2:
        return LDPv2(vision_width, hidden_size, patch_grid // 2)
    if name == LDP_V1:
        return LDPv1(vision_width, hidden_size)
    return Mlp(vision_width, hidden_size, mlp_depth(name), activation, bias)


def visual_tokens(name: str, patch_grid: int) -> int:
    """Visual tokens per image: LDP halves the grid, the others keep every patch.

    Raises:
        ValueError: the name is not one of SUPPORTED.
    """
    if name == LDP_V2:
        return (patch_grid // 2) ** 2
    if name == LDP_V1:
        return ((patch_grid + 1) // 2) ** 2  # a convolution of stride 2 and padding 1 rounds up
    mlp_depth(name)
    return patch_grid**2


def mlp_depth(name: str) -> int:
    """Linear layers of ``linear`` and ``mlpNx_gelu``.

    Raises:
        ValueError: it is neither.
    """
    found = re.fullmatch(r"mlp([1-9])x_gelu", name)
    if name != LINEAR and found is None:
        raise ValueError(f"projector '{name}' is not supported; supported: {SUPPORTED}")
    return int(found[1]) if found else 1


class Mlp(nn.Module):
    """LLaVA's projector: linear layers with GELU between them, on every patch by itself (arXiv 2310.03744).

    The Hugging Face LLaVA family may name another activation and leave out the biases.
    """

    def __init__(
        self, vision_width: int, hidden_size: int, depth: int, activation: str = "gelu", bias: bool = True
    ) -> None:
        super().__init__()
        widths = [vision_width] + [hidden_size] * depth
        self.linears = nn.ModuleList(nn.Linear(a, b, bias) for a, b in zip(widths, widths[1:], strict=False))
        self.activation = ACT2FN[activation]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features [n, P, D_v] -> visual tokens [n, P, D]."""
        hidden = self.linears[0](features)
        for linear in self.linears[1:]:
            hidden = linear(self.activation(hidden))
        return hidden


class LDPv1(nn.Module):
    """Lightweight downsample projector of MobileVLM V1 (arXiv 2312.16886, section 3.4).

    Two linear layers per patch, then two MobileNetV3 blocks without expansion; the second halves the grid.
    """

    def __init__(self, vision_width: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)
        self.blocks = nn.ModuleList([MobileBlock(hidden_size, 1), MobileBlock(hidden_size, 2)])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features [n, grid*grid, D_v] -> visual tokens [n, ceil(grid / 2)**2, D]."""
        plane = to_plane(self.linear_2(nn.functional.gelu(self.linear_1(features))))  # [n, D, grid, grid]
        for block in self.blocks:
            plane = block(plane)
        return plane.flatten(2).transpose(1, 2)  # [n, N, D]


class MobileBlock(nn.Module):
    """Depthwise 3x3 convolution, squeeze and excitation, 1x1 convolution; a residual where the grid stays.

    Normalised over channels at every place (LayerNorm, eps 1e-5) where MobileNetV3 has batch norm.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        squeezed = max(8, (channels // SQUEEZE + 4) // 8 * 8)
        squeezed += 8 * (squeezed < 0.9 * (channels // SQUEEZE))  # never rounded down by more than a tenth
        self.depthwise = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        self.depthwise_norm = nn.LayerNorm(channels)
        self.squeeze, self.excite = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.pointwise_norm = nn.LayerNorm(channels)
        self.stays = stride == 1

    def forward(self, plane: torch.Tensor) -> torch.Tensor:
        """plane [n, D, g, g] -> [n, D, g', g']."""
        hidden = nn.functional.hardswish(over_channels(self.depthwise_norm, self.depthwise(plane)))
        mean = hidden.mean((2, 3), keepdim=True)  # [n, D, 1, 1]
        hidden = hidden * nn.functional.hardsigmoid(self.excite(self.squeeze(mean).relu()))
        hidden = over_channels(self.pointwise_norm, self.pointwise(hidden))
        return plane + hidden if self.stays else hidden


def over_channels(norm: nn.LayerNorm, plane: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the channels of [n, D, g, g]."""
    return norm(plane.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def to_plane(tokens: torch.Tensor) -> torch.Tensor:
    """Row-major tokens [n, grid*grid, D] -> [n, D, grid, grid]."""
    grid = int(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], grid, grid)


class LDPv2(nn.Module):
    """Lightweight downsample projector, version 2 (MobileVLM V2, arXiv 2402.03766, section 3.3).

    Two linear layers per patch, average pooling to ``pooled_grid`` squared tokens, and a depthwise 3x3 convolution
    with a residual as position information.

    Args:
        vision_width: width of the tower's features, D_v.
        hidden_size: width of the decoder, D.
        pooled_grid: visual tokens per side after pooling (12 for a 24x24 patch grid).
    """

    def __init__(self, vision_width: int, hidden_size: int, pooled_grid: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)
        self.pool = nn.AdaptiveAvgPool2d((pooled_grid, pooled_grid))
        self.position = nn.Conv2d(hidden_size, hidden_size, kernel_size=3, padding=1, groups=hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features [n, grid*grid, D_v] -> visual tokens [n, pooled_grid**2, D]."""
        hidden = self.linear_2(nn.functional.gelu(self.linear_1(features)))  # [n, P, D]
        plane = self.pool(to_plane(hidden))  # [n, D, pooled, pooled]
        plane = plane + self.position(plane)  # [n, D, pooled, pooled]
        return plane.flatten(2).transpose(1, 2)  # [n, N, D]
