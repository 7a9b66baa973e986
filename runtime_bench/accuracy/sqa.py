"""ScienceQA-IMG test: LLaVA question file + problems + answers -> accuracy on the questions that have a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, JsonValue

from bundle.errors import UsageError
from bundle.staging import inside
from runtime_bench.accuracy.answers import Answer
from runtime_bench.accuracy.data_files import DataRecord, benchmark_folder, existing, read_json, sha256_of_files
from runtime_bench.accuracy.join import join
from runtime_bench.accuracy.questions import LETTER_ANSWER, Question
from runtime_bench.accuracy.score import Score, percent

QUESTIONS = "llava_test_CQM-A.json"
LETTERS = "ABCDE"
FAILED = "FAILED"
SENTENCE = re.compile("The answer is ([A-Z]).")  # the dot is any character, but one must follow: as published
IMAGE = "<image>"
BENCHMARK_LAYOUT = "\nOptions: (A) "  # only the file that convert_sqa_to_llava makes has this line


class Turn(DataRecord):
    """One turn of a conversation in the LLaVA question file."""

    speaker: str = Field(alias="from")
    value: str


class Line(DataRecord):
    """One entry of the LLaVA question file."""

    id: str
    image: str | None = None
    conversations: Annotated[tuple[Turn, ...], Field(min_length=1)]


class Problem(DataRecord):
    """What ScienceQA knows of one question."""

    choices: tuple[str, ...]
    answer: Annotated[int, Field(ge=0)]
    image: str | None = None
    split: str = "test"


class Choice(str):
    """The letter that the official script reads, "FAILED" if it reads none.

    Attributes:
        pred_idx: index of the choice, -1 if there is none of that letter.
    """

    pred_idx: int

    def __new__(cls, letter: str, n_choices: int) -> Choice:
        choice = super().__new__(cls, letter)
        choice.pred_idx = LETTERS[:n_choices].find(letter) if len(letter) == 1 else -1
        return choice


def parse(text: str, n_choices: int) -> Choice:
    """Read the letter: alone, or in front ("B. apostrophe"), or in exactly one "The answer is B." """
    if len(text) == 1 and text in LETTERS:
        return Choice(text, n_choices)
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return Choice(text[0], n_choices)
    found = SENTENCE.findall(text)
    return Choice(found[0] if len(found) == 1 else FAILED, n_choices)


def questions(data: Path) -> list[Question]:
    """The questions in the order of the LLaVA question file, those without a picture too."""
    folder = benchmark_folder(data, "sqa")
    return [_question(line, folder) for line in read_json(existing(folder, QUESTIONS), list[Line])]


def _question(line: Line, folder: Path) -> Question:
    text = line.conversations[0].value.replace(IMAGE, "").strip() + "\n" + LETTER_ANSWER
    return Question(
        question_id=line.id,
        image=inside(folder / "images" / "test", line.image, "image") if line.image else None,
        text=text,
        prompt=f"{IMAGE}\n{text}" if line.image else text,
        group=line.id,
    )


def score(data: Path, answers: Sequence[Answer]) -> Score:
    """IMG-accuracy over the test questions that have a picture in problems.json and an answer."""
    folder = benchmark_folder(data, "sqa")
    paths = [existing(folder, "problems.json"), existing(folder, "pid_splits.json", "problems.json")]
    problems = _test_problems(*paths)
    asked = [line.id for line in read_json(folder / QUESTIONS, list[Line])] if (folder / QUESTIONS).exists() else []
    joined = join(answers, list(problems), lambda answer: str(answer.question_id), "last", asked)
    items = [
        _item(pid, problem, answer)
        for (pid, problem), answer in zip(problems.items(), joined.answers, strict=True)
        if answer is not None
    ]
    by_prompt = [IMAGE in answer.prompt for answer in joined.answers if answer is not None]
    pictured = [bool(item["correct"]) for item in items if item["is_multimodal"]]
    correct = [bool(item["correct"]) for item in items]
    n_pictured = sum(bool(problem.image) for problem in problems.values())
    return Score(
        benchmark="sqa",
        score=percent(pictured),
        metrics={
            "img_accuracy": percent(pictured),
            "img_accuracy_official": percent(
                hit for hit, with_image in zip(correct, by_prompt, strict=True) if with_image
            ),
            "accuracy": 100 * sum(correct) / len(problems),  # as published: a missing answer is a wrong one here
            "total": len(problems),
            "correct": sum(correct),
            "n_img_scored": len(pictured),
            "n_img_expected": n_pictured,
            "unparsable_percent": percent(item["parsed"] == FAILED for item in items),
            "data_sha256": dict(sha256_of_files(sorted(set(paths)), folder)),
        },
        n_scored=len(items),
        n_expected=len(problems),
        warnings=(*joined.warnings, *_warnings(items, by_prompt, answers, len(pictured), n_pictured)),
        items=tuple(items),
    )


def _test_problems(problems_path: Path, splits_path: Path) -> dict[str, Problem]:
    problems = read_json(problems_path, dict[str, Problem])
    if splits_path == problems_path:
        return {pid: problem for pid, problem in problems.items() if problem.split == "test"}
    test = read_json(splits_path, dict[str, list[str]]).get("test", [])
    absent = [pid for pid in test if pid not in problems]
    if absent or not test:
        raise UsageError(
            f"{splits_path}: "
            + (f"'test' names '{absent[0]}', which {problems_path.name} lacks" if absent else "no 'test'")
        )
    return {pid: problems[pid] for pid in test}


def _item(pid: str, problem: Problem, answer: Answer) -> dict[str, JsonValue]:
    choice = parse(answer.text, len(problem.choices))
    return {
        "question_id": pid,
        "parsed": str(choice),
        "pred_idx": choice.pred_idx,
        "answer": problem.answer,
        "correct": choice.pred_idx == problem.answer,
        "is_multimodal": bool(problem.image),
    }


def _warnings(
    items: list[dict[str, JsonValue]], by_prompt: list[bool], answers: Sequence[Answer], scored: int, expected: int
) -> list[str]:
    warnings = []
    if scored < expected:
        warnings.append(f"IMG accuracy is over {scored} of {expected} questions with a picture")
    differing = sum(item["is_multimodal"] != with_image for item, with_image in zip(items, by_prompt, strict=True))
    if differing:
        warnings.append(
            f"{differing} prompts disagree with problems.json on having a picture; problems.json decides here, "
            "the prompts in the published script (metrics.img_accuracy_official)"
        )
    if any(BENCHMARK_LAYOUT in answer.prompt for answer in answers):
        warnings.append(
            f"the prompts are of convert_sqa_to_llava.py ('Options: (A) ...'), not of the published {QUESTIONS} "
            "('A. ...'); scores of the two are not comparable"
        )
    return warnings
