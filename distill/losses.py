"""Student and teacher tensors -> scalar losses: pure functions, softmax in float32, 0 for identical inputs.

Notation: S rows (supervised positions), V vocabulary, n images, R text rows after an image, N visual tokens, H heads.
Every mean runs over what is supervised or unmasked in the batch; when nothing is, the loss is 0 and stays in the graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

# (log p_student, log p_teacher) [S, V] -> divergence per row [S]
RowDivergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """L_sup: mean over rows of -log p_student(target). logits [S, V], targets [S]; targets of -100 are left out."""
    return masked_mean(cross_entropy_rows(logits, targets), targets != -100)


def cross_entropy_rows(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p_student(target) per row [S]; 0 where the target is -100."""
    return F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=-100)


def forward_kl(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """KL(p_teacher || p_student), times temperature squared (Hinton 2015).

    Args:
        student, teacher: logits [S, V].
        mask: [S], True on rows that count; None keeps all. The mean runs over these rows.
        temperature: divides both logits.
    """
    return _divergence(forward_kl_rows, student, teacher, mask, temperature)


def reverse_kl(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """L_RKLD of Align-KD: KL(p_student || p_teacher). Shapes and normalisation as ``forward_kl``."""
    return _divergence(reverse_kl_rows, student, teacher, mask, temperature)


def jensen_shannon(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """(KL(T || M) + KL(S || M)) / 2 with M = (T + S) / 2. Shapes and normalisation as ``forward_kl``."""
    return _divergence(jensen_shannon_rows, student, teacher, mask, temperature)


def skew_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    skew: float = 0.1,
) -> torch.Tensor:
    """DistiLLM (arXiv 2402.03898): KL(T || skew * T + (1 - skew) * S). Shapes and normalisation as ``forward_kl``."""
    return _divergence(lambda s, t: skew_kl_rows(s, t, skew), student, teacher, mask, temperature)


def forward_kl_rows(log_student: torch.Tensor, log_teacher: torch.Tensor) -> torch.Tensor:
    """KL(T || S) per row [S] of log-probabilities [S, V]."""
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


def reverse_kl_rows(log_student: torch.Tensor, log_teacher: torch.Tensor) -> torch.Tensor:
    """KL(S || T) per row [S] of log-probabilities [S, V]."""
    return forward_kl_rows(log_teacher, log_student)


def jensen_shannon_rows(log_student: torch.Tensor, log_teacher: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence at one half per row [S] of log-probabilities [S, V]."""
    middle = _log_mixture(log_teacher, log_student, 0.5)
    return (forward_kl_rows(middle, log_teacher) + forward_kl_rows(middle, log_student)) / 2


def skew_kl_rows(log_student: torch.Tensor, log_teacher: torch.Tensor, skew: float) -> torch.Tensor:
    """KL(T || skew * T + (1 - skew) * S) per row [S] of log-probabilities [S, V]."""
    return forward_kl_rows(_log_mixture(log_teacher, log_student, skew), log_teacher)


def attention_mse(student: torch.Tensor, teacher: torch.Tensor, row_mask: torch.Tensor) -> torch.Tensor:
    """L_attn of Align-KD: mean square of W_a A_T - A_S over text rows x vision columns of the first layer.

    Args:
        student: [n, H_S, R, N], cut out of the softmax over all visible keys.
        teacher: [n, H_S, R, N], the teacher's block with its heads mapped onto the student's.
        row_mask: [n, R], True on real rows; the mean runs over heads, real rows and columns of the batch.
    """
    square = (student.float() - teacher.float()).square().mean((1, 3))  # [n, R]
    return masked_mean(square, row_mask)


def attention_kl(student: torch.Tensor, teacher: torch.Tensor, row_mask: torch.Tensor) -> torch.Tensor:
    """KL(T || S) of the head-mean text -> vision attention, each row renormalised over the image; no head map needed.

    Scale-free where ``attention_mse`` is tiny (entries near 1/L). student [n, H_S, R, N], teacher [n, H_T, R, N],
    row_mask [n, R]; mean over real rows.
    """
    log_student, log_teacher = (
        F.normalize(block.float().mean(1), p=1.0, dim=-1).clamp_min(1e-9).log() for block in (student, teacher)
    )  # [n, R, N]
    return masked_mean(forward_kl_rows(log_student, log_teacher), row_mask)


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
    picked = focus_tokens(teacher_attention, row_mask, top_k)[..., None].expand(
        -1, -1, student.shape[-1]
    )  # [n, k, D_S]
    return visual_mse(student.gather(1, picked), teacher.gather(1, picked))


def focus_tokens(attention: torch.Tensor, row_mask: torch.Tensor, top_k: int) -> torch.Tensor:
    """attention [n, H, R, N] -> the ``top_k`` columns [n, k] by head-mean attention summed over real rows."""
    mass = (attention.float().mean(1) * row_mask[..., None]).sum(1)  # [n, N]
    return mass.topk(min(top_k, mass.shape[-1]), dim=-1).indices


def log_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax of logits / temperature in float32."""
    return (logits.float() / temperature).log_softmax(-1)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of ``values`` where ``mask`` is True; 0, still in the graph, where it is nowhere True."""
    kept = torch.where(mask, values, torch.zeros_like(values))
    return kept.sum() / mask.sum().clamp_min(1)


def _divergence(
    rows: RowDivergence, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    per_row = rows(log_probabilities(student, temperature), log_probabilities(teacher, temperature)) * temperature**2
    return masked_mean(per_row, torch.ones_like(per_row, dtype=torch.bool) if mask is None else mask.bool())


def _log_mixture(log_teacher: torch.Tensor, log_student: torch.Tensor, share: float) -> torch.Tensor:
    """log(share * T + (1 - share) * S), stable where both are tiny."""
    weights = log_teacher.new_tensor([share, 1 - share]).log()
    return torch.logaddexp(log_teacher + weights[0], log_student + weights[1])
