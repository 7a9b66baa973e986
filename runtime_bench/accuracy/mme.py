"""MME: LLaVA question file + ground-truth folders + answers -> perception (0..2000) and cognition (0..800)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from bundle.errors import UsageError
from bundle.staging import inside
from runtime_bench.accuracy.answers import Answer
from runtime_bench.accuracy.data_files import benchmark_folder, existing, read_questions
from runtime_bench.accuracy.join import join
from runtime_bench.accuracy.questions import SHORT_ANSWER, Question
from runtime_bench.accuracy.score import Score, percent, ratio

QUESTIONS = "llava_mme.jsonl"
FOLDERS = ("MME_Benchmark_release_version", "images")
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_OR_NO = "Please answer yes or no."
LINE_BREAKERS = str.maketrans("\t\n\r", "   ")  # each would break the published result files, which are tab-separated

Verdict = Literal["yes", "no", "other"]


@dataclass(frozen=True)
class Truth:
    """One line of a ground-truth file; ``pair`` numbers the pairs of lines that are scored together."""

    category: str
    file: str
    question: str
    label: Literal["yes", "no"]
    pair: int

    @property
    def key(self) -> tuple[str, str, str]:
        """What an answer is joined by."""
        return self.category, self.file, self.question


def parse(text: str) -> Verdict:
    """Lower case; "yes" or "no" anywhere in the first four characters, yes first; else "other"."""
    start = text.lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def questions(data: Path) -> list[Question]:
    """The questions in the order of the LLaVA question file, two to an image."""
    folder = benchmark_folder(data, "mme")
    pictures = existing(folder, *FOLDERS)
    return [
        Question(
            question_id=line.question_id,
            image=inside(pictures, line.image, "image"),
            text=line.text,
            prompt=line.text,
            group=str(line.question_id),
        )
        for line in read_questions(existing(folder, QUESTIONS))
    ]


def score(data: Path, answers: Sequence[Answer]) -> Score:
    """Sum of the perception categories' scores; a category's score is 100 x accuracy + 100 x accuracy per image."""
    folder = benchmark_folder(data, "mme")
    root = existing(folder, *FOLDERS)
    truths = [truth for category in PERCEPTION + COGNITION for truth in _ground_truth(root, category)]
    if not truths:
        raise UsageError(f"{root} has none of MME's category folders ({', '.join(PERCEPTION + COGNITION)})")
    labels = {truth.key: truth for truth in truths}  # of two lines with one question the script keeps the later
    joined = join(
        answers, [truth.key for truth in truths], lambda answer: _key(answer, labels), "refuse", _asked(folder, labels)
    )
    answered = [(truth, answer) for truth, answer in zip(truths, joined.answers, strict=True) if answer is not None]
    items = [_item(labels[truth.key], answer) for truth, answer in answered]
    pairs = [(truth.file, truth.pair) for truth, _ in answered]
    details = {
        category: _category(category, items, pairs)
        for category in PERCEPTION + COGNITION
        if any(item["category"] == category for item in items)
    }
    perception = sum(details[category]["score"] for category in PERCEPTION if category in details)
    cognition = sum(details[category]["score"] for category in COGNITION if category in details)
    return Score(
        benchmark="mme",
        score=perception,
        metrics={
            "perception": perception,
            "cognition": cognition if any(category in details for category in COGNITION) else None,
            "categories": {category: numbers["score"] for category, numbers in details.items()},
            "details": {category: dict(numbers) for category, numbers in details.items()},
            "unparsable_percent": percent(item["parsed"] == "other" for item in items),
            "data_sha256": {root.name: _sha256_of_truths(truths)},
        },
        n_scored=len(items),
        n_expected=len(truths),
        warnings=(*joined.warnings, *_warnings(details, answered)),
        items=tuple(items),
    )


def _ground_truth(root: Path, category: str) -> list[Truth]:
    folder = root / category
    if (folder / "images").is_dir():
        folder = folder / "questions_answers_YN"
    return [truth for path in sorted(folder.glob("*.txt")) for truth in _truths_of(path, category)]


def _truths_of(path: Path, category: str) -> list[Truth]:
    truths: list[Truth] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    for number, line in enumerate(lines, start=1):
        question, _, label = line.strip().partition("\t")
        match label.lower():
            case "yes" | "no" as verdict:
                truths.append(Truth(category, path.name, question, verdict, len(truths) // 2))
            case _ if line.strip():
                raise UsageError(f"{path}:{number} is not 'question<tab>Yes' or 'question<tab>No'")
    return truths


def _key(answer: Answer, labels: dict[tuple[str, str, str], Truth]) -> tuple[str, str, str]:
    """Undo what the LLaVA question file did to the question: some ground-truth lines have two blanks there."""
    return _key_of(str(answer.question_id), answer.prompt, labels)


def _key_of(question_id: str, prompt: str, labels: dict[tuple[str, str, str], Truth]) -> tuple[str, str, str]:
    *_, name = path = question_id.split("/")
    file = name.split(".")[0] + ".txt"
    question = prompt.replace(SHORT_ANSWER, "").strip() if SHORT_ANSWER in prompt else prompt
    if YES_OR_NO in question:
        return path[0], file, question
    one_blank = (path[0], file, f"{question} {YES_OR_NO}")
    return one_blank if one_blank in labels else (path[0], file, f"{question}  {YES_OR_NO}")


def _asked(folder: Path, labels: dict[tuple[str, str, str], Truth]) -> list[tuple[str, str, str]]:
    path = folder / QUESTIONS
    if not path.exists():
        return []
    return [_key_of(str(line.question_id), line.text, labels) for line in read_questions(path)]


def _item(truth: Truth, answer: Answer) -> dict[str, JsonValue]:
    parsed = parse(answer.text.translate(LINE_BREAKERS))
    return {
        "question_id": answer.question_id,
        "category": truth.category,
        "question": truth.question,
        "parsed": parsed,
        "label": truth.label,
        "correct": parsed == truth.label,
    }


def _category(category: str, items: list[dict[str, JsonValue]], pairs: list[tuple[str, int]]) -> dict[str, float]:
    """Accuracy over the answered questions, and over their images, where both questions must be right."""
    hits: dict[tuple[str, int], list[bool]] = {}
    for item, pair in zip(items, pairs, strict=True):
        if item["category"] == category:
            hits.setdefault(pair, []).append(bool(item["correct"]))
    both = sum(len(pair) == 2 and all(pair) for pair in hits.values())
    right = sum(sum(pair) for pair in hits.values())
    asked = sum(len(pair) for pair in hits.values())
    acc, acc_plus = ratio(right, asked), ratio(both, len(hits))
    return {
        "score": acc * 100 + acc_plus * 100,
        "acc": acc,
        "acc_plus": acc_plus,
        "questions": asked,
        "images": len(hits),
    }


def _warnings(details: dict[str, dict[str, float]], answered: list[tuple[Truth, Answer]]) -> list[str]:
    warnings = []
    present = [category for category in PERCEPTION if category in details]
    if len(present) < len(PERCEPTION):
        warnings.append(
            f"perception is the sum of {len(present)} of {len(PERCEPTION)} categories "
            f"(at most {200 * len(present)} instead of 2000): {', '.join(present) or 'none'}"
        )
    absent = [category for category in COGNITION if category not in details]
    if absent:
        warnings.append(f"cognition lacks {', '.join(absent)}")
    per_image = Counter((truth.category, truth.file, truth.pair) for truth, _ in answered)
    single = sum(count == 1 for count in per_image.values())
    if single:
        warnings.append(f"{single} images have an answer to one of their two questions only; they count as not right")
    broken = sum(answer.text != answer.text.translate(LINE_BREAKERS) for _, answer in answered)
    if broken:
        warnings.append(
            f"{broken} answers hold tabs or newlines, which break the published script; read as blanks here"
        )
    return warnings


def _sha256_of_truths(truths: list[Truth]) -> str:
    lines = "".join(f"{truth.category}/{truth.file}\t{truth.question}\t{truth.label}\n" for truth in truths)
    return hashlib.sha256(lines.encode()).hexdigest()
