"""Weight matrix and what its layer is fed -> 4-bit codes that make up for each other's errors (GPTQ).

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv 2210.17323. No
library that runs without a GPU gives codes of this grid (torchao's GPTQConfig takes other formats only), so its loop is
ours. Two options of the authors' code are always on: inputs in the order of falling energy, scales fixed beforehand.
"""

from __future__ import annotations

import torch

from export.weights.grid import Coded, fitted_scales, levels, nearest

DAMPING = 0.01  # lambda of the paper, section 3.3, step 3: part of the mean diagonal added to it
COLUMNS_TOGETHER = 128  # the paper's B: errors are passed on within such a block at once, then to all later columns


def gptq(weight: torch.Tensor, hessian: torch.Tensor, group_size: int, signed: bool = False) -> Coded:
    """Quantize column by column; the columns that follow take over the error of each.

    It is greedy: a row that rounding to nearest at the same scales serves better is rounded.

    Args:
        weight: [N, K], K a multiple of ``group_size``.
        hessian: [K, K], sum of x x^T over the inputs x of the layer; only its proportions matter.
        signed: as in ``fitted_scales``.
    """
    columns = weight.shape[1]
    energy = hessian.diagonal().clone()
    tiny = torch.finfo(energy.dtype).tiny
    scales = fitted_scales(weight, group_size, energy / energy.mean().clamp_min(tiny) + DAMPING, signed)
    order = energy.argsort(descending=True)
    spread = scales.repeat_interleave(group_size, 1)[:, order]  # [N, K], of each column in the order they are taken
    left = weight[:, order].clone()
    inverse = _inverse_factor(hessian[order][:, order])  # [K, K], upper
    codes = torch.empty_like(weight)
    for start in range(0, columns, COLUMNS_TOGETHER):
        end = min(start + COLUMNS_TOGETHER, columns)
        block, factor = left[:, start:end], inverse[start:end, start:end]
        errors = torch.empty_like(block)
        for at in range(end - start):
            column, step = block[:, at], spread[:, start + at]
            level = levels(column, step)
            codes[:, start + at] = level
            errors[:, at] = (column - level * step) / factor[at, at]  # equation 2
            block[:, at + 1 :] -= errors[:, at, None] * factor[at, at + 1 :]  # equation 3
        left[:, end:] -= errors @ inverse[start:end, end:]  # equation 4
    found, rounded = Coded(codes[:, order.argsort()].to(torch.int8), scales), nearest(weight, scales)
    worse = _output_error(found, weight, hessian) > _output_error(rounded, weight, hessian)  # [N]
    return Coded(torch.where(worse[:, None], rounded.codes, found.codes), scales)


def _output_error(coded: Coded, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Squared error of each output [N] over the inputs: the paper's equation 1 row by row."""
    distance = coded.values() - weight
    return (distance @ hessian * distance).sum(1)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the damped inverse [K, K]: its row i is all that column i passes on (section 3.3)."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal += DAMPING * diagonal.mean() + torch.finfo(damped.dtype).tiny
    lower = torch.linalg.cholesky(damped)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
