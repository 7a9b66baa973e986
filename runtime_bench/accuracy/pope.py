"""POPE (random, popular, adversarial): LLaVA question file + labels + answers -> mean of the three F1 scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from bundle.errors import UsageError
from bundle.staging import inside
from runtime_bench.accuracy.answers import Answer
from runtime_bench.accuracy.data_files import (
    DataRecord,
    LoaderLine,
    benchmark_folder,
    existing,
    read_jsonl,
    read_questions,
    sha256_of_files,
)
from runtime_bench.accuracy.join import join
from runtime_bench.accuracy.questions import SHORT_ANSWER, Question
from runtime_bench.accuracy.score import Score, mean, percent, ratio

QUESTIONS = "llava_pope_test.jsonl"
LABELS = "coco"
CATEGORIES = ("adversarial", "popular", "random")

Verdict = Literal["yes", "no"]


class Label(DataRecord):
    """A line of coco_pope_<category>.json, which is jsonl."""

    image: str
    text: str
    label: Verdict


@dataclass(frozen=True)
class Asked:
    """A question and its label."""

    question_id: str
    category: str
    label: Verdict


def parse(text: str) -> Verdict:
    """ "no" if one of the words No, no, not stands before the first dot; everything else is "yes", even nothing."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def questions(data: Path) -> list[Question]:
    """The questions of the three categories in the order of the LLaVA question file."""
    folder = benchmark_folder(data, "pope")
    return [
        Question(
            question_id=line.question_id,
            image=inside(folder / "val2014", line.image, "image"),
            text=line.text,
            prompt=line.text,
            group=str(line.question_id),
        )
        for line in read_questions(existing(folder, QUESTIONS))
    ]


def score(data: Path, answers: Sequence[Answer]) -> Score:
    """Mean F1 x 100 over the categories that have answers; joined by question id, never by line."""
    folder = benchmark_folder(data, "pope")
    lines = read_questions(existing(folder, QUESTIONS))
    labels = sorted(existing(folder, LABELS).glob("coco_pope_*.json"))
    if not labels:
        raise UsageError(f"{folder / LABELS} has no coco_pope_<category>.json")
    asked = [item for path in labels for item in _labelled(path, lines)]
    order = [str(line.question_id) for line in lines]
    joined = join(answers, [item.question_id for item in asked], _key, "refuse", order)
    items = [_item(item, answer) for item, answer in zip(asked, joined.answers, strict=True) if answer is not None]
    per_category = {
        category: _confusion([item for item in items if item["category"] == category])
        for category in sorted({str(item["category"]) for item in items})
    }
    said = [answer.text for answer in joined.answers if answer is not None]
    return Score(
        benchmark="pope",
        score=mean(numbers["F1 score"] for numbers in per_category.values()) * 100,
        metrics={
            "mean_f1_percent": mean(numbers["F1 score"] for numbers in per_category.values()) * 100,
            "mean_accuracy_percent": mean(numbers["Accuracy"] for numbers in per_category.values()) * 100,
            "per_category": {category: dict(numbers) for category, numbers in per_category.items()},
            # the published parser has no "unknown": these count as yes
            "unparsable_percent": percent(parse(text) == "yes" and "yes" not in text.lower() for text in said),
            "data_sha256": dict(sha256_of_files([folder / QUESTIONS, *labels], folder)),
        },
        n_scored=joined.n_scored,
        n_expected=len(asked),
        warnings=(*joined.warnings, *_warnings(per_category)),
        items=tuple(items),
    )


def _key(answer: Answer) -> str:
    return str(answer.question_id)


def _labelled(path: Path, lines: list[LoaderLine]) -> list[Asked]:
    """Label file of one category + all questions -> that category's questions with their labels.

    The label file numbers its questions from 1 again, so they meet by image and text; the two public versions of the
    data differ by a typing error in the text ("imange").
    """
    category = path.stem.removeprefix("coco_pope_")
    labels: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for _, label in read_jsonl(path, Label):
        labels[_identity(label.image, label.text)].append(label.label)
    asked = []
    for line in lines:
        if line.category != category:
            continue
        known = labels[_identity(line.image, line.text)]
        if not known:
            raise UsageError(
                f"{path} has no label for question_id '{line.question_id}' ({line.image}) of {QUESTIONS}; "
                "questions and labels must be of one POPE version (LLaVA's is 2910 + 3000 + 3000 questions)"
            )
        asked.append(Asked(str(line.question_id), category, known.pop(0)))
    ids = {item.question_id for item in asked}
    if len(ids) < len(asked):
        raise UsageError(f"{QUESTIONS}: category '{category}' repeats a question_id; ids must be unique")
    return asked


def _identity(image: str, text: str) -> tuple[str, str]:
    return image, text.replace(SHORT_ANSWER, "").strip().replace("imange", "image")


def _item(asked: Asked, answer: Answer) -> dict[str, JsonValue]:
    parsed = parse(answer.text)
    return {
        "question_id": answer.question_id,
        "category": asked.category,
        "parsed": parsed,
        "label": asked.label,
        "correct": parsed == asked.label,
    }


def _confusion(items: list[dict[str, JsonValue]]) -> dict[str, float]:
    """The numbers that eval_pope.py prints, under its names; 0 where it would divide by zero."""
    pairs = [(item["parsed"] == "yes", item["label"] == "yes") for item in items]
    true_yes, false_yes = pairs.count((True, True)), pairs.count((True, False))
    true_no, false_no = pairs.count((False, False)), pairs.count((False, True))
    precision = ratio(true_yes, true_yes + false_yes)
    recall = ratio(true_yes, true_yes + false_no)
    return {
        "TP": true_yes,
        "FP": false_yes,
        "TN": true_no,
        "FN": false_no,
        "Accuracy": ratio(true_yes + true_no, len(pairs)),
        "Precision": precision,
        "Recall": recall,
        "F1 score": ratio(2 * precision * recall, precision + recall),
        "Yes ratio": ratio(true_yes + false_yes, len(pairs)),
    }


def _warnings(per_category: dict[str, dict[str, float]]) -> list[str]:
    warnings = []
    absent = [category for category in CATEGORIES if category not in per_category]
    if absent:
        warnings.append(
            f"the score is the mean over {', '.join(per_category)} only; no answers to: {', '.join(absent)}"
        )
    for category, numbers in per_category.items():
        if not numbers["TP"]:
            warnings.append(f"category '{category}' has no true yes: F1 is 0 here, an error in the published script")
    return warnings
