"""TextVQA v0.5.1 val: LLaVA question file + annotations + answers -> soft accuracy over ten human answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

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
from runtime_bench.accuracy.score import Score, mean, percent
from runtime_bench.accuracy.textvqa_words import ARTICLES, CONTRACTIONS, NUMBERS

OCR_QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"  # the published protocol: with OCR hints
PLAIN_QUESTIONS = "llava_textvqa_val_v051.jsonl"
ANNOTATIONS = "TextVQA_0.5.1_val.json"
OCR_HINT = "Reference OCR token: "
MARKS = ';/[]"{}()=+\\_-><@`,?!'
# The published pattern "(?!<=\d)(\.)(?!\d)" mistypes its look-behind, which leaves: a dot that no digit follows.
LOOSE_DOT = re.compile(r"\.(?!\d)")
LOOSE_DOTS_REMOVED = 32  # re.UNICODE, passed in the place of the count


class Entry(DataRecord):
    """One question of the annotation file."""

    question: str
    image_id: str
    answers: Annotated[tuple[str, ...], Field(min_length=10, max_length=10)]


class Annotations(DataRecord):
    """The annotation file."""

    data: tuple[Entry, ...]


def normalize(text: str) -> str:
    """The answer processor of M4C / EvalAI as LLaVA ships it, its slips included."""
    lower = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    line = lower.replace("\n", " ").replace("\t", " ").strip()
    marked = line
    for mark in MARKS:
        beside_blank = f"{mark} " in line or f" {mark}" in line
        marked = marked.replace(mark, "" if beside_blank else " ")
    words = [NUMBERS.get(word, word) for word in LOOSE_DOT.sub("", marked, count=LOOSE_DOTS_REMOVED).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def question_of(prompt: str) -> str | None:
    """The question inside a saved prompt, lower case; None if the prompt has none of the published forms."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found.group(1).lower() if found else None
    if OCR_HINT in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(OCR_HINT.rstrip()) else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """Normalised human answer -> its score: each answer in turn is left out, min(1, matches among the others / 3)."""
    return {
        answer: mean(min(1.0, (answers.count(answer) - (left_out == answer)) / 3) for left_out in answers)
        for answer in set(answers)
    }


def questions(data: Path) -> list[Question]:
    """The questions with OCR hints; those without where the data has no other."""
    folder = benchmark_folder(data, "textvqa")
    return [
        Question(
            question_id=line.question_id,
            image=inside(folder / "train_images", line.image, "image"),
            text=line.text,
            prompt=line.text,
            group=f"{line.question_id} {line.text}",
        )
        for line in read_questions(existing(folder, OCR_QUESTIONS, PLAIN_QUESTIONS))
    ]


def score(data: Path, answers: Sequence[Answer]) -> Score:
    """Mean soft accuracy over the questions that have an answer."""
    folder = benchmark_folder(data, "textvqa")
    path = existing(folder, ANNOTATIONS)
    entries = read_json(path, Annotations).data
    expected = [(entry.image_id, entry.question.lower()) for entry in entries]
    latest = dict(zip(expected, entries, strict=True))  # of two entries with one key the script keeps the later
    joined = join(answers, expected, _key, "refuse", _asked(folder))
    items = [_item(latest[key], answer) for key, answer in zip(expected, joined.answers, strict=True) if answer]
    accuracy = mean(_number(item["score"]) for item in items) * 100
    hinted = [OCR_HINT in answer.prompt or answer.prompt.startswith("OCR tokens: ") for answer in answers]
    return Score(
        benchmark="textvqa",
        score=accuracy,
        metrics={
            "accuracy": accuracy,
            "samples": len(items),
            "ocr_hints_percent": percent(hinted),
            "unparsable_percent": percent(not item["pred_norm"] for item in items),
            "data_sha256": dict(sha256_of_files([path], folder)),
        },
        n_scored=len(items),
        n_expected=len(entries),
        warnings=(*joined.warnings, *_hint_warnings(hinted)),
        items=tuple(items),
    )


def _key(answer: Answer) -> tuple[str, str | None]:
    return str(answer.question_id), question_of(answer.prompt)


def _asked(folder: Path) -> list[tuple[str, str | None]]:
    for name in (OCR_QUESTIONS, PLAIN_QUESTIONS):
        if (folder / name).exists():
            return [(str(line.question_id), question_of(line.text)) for line in read_questions(folder / name)]
    return []


def _item(entry: Entry, answer: Answer) -> dict[str, JsonValue]:
    humans = [normalize(human) for human in entry.answers]
    prediction = normalize(answer.text)
    return {
        "question_id": entry.image_id,
        "question": entry.question,
        "score": soft_scores(humans).get(prediction, 0.0),
        "pred_norm": prediction,
        "gt_norm": list(humans),
    }


def _number(value: JsonValue) -> float:
    assert isinstance(value, float)
    return value


def _hint_warnings(hinted: list[bool]) -> list[str]:
    if all(hinted):
        return []
    without = "some" if any(hinted) else "all"
    return [
        f"{without} prompts come without OCR hints; the published numbers are with them "
        f"({OCR_QUESTIONS}; LLaVA-1.5 7B: 58 with, about 46 without), the two are not comparable"
    ]
