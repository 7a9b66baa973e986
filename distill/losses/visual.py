"""Visual tokens of student and teacher -> scalar losses, means over the tokens of the batch; 0 for identical inputs.

Notation: n images, N visual tokens, H heads, R text rows after an image.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from distill.losses.attention import focus_tokens
from distill.losses.masked_mean import masked_mean


def visual_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """L_V-all of Align-KD: mean square of W_p v_T - v_S over all visual tokens. Both [n, N, D_S], teacher mapped."""
    square = (student.float() - teacher.float()).square().mean(-1)  # [n, N]
    return masked_mean(square, torch.ones_like(square, dtype=torch.bool))


def focus_mse(
    student: torch.Tensor, teacher: torch.Tensor, teacher_attention: torch.Tensor, row_mask: torch.Tensor, top_k: int
) -> torch.Tensor:
    """L_V-focus of Align-KD: ``visual_mse`` over the visual tokens that the teacher's text attends to most.

    Args:
        student: [n, N, D_S]; teacher: the same, mapped.
        teacher_attention: [n, H_T, R, N], the teacher's own heads.
        row_mask: [n, R].
        top_k: tokens per image.
    """
    return picked_mse(student, teacher, focus_tokens(teacher_attention, row_mask, top_k))


def picked_mse(student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``visual_mse`` over some tokens [n, k] of each image. Both sides [n, N, D_S]."""
    picked = tokens[..., None].expand(-1, -1, student.shape[-1])  # [n, k, D_S]
    return visual_mse(student.gather(1, picked), teacher.gather(1, picked))


def normed_visual_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean square between layer-normed visual tokens, the student's mapped to the teacher's width. Both [n, N, D_T].

    The target passes no learned map, so that nothing can shrink it: ``visual_mse`` with a learned teacher map can be
    lowered by mapping everything near zero.
    """
    width = student.shape[-1:]
    return visual_mse(F.layer_norm(student.float(), width), F.layer_norm(teacher.float(), width))


def relation_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the two Gram matrices of unit visual tokens (LLaVA-KD, arXiv 2410.16236); mean over images.

    student [n, N, D_S], teacher [n, N, D_T]: widths may differ, no map is needed.
    """
    distance = 1 - F.cosine_similarity(_gram(student), _gram(teacher), dim=-1)  # [n]
    return masked_mean(distance, torch.ones_like(distance, dtype=torch.bool))


def _gram(tokens: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(tokens.float(), dim=-1)  # [n, N, D]
    return (unit @ unit.transpose(1, 2)).flatten(1)  # [n, N * N]
