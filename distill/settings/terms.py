"""Loss terms by name: which kinds there are, the presets of --losses, and what single weights change of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

DIVERGENCE_TERMS = ("reverse_kl", "forward_kl", "jensen_shannon", "skew_kl", "adaptive_kl", "cosine")
ATTENTION_TERMS = ("attention", "attention_kl", "attention_groups")
VISUAL_TERMS = ("visual", "focus", "normed_visual", "relation")
PUBLISHED_TERMS = ("published_logits", "published_attention", "published_focus")
TERMS = ("cross_entropy", *DIVERGENCE_TERMS, *ATTENTION_TERMS, *VISUAL_TERMS, *PUBLISHED_TERMS)
WORDY_TERMS = (*DIVERGENCE_TERMS, *ATTENTION_TERMS, "focus", *PUBLISHED_TERMS)  # of the teacher's decoder
# the others look at the image alone, so the teacher's decoder does not run for them
WORDLESS_TERMS = tuple(name for name in TERMS if name not in (*WORDY_TERMS, "cross_entropy"))

Losses = Literal["paper", "ours", "published_code", "ce"]
PRESETS: dict[Losses, dict[str, float]] = {
    # the paper weighs its five terms equally (Align-KD, arXiv 2412.01282)
    "paper": {"cross_entropy": 1.0, "reverse_kl": 1.0, "attention": 1.0, "visual": 1.0, "focus": 1.0},
    # what won on the demo world: experiments/align_kd
    "ours": {"cross_entropy": 1.0, "forward_kl": 1.0, "attention_groups": 1.0},
    # what the authors' code computes instead, for comparison only: distill/align_kd/published_code.py
    "published_code": {
        "cross_entropy": 1.0,
        "published_logits": 1.0,
        "published_attention": 1.0,
        "visual": 1.0,
        "published_focus": 1.0,
    },
    "ce": {"cross_entropy": 1.0},
}
TEMPERATURES: dict[Losses, float] = {"paper": 1.0, "ours": 4.0, "published_code": 1.0, "ce": 1.0}  # of the divergences


@dataclass(frozen=True)
class TermWeights:
    """Weight of each loss term; unset keeps what --losses says, 0 switches the term off."""

    cross_entropy: float | None = None
    """Next-token cross entropy on the answers."""
    reverse_kl: float | None = None
    """KL(student || teacher) on the answers, the paper's."""
    forward_kl: float | None = None
    """KL(teacher || student) on the answers."""
    jensen_shannon: float | None = None
    """Jensen-Shannon divergence on the answers."""
    skew_kl: float | None = None
    """DistiLLM's skew KL (0.1) on the answers."""
    adaptive_kl: float | None = None
    """Forward KL on the teacher's likely words, reverse KL on the others, by where the student is off."""
    cosine: float | None = None
    """1 - cosine of the two distributions."""
    attention: float | None = None
    """Mean square of the first layer's text-to-image attention through a learned head map, the paper's."""
    attention_kl: float | None = None
    """KL of the same attention, head mean renormalised over the image; scale-free, without a map."""
    attention_groups: float | None = None
    """The same in every layer of the student, against the teacher's layers at that depth."""
    visual: float | None = None
    """Mean square of all visual tokens through a learned width map, the paper's V-all."""
    focus: float | None = None
    """The same over the visual tokens that the teacher's text looks at most, the paper's V-focus."""
    normed_visual: float | None = None
    """Mean square of layer-normed visual tokens, the student's mapped to the teacher's width."""
    relation: float | None = None
    """1 - cosine of the visual tokens' Gram matrices; without a map."""
    published_logits: float | None = None
    """The published code's logits term: every position, float16."""
    published_attention: float | None = None
    """The published code's attention term: a constant."""
    published_focus: float | None = None
    """The published code's focus term: wrongly indexed tokens."""


def term_weights(losses: Losses, weights: TermWeights) -> dict[str, float]:
    """Term -> weight after a preset and single weights; terms of weight 0 are left out."""
    given = {name: weight for name, weight in asdict(weights).items() if weight is not None}
    return {name: weight for name, weight in (PRESETS[losses] | given).items() if weight}


@dataclass(frozen=True)
class TermSettings:
    """What the terms are computed with.

    Args:
        temperature: of the divergences.
        mask: where the divergences look: "answer", "answer+vision" or "all".
        label_smoothing: of the cross entropy.
        top_k: visual tokens per image of the focus term.
        attention_by_mass: the attention KL weighs rows by the teacher's attention on the image.
    """

    temperature: float = 1.0
    mask: str = "answer"
    label_smoothing: float = 0.0
    top_k: int = 16
    attention_by_mass: bool = False
