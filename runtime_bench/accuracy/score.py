"""The verdict on one answer file: Score, the JSON object that ``alignkd-bench score --json`` prints last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

BenchmarkName = Literal["gqa", "sqa", "textvqa", "pope", "mme", "mmbench"]


class Score(BaseModel):
    """Score of one benchmark on its published scale.

    Attributes:
        protocol: whose prompts and verdicts: LLaVA's scripts; MMBench's letters by VLMEvalKit's exact matching.
        score: percent; POPE mean F1 x 100; MME perception, 0..2000; MMBench circular percent.
        metrics: the official script's other numbers, sha256 of the data, share of answers without a verdict.
        n_scored: answers that were scored; n_expected: questions in the data.
        warnings: what a reader must know before comparing the number.
        items: one verdict per scored answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    benchmark: BenchmarkName
    protocol: str = "llava"
    score: float
    metrics: dict[str, JsonValue]
    n_scored: int
    n_expected: int
    warnings: tuple[str, ...] = ()
    items: tuple[dict[str, JsonValue], ...] = ()


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean, 0 for no values."""
    listed: Sequence[float] = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def percent(hits: Iterable[bool | float]) -> float:
    """Mean x 100, 0 for no values."""
    return mean(float(hit) for hit in hits) * 100


def ratio(part: float, whole: float) -> float:
    """part / whole, 0 where there is no whole."""
    return part / whole if whole else 0.0
