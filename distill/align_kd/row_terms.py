"""Hidden states of predicting rows, what a teacher says there -> cross entropy and divergences, a chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from distill.losses.divergences import DIVERGENCES, cross_entropy_rows, log_probabilities
from distill.losses.fused_rows import FusedRows, can_fuse, sum_of_chunks
from distill.settings.terms import TermSettings
from distill.teacher.view import TeacherRows

MAX_LOGITS = 1 << 20  # of a chunk on a CPU: 4 MiB in float32, of which its terms make a dozen
PRODUCT_LOGITS = 8 * MAX_LOGITS  # of one product with lm_head: fewer do not fill a GPU, and run at half speed on a CPU


def row_terms(
    names: Sequence[str],
    lm_head: nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    rows: TeacherRows | None,
    settings: TermSettings,
    foretold: torch.Tensor,
    vocabulary: int,
) -> dict[str, torch.Tensor]:
    """The named terms; lm_head and both softmaxes run on these rows alone.

    Args:
        names: of cross entropy and divergences; the latter need ``rows``.
        hidden: [S, D], the student's; targets: [S], -100 where the next token is not supervised.
        rows: of the teacher, in the same order.
        foretold: [K], the weight that the weighted sum is going to give each term.
        vocabulary: words of the student.
    """
    limit = MAX_LOGITS if hidden.device.type == "cpu" else PRODUCT_LOGITS
    size = max(1, limit // vocabulary)
    together = size * (PRODUCT_LOGITS // limit)
    theirs: Sequence[TeacherRows | None] = [None] * len(targets.split(size)) if rows is None else rows.split(size)
    supervised = (targets != -100).sum().clamp_min(1)
    every = torch.full_like(supervised, max(1, len(targets)))
    count = torch.stack([supervised if name == "cross_entropy" else every for name in names])  # [K]

    def chunk_terms(logits: torch.Tensor, first: int, last: int) -> torch.Tensor:
        terms = _chunk_terms(names, logits, theirs[first // size], targets[first:last], settings)
        return torch.stack(terms) / count  # [K]

    if can_fuse(lm_head):
        sums = FusedRows(lm_head, chunk_terms, size, together)(hidden, foretold)
    else:  # recomputed in the backward pass, so that no two chunks' logits are alive together
        sums = sum_of_chunks(lm_head, chunk_terms, size, hidden)
    return dict(zip(names, sums, strict=True))


def _chunk_terms(
    names: Sequence[str],
    logits: torch.Tensor,
    theirs: TeacherRows | None,
    targets: torch.Tensor,
    settings: TermSettings,
) -> list[torch.Tensor]:
    """Sums over a chunk's rows. logits [c, V], targets [c]."""
    terms = []
    plain = settings.temperature == 1 and settings.label_smoothing == 0
    log_student = None if theirs is None else log_probabilities(logits, settings.temperature)  # [c, V]
    sides = None if theirs is None or log_student is None else theirs.beside(log_student)
    for name in names:
        if name != "cross_entropy":
            assert sides is not None
            terms.append(DIVERGENCES[name](*sides.on(name)).sum() * settings.temperature**2)
        elif log_student is not None and plain:  # one softmax for all terms
            terms.append(F.nll_loss(log_student, targets, ignore_index=-100, reduction="sum"))
        else:
            terms.append(cross_entropy_rows(logits, targets, settings.label_smoothing).sum())
    return terms
