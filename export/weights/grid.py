"""Float weights [N, K] -> codes and scales that every target stores as they are: 4 bits, symmetric, a scale per group.

The targets' own packers round to nearest with scales of their own; codes that were chosen otherwise come with scales
that all three formats hold exactly: float32 (ONNX), bfloat16 (XNNPACK), float16 (Core ML).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOWEST, HIGHEST = -8, 7
SMALLEST_SCALE = 2.0**-14  # float16's smallest normal number: below it bfloat16's 8 bits of mantissa do not fit
# Scales tried for a group, as parts of the one at which its extreme takes the last level: clipping extremes pays.
TRIED = tuple(0.70 + 0.05 * step for step in range(9))


@dataclass(frozen=True)
class Coded:
    """A matrix on the grid.

    Attributes:
        codes: int8 [N, K], LOWEST to HIGHEST.
        scales: float32 [N, K / group], exact in bfloat16 and in float16. Below 0 only where the target takes that.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def values(self) -> torch.Tensor:
        """float32 [N, K]."""
        rows, groups = self.scales.shape
        grouped = self.codes.reshape(rows, groups, -1).float() * self.scales[..., None]  # [N, groups, group]
        return grouped.reshape(self.codes.shape)


def storable(scales: torch.Tensor) -> torch.Tensor:
    """The nearest scales that all targets hold exactly."""
    magnitude = scales.bfloat16().float().abs().clamp_min(SMALLEST_SCALE)
    return torch.where(scales < 0, -magnitude, magnitude)


def levels(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Nearest levels of [.., group] at scales [.., 1]."""
    return (groups / scales).round_().clamp_(LOWEST, HIGHEST)


def nearest(weight: torch.Tensor, scales: torch.Tensor) -> Coded:
    """Round [N, K] to nearest at scales [N, groups]."""
    rows, groups = scales.shape
    codes = levels(weight.reshape(rows, groups, -1), scales[..., None])  # [N, groups, group]
    return Coded(codes.reshape(weight.shape).to(torch.int8), scales)


def fitted_scales(weight: torch.Tensor, group_size: int, importance: torch.Tensor, signed: bool) -> torch.Tensor:
    """Of TRIED and their least-squares fits, the scales with the least squared error, each input weighted.

    Args:
        weight: [N, K].
        importance: [K], e.g. the mean square of each input.
        signed: a scale may be below 0, so that a group's extreme always has the one more level of the negative side.

    Returns:
        [N, K / group_size], storable.
    """
    groups = weight.reshape(weight.shape[0], -1, group_size)  # [N, groups, group]
    weights = importance.reshape(1, -1, group_size)  # [1, groups, group]
    best = _widest(groups, signed)  # [N, groups, 1]
    least = torch.full_like(best, torch.inf)
    for part in TRIED:
        tried = _widest(groups, signed) * part
        found = levels(groups, tried)
        square = (found.square() * weights).sum(-1, keepdim=True)
        fitted = (groups * found * weights).sum(-1, keepdim=True) / square
        for scales in (storable(tried), storable(torch.where(square > 0, fitted, tried))):
            error = (levels(groups, scales) * scales - groups).square_().mul_(weights).sum(-1, keepdim=True)
            best = torch.where(error < least, scales, best)
            least = torch.minimum(error, least)
    return best[..., 0]


def _widest(groups: torch.Tensor, signed: bool) -> torch.Tensor:
    """The scales [N, groups, 1] at which each group's extreme takes the last level."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    if signed:
        return torch.where(extreme == 0, SMALLEST_SCALE, extreme / LOWEST)
    return (extreme / torch.where(extreme < 0, LOWEST, HIGHEST)).clamp_min(SMALLEST_SCALE)
