"""GQA testdev-balanced: LLaVA question file + annotations + answers -> exact-match accuracy and its breakdown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import Field, JsonValue

from bundle.staging import inside
from runtime_bench.accuracy.answers import Answer
from runtime_bench.accuracy.data_files import (
    DataRecord,
    benchmark_folder,
    existing,
    read_json,
    read_questions,
    sha256_of_files,
)
from runtime_bench.accuracy.join import join
from runtime_bench.accuracy.questions import Question
from runtime_bench.accuracy.score import Score, mean, percent, ratio

QUESTIONS = "llava_gqa_testdev_balanced.jsonl"
ANNOTATIONS = "testdev_balanced_questions.json"
FREE_STEPS = ("exist", "query: name", "choose name")  # operations that the official script does not count as a step


class Types(DataRecord):
    """What kind of question it is; every structural type but "query" has a binary answer."""

    structural: str
    semantic: str = ""


class Groups(DataRecord):
    """The group whose answer distributions are compared."""

    group: str | None = Field(default=None, alias="global")


class Step(DataRecord):
    """One operation of the question's program."""

    operation: str
    argument: str = ""


class Annotation(DataRecord):
    """What GQA knows of one question."""

    question: str
    answer: str
    types: Types
    balanced: bool = Field(default=True, alias="isBalanced")
    groups: Groups = Groups()
    semantic: tuple[Step, ...] = ()

    @property
    def steps(self) -> int:
        """Reasoning steps as the official script counts them."""
        texts = [f"{step.operation}: {step.argument}" for step in self.semantic]
        return sum(not any(free in text for free in FREE_STEPS) for text in texts)


def normalize(text: str) -> str:
    """Answer -> prediction: all trailing dots off, then lower case, nothing else ("Red. " keeps dot and blank)."""
    return text.rstrip(".").lower()


def questions(data: Path) -> list[Question]:
    """The questions in the order of the LLaVA question file."""
    folder = benchmark_folder(data, "gqa")
    return [
        Question(
            question_id=line.question_id,
            image=inside(folder / "images", line.image, "image"),
            text=line.text,
            prompt=line.text,
            group=str(line.question_id),
        )
        for line in read_questions(existing(folder, QUESTIONS))
    ]


def score(data: Path, answers: Sequence[Answer]) -> Score:
    """Accuracy over the balanced questions that have an answer."""
    folder = benchmark_folder(data, "gqa")
    path = existing(folder, ANNOTATIONS)
    annotations = read_json(path, dict[str, Annotation])
    balanced = [qid for qid, annotation in annotations.items() if annotation.balanced]
    free = {
        str(answer.question_id): normalize(answer.text)
        for answer in answers
        if str(answer.question_id) in annotations and not annotations[str(answer.question_id)].balanced
    }
    counted = [answer for answer in answers if str(answer.question_id) not in free]
    joined = join(counted, balanced, lambda answer: str(answer.question_id), "last", _asked(folder))
    predicted = {
        qid: normalize(answer.text) for qid, answer in zip(balanced, joined.answers, strict=True) if answer is not None
    }
    hits = {qid: prediction == annotations[qid].answer for qid, prediction in (predicted | free).items()}
    return Score(
        benchmark="gqa",
        score=percent(hits[qid] for qid in predicted),
        metrics=_metrics(annotations, predicted)
        | {
            "unparsable_percent": percent(not prediction for prediction in predicted.values()),
            "data_sha256": dict(sha256_of_files([path], folder)),
        },
        n_scored=len(predicted),
        n_expected=len(balanced),
        warnings=tuple(joined.warnings),
        items=tuple(
            {
                "question_id": qid,
                "prediction": prediction,
                "answer": annotations[qid].answer,
                "score": float(hits[qid]),
                "balanced": annotations[qid].balanced,
            }
            for qid, prediction in (predicted | free).items()
        ),
    )


def _asked(folder: Path) -> list[str]:
    path = folder / QUESTIONS
    return [str(line.question_id) for line in read_questions(path)] if path.exists() else []


def _metrics(annotations: dict[str, Annotation], predicted: dict[str, str]) -> dict[str, JsonValue]:
    """The numbers that the official eval.py prints, and its breakdowns."""
    scored = [(annotations[qid], float(prediction == annotations[qid].answer)) for qid, prediction in predicted.items()]
    return {
        "accuracy": percent(hit for _, hit in scored),
        "binary": percent(hit for annotation, hit in scored if annotation.types.structural != "query"),
        "open": percent(hit for annotation, hit in scored if annotation.types.structural == "query"),
        "validity": 0.0,  # printed as 0 by the official script when it has no choices file
        "plausibility": 0.0,
        "distribution": _distribution(annotations, predicted),
        "per_structural_type": _by((annotation.types.structural, hit) for annotation, hit in scored),
        "per_semantic_type": _by((annotation.types.semantic, hit) for annotation, hit in scored),
        "per_steps": _by((str(annotation.steps), hit) for annotation, hit in scored),
        "per_words": _by((str(len(annotation.question.split())), hit) for annotation, hit in scored),
    }


def _by(pairs: Iterable[tuple[str, float]]) -> dict[str, JsonValue]:
    groups: dict[str, list[float]] = defaultdict(list)
    for name, hit in pairs:
        groups[name].append(hit)
    return {name: mean(groups[name]) * 100 for name in sorted(groups)}


def _distribution(annotations: dict[str, Annotation], predicted: dict[str, str]) -> float | None:
    """Chi square between gold and predicted answers of each global group, weighted by its size, / 100.

    None where no question has a group: the official script divides by zero there.
    """
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    guess: dict[str, Counter[str]] = defaultdict(Counter)
    for qid, prediction in predicted.items():
        group = annotations[qid].groups.group
        if group is not None:
            gold[group][annotations[qid].answer] += 1
            guess[group][prediction] += 1
    if not gold:
        return None
    weighted = 0.0
    for group, counts in gold.items():
        distance = sum((guess[group][answer] - count) ** 2 / count for answer, count in counts.items())
        weighted += distance * counts.total()
    return ratio(weighted, sum(counts.total() for counts in gold.values())) / 100
