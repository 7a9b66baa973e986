"""Answers of two bundles -> how far they agree, question by question and in all (alignkd-verify --compare)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bundle.compare_cases import Question
from bundle.runtimes.contract import Floats

ComparedStage = Literal["visual_tokens", "embeddings", "first_logits", "answer_logits"]
COMPARED_STAGES: tuple[ComparedStage, ...] = ("visual_tokens", "embeddings", "first_logits", "answer_logits")


@dataclass(frozen=True)
class Divergence:
    """The first answer token of a question that differs.

    Attributes:
        position: 0 is the first answer token.
        tokens: the first bundle's id and the second's.
        pieces: the same as text.
        margins: by how much each bundle's logits prefer its own token over the other's; small ones are near ties.
    """

    question: str
    position: int
    tokens: tuple[int, int]
    pieces: tuple[str, str]
    margins: tuple[float, float]


@dataclass(frozen=True)
class Agreement:
    """One question answered by both.

    Attributes:
        tokens: answer tokens of the first bundle, the end mark included.
        agreed: of them those that are the second's most likely as well, fed the first one's tokens.
        matched: of them those that stand at the same place in the answer that the second gives by itself.
        kl: divergence of the second's next-token distribution from the first's, nats, one a token.
        errors: relative L2 error of the second against the first; a stage whose shapes differ is left out.
    """

    question: Question
    tokens: int
    agreed: int
    matched: int
    kl: tuple[float, ...]
    errors: dict[ComparedStage, float]
    divergence: Divergence | None


@dataclass(frozen=True)
class Comparison:
    """All questions."""

    runtimes: tuple[str, str]
    questions: tuple[Agreement, ...]

    @property
    def tokens(self) -> int:
        """Answer tokens compared."""
        return sum(each.tokens for each in self.questions)

    @property
    def agreement(self) -> float:
        """Share of tokens that are both bundles' most likely, each fed the first bundle's tokens."""
        return sum(each.agreed for each in self.questions) / self.tokens

    @property
    def match_rate(self) -> float:
        """Share of tokens at the same place in both answers, each bundle on its own."""
        return sum(each.matched for each in self.questions) / self.tokens

    @property
    def same_answers(self) -> int:
        """Questions whose answers are the same from the first token to the last."""
        return sum(each.divergence is None for each in self.questions)

    @property
    def kl(self) -> tuple[float, ...]:
        """Of every token."""
        return tuple(value for each in self.questions for value in each.kl)

    @property
    def first_divergence(self) -> Divergence | None:
        """Of the first question that has one."""
        return next((each.divergence for each in self.questions if each.divergence is not None), None)

    def worst(self, stage: ComparedStage) -> float | None:
        """The largest error of a stage; None when no question has it."""
        found = [each.errors[stage] for each in self.questions if stage in each.errors]
        return max(found) if found else None


def divergence_of(first: Floats, second: Floats) -> Floats:
    """KL(first || second) of the softmax of each row of logits [n, V], in nats -> [n]."""
    left, right = (_log_softmax(logits.astype(np.float64)) for logits in (first, second))
    return np.maximum((np.exp(left) * (left - right)).sum(-1), 0.0).astype(np.float32)  # below 0 only by rounding


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
