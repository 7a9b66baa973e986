"""Attention of text on images, student's and teacher's -> scalar losses; and the visual tokens it lies on most.

Notation: n images, H heads, R text rows after an image, N visual tokens. Every mean runs over the unmasked rows of the
batch; when none is, the loss is 0 and stays in the graph.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from distill.losses.divergences import forward_kl_rows
from distill.losses.masked_mean import masked_mean


def attention_mse(student: torch.Tensor, teacher: torch.Tensor, row_mask: torch.Tensor) -> torch.Tensor:
    """L_attn of Align-KD: mean square of W_a A_T - A_S over text rows x vision columns of the first layer.

    Args:
        student: [n, H_S, R, N], cut out of the softmax over all visible keys.
        teacher: [n, H_S, R, N], the teacher's block with its heads mapped onto the student's.
        row_mask: [n, R], True on real rows; the mean runs over heads, real rows and columns of the batch.
    """
    square = (student.float() - teacher.float()).square().mean((1, 3))  # [n, R]
    return masked_mean(square, row_mask)


def attention_kl(
    student: torch.Tensor, teacher: torch.Tensor, row_mask: torch.Tensor, by_mass: bool = False
) -> torch.Tensor:
    """KL(T || S) of the head-mean text -> vision attention, each row renormalised over the image; no head map needed.

    Scale-free where ``attention_mse`` is tiny (entries near 1/L).

    Args:
        student: [n, H_S, R, N].
        teacher: [n, H_T, R, N].
        row_mask: [n, R], True on real rows.
        by_mass: weigh each row by how much of its attention the teacher spends on the image; otherwise all count alike.
    """
    maps = [block.float().mean(1) for block in (student, teacher)]  # [n, R, N]
    log_student, log_teacher = (F.normalize(m, p=1.0, dim=-1).clamp_min(1e-9).log() for m in maps)
    per_row = forward_kl_rows(log_student, log_teacher)  # [n, R]
    if not by_mass:
        return masked_mean(per_row, row_mask)
    mass = torch.where(row_mask, maps[1].sum(-1), 0.0)  # [n, R]
    return (per_row * mass).sum() / mass.sum().clamp_min(1e-9)


def focus_tokens(attention: torch.Tensor, row_mask: torch.Tensor, top_k: int) -> torch.Tensor:
    """attention [n, H, R, N] -> the ``top_k`` columns [n, k] by head-mean attention summed over real rows."""
    mass = (attention.float().mean(1) * row_mask[..., None]).sum(1)  # [n, N]
    return mass.topk(min(top_k, mass.shape[-1]), dim=-1).indices
