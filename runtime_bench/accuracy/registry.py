"""Name of a benchmark -> its questions, its scorer, and how the published scripts run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime_bench.accuracy import gqa, mmbench, mme, pope, sqa, textvqa
from runtime_bench.accuracy.answers import Answer
from runtime_bench.accuracy.questions import Question
from runtime_bench.accuracy.score import BenchmarkName, Score


@dataclass(frozen=True)
class Benchmark:
    """How to ask and how to score.

    Attributes:
        crop: the picture is cropped to a square (CLIP's own preprocessing) instead of padded.
    """

    title: str
    questions: Callable[[Path], list[Question]]
    score: Callable[[Path, Sequence[Answer]], Score]
    max_new_tokens: int
    crop: bool = False


BENCHMARKS: dict[BenchmarkName, Benchmark] = {
    "gqa": Benchmark("GQA accuracy %", gqa.questions, gqa.score, 128),
    "sqa": Benchmark("ScienceQA IMG-accuracy %", sqa.questions, sqa.score, 1024, crop=True),
    "textvqa": Benchmark("TextVQA accuracy %", textvqa.questions, textvqa.score, 128),
    "pope": Benchmark("POPE mean F1 %", pope.questions, pope.score, 128),
    "mme": Benchmark("MME perception", mme.questions, mme.score, 128),
    "mmbench": Benchmark("MMBench circular %", mmbench.questions, mmbench.score, 1024),
}
