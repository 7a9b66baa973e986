"""Logits of student and teacher -> scalar losses: pure functions, softmax in float32, 0 for identical inputs.

Notation: S rows (supervised positions), V vocabulary. Every mean runs over the rows that are supervised or unmasked in
the batch; when none is, the loss is 0 and stays in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from distill.losses.masked_mean import masked_mean

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


def log_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax of logits / temperature in float32."""
    scaled = logits.float() if temperature == 1 else logits.float() / temperature  # [S, V], no copy for nothing
    return scaled.log_softmax(-1)


def _divergence(
    rows: RowDivergence, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    per_row = rows(log_probabilities(student, temperature), log_probabilities(teacher, temperature)) * temperature**2
    return masked_mean(per_row, torch.ones_like(per_row, dtype=torch.bool) if mask is None else mask.bool())


def _log_mixture(log_teacher: torch.Tensor, log_student: torch.Tensor, share: float) -> torch.Tensor:
    """log(share * T + (1 - share) * S), stable where both are tiny."""
    weights = log_teacher.new_tensor([share, 1 - share]).log()
    return torch.logaddexp(log_teacher + weights[0], log_student + weights[1])


DIVERGENCES: dict[str, RowDivergence] = {
    "reverse_kl": reverse_kl_rows,
    "forward_kl": forward_kl_rows,
    "jensen_shannon": jensen_shannon_rows,
    "skew_kl": partial(skew_kl_rows, skew=0.1),  # DistiLLM's alpha
    "adaptive_kl": adaptive_kl_rows,
    "cosine": cosine_rows,
}
