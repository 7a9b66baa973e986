"""Name of an arm -> what it changes of the common training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distill.settings.terms import TermWeights


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Args:
        settings: fields of DistillConfig that differ from the common ones.
        steps: times the common number of steps.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    steps: float = 1.0


def with_terms(settings: dict[str, Any] | None = None, **weights: float) -> Arm:
    """Cross entropy and these terms."""
    return Arm({"losses": "ce", "weights": TermWeights(**weights), **(settings or {})})


CE, OURS, SHUFFLED = {"losses": "ce"}, {"losses": "ours"}, {"shuffled_teacher": True}
ARMS: dict[str, Arm] = {
    "ce": Arm(CE),
    "label smoothing": Arm({**CE, "label_smoothing": 0.1}),
    "reverse KL": with_terms(reverse_kl=1.0),
    "forward KL, T 4": with_terms({"temperature": 4.0}, forward_kl=1.0),
    "attention MSE": with_terms(attention=1.0),
    "attention KL": with_terms(attention_kl=1.0),
    "attention KL, groups": with_terms(attention_groups=1.0),
    "visual and focus": with_terms(visual=1.0, focus=1.0),
    "paper": Arm({"losses": "paper"}),
    "paper, random maps": Arm({"losses": "paper", "adapter_init": "random"}),
    "published code": Arm({"losses": "published_code"}),
    "ours": Arm(OURS),
    "ours, answers and visual tokens": Arm({**OURS, "mask": "answer+vision"}),
    "ours, all positions": Arm({**OURS, "mask": "all"}),
    "ours, fading": Arm({**OURS, "taught_share_end": 0.0}),
    "ours, by vision mass": Arm({**OURS, "attention_by_mass": True}),
    "ours, first layer": with_terms({"temperature": 4.0}, forward_kl=1.0, attention_kl=1.0),
    "ours, with reverse KL": with_terms({"temperature": 4.0}, forward_kl=1.0, reverse_kl=1.0, attention_groups=1.0),
    "paper, shuffled teacher": Arm({"losses": "paper", **SHUFFLED}),
    "ours, shuffled teacher": Arm({**OURS, **SHUFFLED}),
    "ce, wall clock of ours": Arm(CE, steps=1.4),
    "ce, twice the steps": Arm(CE, steps=2.0),
    "ours, twice the steps": Arm(OURS, steps=2.0),
}
