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


def cross_entropy_rows(logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """-log p_student(target) per row [S]; 0 where the target is -100; ``smoothing`` of it against a uniform target."""
    return F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=-100, label_smoothing=smoothing)


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


def adaptive_kl(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """``adaptive_kl_rows`` of logits. Shapes and normalisation as ``forward_kl``."""
    return _divergence(adaptive_kl_rows, student, teacher, mask, temperature)


def cosine(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """``cosine_rows`` of logits. Shapes and normalisation as ``forward_kl``."""
    return _divergence(cosine_rows, student, teacher, mask, temperature)


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


def adaptive_kl_rows(log_student: torch.Tensor, log_teacher: torch.Tensor, head_mass: float = 0.5) -> torch.Tensor:
    """Adaptive KL per row [S] (arXiv 2404.02657): forward and reverse KL, weighted by where the student is off.

    The teacher's likeliest words up to ``head_mass`` of probability are the head, the others the tail; forward KL
    counts by the share of the absolute gap that lies in the head, reverse KL by the share in the tail. No gradient runs
    through the shares.
    """
    p_teacher = log_teacher.exp()  # [S, V]
    gap = (p_teacher - log_student.detach().exp()).abs()  # [S, V]
    ordered, order = p_teacher.sort(-1, descending=True)
    in_head = (ordered.cumsum(-1) - ordered) < head_mass  # [S, V] in the teacher's order; the word that crosses counts
    head_gap = (gap.gather(-1, order) * in_head).sum(-1)  # [S]
    share = head_gap / gap.sum(-1).clamp_min(1e-9)  # [S]
    return share * forward_kl_rows(log_student, log_teacher) + (1 - share) * reverse_kl_rows(log_student, log_teacher)


def cosine_rows(log_student: torch.Tensor, log_teacher: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the two probability vectors, per row [S]."""
    return 1 - F.cosine_similarity(log_student.exp(), log_teacher.exp(), dim=-1)


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


def focus_tokens(attention: torch.Tensor, row_mask: torch.Tensor, top_k: int) -> torch.Tensor:
    """attention [n, H, R, N] -> the ``top_k`` columns [n, k] by head-mean attention summed over real rows."""
    mass = (attention.float().mean(1) * row_mask[..., None]).sum(1)  # [n, N]
    return mass.topk(min(top_k, mass.shape[-1]), dim=-1).indices


def log_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax of logits / temperature in float32."""
    scaled = logits.float() if temperature == 1 else logits.float() / temperature  # [S, V], no copy for nothing
    return scaled.log_softmax(-1)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of ``values`` where ``mask`` is True; 0, still in the graph, where it is nowhere True."""
    kept = torch.where(mask, values, torch.zeros_like(values))
    return kept.sum() / mask.sum().clamp_min(1)


def _divergence(
    rows: RowDivergence, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    per_row = rows(log_probabilities(student, temperature), log_probabilities(teacher, temperature)) * temperature**2
    return masked_mean(per_row, torch.ones_like(per_row, dtype=torch.bool) if mask is None else mask.bool())


def _gram(tokens: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(tokens.float(), dim=-1)  # [n, N, D]
    return (unit @ unit.transpose(1, 2)).flatten(1)  # [n, N * N]


def _log_mixture(log_teacher: torch.Tensor, log_student: torch.Tensor, share: float) -> torch.Tensor:
    """log(share * T + (1 - share) * S), stable where both are tiny."""
    weights = log_teacher.new_tensor([share, 1 - share]).log()
    return torch.logaddexp(log_teacher + weights[0], log_student + weights[1])
