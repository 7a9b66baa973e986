"""Name of an arm -> what it changes of the common training run: losses, weights, steps, and which teacher it sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distill.config import TermWeights

FIT = {"adapter_init": "fit"}  # maps between visual tokens start at the least-squares fit
OURS = {"attention_groups": 1.0, "forward_kl": 1.0}
OURS_SETTINGS = {"temperature": 4.0}


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Args:
        settings: fields of DistillConfig that differ from the common ones.
        shuffled: the teacher sees another sample's picture.
        steps: times the common number of steps.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    shuffled: bool = False
    steps: float = 1.0


def with_terms(settings: dict[str, Any] | None = None, **weights: float) -> dict[str, Any]:
    """Cross entropy and these terms."""
    return {"losses": "ce", "weights": TermWeights(**weights), **(settings or {})}


ARMS: dict[str, Arm] = {
    "ce": Arm({"losses": "ce"}),
    "ce, 5e-4": Arm({"losses": "ce", "learning_rate": 5e-4}),
    "label smoothing": Arm({"losses": "ce", "label_smoothing": 0.1}),
    "forward KL, T 4": Arm(with_terms({"temperature": 4.0}, forward_kl=1.0)),
    "reverse KL": Arm(with_terms(reverse_kl=1.0)),
    "attention MSE": Arm(with_terms(attention=1.0)),
    "attention KL": Arm(with_terms(attention_kl=1.0)),
    "attention KL, groups": Arm(with_terms(attention_groups=1.0)),
    "visual and focus": Arm(with_terms(FIT, visual=1.0, focus=1.0)),
    "paper": Arm({"losses": "paper", **FIT}),
    "paper, random maps": Arm({"losses": "paper"}),
    "published code": Arm({"losses": "published_code"}),
    "ours": Arm(with_terms(OURS_SETTINGS, **OURS)),
    "paper, shuffled teacher": Arm({"losses": "paper", **FIT}, shuffled=True),
    "ours, shuffled teacher": Arm(with_terms(OURS_SETTINGS, **OURS), shuffled=True),
    "ce, twice the steps": Arm({"losses": "ce"}, steps=2.0),
    "ours, twice the steps": Arm(with_terms(OURS_SETTINGS, **OURS), steps=2.0),
    "ce, four times the steps": Arm({"losses": "ce"}, steps=4.0),
    "ours, four times the steps": Arm(with_terms(OURS_SETTINGS, **OURS), steps=4.0),
}
