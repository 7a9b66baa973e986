"""Tower features [n, grid*grid, D_v] -> visual tokens [n, N, D]: the LDPv2 projector of MobileVLM V2."""

from __future__ import annotations

import torch
from torch import nn


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
        grid = int(hidden.shape[1] ** 0.5)
        plane = hidden.transpose(1, 2).reshape(hidden.shape[0], hidden.shape[2], grid, grid)  # [n, D, grid, grid]
        plane = self.pool(plane)  # [n, D, pooled, pooled]
        plane = plane + self.position(plane)  # [n, D, pooled, pooled]
        return plane.flatten(2).transpose(1, 2)  # [n, N, D]
