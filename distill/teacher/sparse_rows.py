"""Distributions -> a few words a row, drawn so that sums over words stay unbiased; and back, as losses take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Support = Literal["weighted", "spread"]
# Divergence -> how recorded rows stand in for the whole distribution, and what that does to value and gradient:
#   weighted: every stored word counts by the inverse of its chance to be stored. Unbiased; of low variance where the
#       summand is in proportion to the teacher's probability.
#   spread: the mass of the words that are not stored lies evenly on them. Deterministic given the words, not unbiased:
#       where the student's probability is what weighs, inverse chances would have a variance that drowns the gradient.
SUPPORTS: dict[str, Support] = {
    "reverse_kl": "spread",
    "forward_kl": "weighted",
    "jensen_shannon": "spread",
    "skew_kl": "weighted",
    "adaptive_kl": "spread",
    "cosine": "spread",
}
ROUNDING = 1e-9  # of sums of chances in float64, and more
SMALLEST_LOG = -100.0  # a probability of 4e-44: exp() of it is still no zero in float32


@dataclass(frozen=True)
class Drawn:
    """Some entries of each of S distributions.

    Attributes:
        picked: [S, K], indexes.
        log_threshold: [S], log tau: an entry of probability p was drawn with chance min(1, p / tau).
    """

    picked: torch.Tensor
    log_threshold: torch.Tensor


def draw(log_weights: torch.Tensor, count: int, uniform: torch.Tensor) -> Drawn:
    """The ``count`` entries of each row that estimate sums over all entries best: large ones surely, others by chance.

    With tau such that the chances min(1, p / tau) sum to ``count``, entries are taken systematically along the order of
    size, so that exactly ``count`` are. ``sum(f / chance)`` over them has the expectation of ``sum(f)`` over all, and
    for f = p its value too: threshold sampling, of least variance for sums of f = p (Cohen, Duffield, Kaplan, Lund,
    Thorup, SODA 2009). Sampling from the teacher instead of cutting it off: Sparse Logit Sampling, arXiv 2503.16870.

    Args:
        log_weights: [S, V], finite or -inf; need not be normalised.
        count: at most V.
        uniform: [S] in [0, 1), what chance decides.
    """
    size, order = log_weights.double().clamp_min(-600).exp().sort(-1, descending=True)  # [S, V]
    rest = size.flip(-1).cumsum(-1).flip(-1)  # [S, V] sum of this entry and all smaller ones
    sure = torch.arange(size.shape[-1], device=size.device)  # how many entries are taken surely, if this is the number
    threshold = rest / (count - sure).clamp_min(1)  # [S, V]
    fits = (size <= threshold) & (sure < count) | (sure == count - 1)
    threshold = threshold.gather(-1, fits.long().argmax(-1, keepdim=True))  # [S, 1] tau
    summed = (size / threshold).clamp_max(1).cumsum(-1)  # [S, V]
    summed[:, -1] = count
    whole = summed.round()
    summed = summed.where((summed - whole).abs() > ROUNDING, whole)  # [S, V] else 2.999... + 0 is no 3rd entry
    reached = (summed + uniform.double()[:, None]).floor()  # [S, V]
    taken = reached.diff(dim=-1, prepend=torch.zeros_like(reached[:, :1])) > 0
    picked = order[taken].view(len(size), count)  # [S, K]
    return Drawn(picked, threshold[:, 0].log().float())


def log_weight(log_p: torch.Tensor, log_threshold: torch.Tensor) -> torch.Tensor:
    """log of the inverse chance by which each drawn entry [S, K] counts."""
    return (log_threshold[:, None] - log_p).clamp_min(0)


@dataclass(frozen=True)
class SparseRows:
    """Recorded rows. Part of the words, exactly the whole distribution when every word is stored.

    Attributes:
        ids: [S, K], stored words.
        log_p: [S, K], their log-probabilities.
        log_rest: [S], log of the mass of all other words.
        log_threshold: [S], see ``Drawn``.
    """

    ids: torch.Tensor
    log_p: torch.Tensor
    log_rest: torch.Tensor
    log_threshold: torch.Tensor

    def split(self, rows: int) -> list[SparseRows]:
        fields = (self.ids, self.log_p, self.log_rest, self.log_threshold)
        return [SparseRows(*parts) for parts in zip(*(field.split(rows) for field in fields), strict=True)]

    def beside(self, log_student: torch.Tensor) -> SparseSides:
        return SparseSides(self, log_student)


@dataclass(frozen=True)
class SparseSides:
    """Recorded rows beside a student's log-probabilities [c, V]."""

    rows: SparseRows
    log_student: torch.Tensor

    def on(self, divergence: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides' [c, W] for a divergence by its name: W = K where words are weighted, W = V where mass is spread.

        Multiplying both sides by a word's weight multiplies its summand: these divergences are homogeneous.
        """
        ids, log_p = self.rows.ids.long(), self.rows.log_p.float()  # [c, K]
        if SUPPORTS[divergence] == "weighted":
            weight = log_weight(log_p, self.rows.log_threshold)  # [c, K]
            return self.log_student.gather(-1, ids) + weight, log_p + weight
        others = self.log_student.shape[-1] - ids.shape[-1]
        each = self.rows.log_rest - torch.tensor(float(max(others, 1))).log()  # [c]
        whole = each.clamp_min(SMALLEST_LOG)[:, None].expand_as(self.log_student)  # [c, V]
        return self.log_student, whole.scatter(-1, ids, log_p)


def sparse_rows(log_p: torch.Tensor, words: int, dtype: torch.dtype, uniform: torch.Tensor) -> SparseRows:
    """Record distributions.

    Args:
        log_p: [S, V], log-probabilities.
        words: stored per row; V or more stores all.
        dtype: of the stored log-probabilities. float16 rounds a log-probability by at most 2**-11 of itself, so a
            probability of 1e-4 by 0.5 % and one of 0.5 by 0.03 %; chances are those of the rounded ones.
        uniform: [S] in [0, 1).
    """
    rounded = log_p.to(dtype).float()  # [S, V]
    drawn = draw(rounded, min(words, log_p.shape[-1]), uniform)
    stored = log_p.gather(-1, drawn.picked).to(dtype)  # [S, K]
    others = log_p.scatter(-1, drawn.picked, float("-inf"))  # [S, V]
    rest = others.logsumexp(-1).clamp_min(SMALLEST_LOG)  # [S]
    return SparseRows(drawn.picked, stored, rest, drawn.log_threshold)


def sparse_block(weights: torch.Tensor, columns: int, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of attention [R, N] -> drawn columns [R, C] and values [R, C]: of the row's expectation, and of its sum.

    A value is max(p, tau): the entry times its weight.
    """
    log_p = weights.clamp_min(1e-30).log()
    drawn = draw(log_p, min(columns, weights.shape[-1]), uniform)
    return drawn.picked, torch.maximum(log_p.gather(-1, drawn.picked), drawn.log_threshold[:, None]).exp()
