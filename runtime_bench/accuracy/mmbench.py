"""MMBench dev (en): TSV + answers -> circular accuracy, letters by VLMEvalKit's exact-matching rule."""

from __future__ import annotations

import base64
import binascii
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from bundle.errors import UsageError
from runtime_bench.accuracy.answers import Answer
from runtime_bench.accuracy.data_files import benchmark_folder, sha256_of_files
from runtime_bench.accuracy.join import join
from runtime_bench.accuracy.mmbench_table import PROMPT_LETTERS, Row, Table, find_tables, read_table
from runtime_bench.accuracy.questions import LETTER_ANSWER, Question
from runtime_bench.accuracy.score import Score, mean, percent

NO_ANSWER = "Z"
BLANKED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
LAST_WORDS = 4  # an option letter counts as the answer if its first place is among so many last words
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
API_FAILURE = "Failed to obtain answer via API"
ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
LONGEST_REFERENCE = 64  # a shorter "image" is the index of the row that has the picture


def parse(text: str, choices: Mapping[str, str]) -> str | None:
    """Read the letter of ``choices`` (letter -> option text); "Z" is a refusal, None is no verdict.

    In this order: a refusal; one single option letter as a word near the end; "answer is X"; one single option whose
    text the answer contains.
    """
    if API_FAILURE not in text:
        if any(refusal in text for refusal in REFUSALS):
            return NO_ANSWER
        letter = _letter(text.translate(BLANKED).split(), choices)
        if letter:
            return letter
        said = ANSWER_IS.search(text)
        if said and said.group(1).upper() in choices:
            return said.group(1).upper()
    return _by_text(text.lower(), choices)


def _letter(words: list[str], choices: Mapping[str, str]) -> str | None:
    present = [letter for letter in choices if letter in words]
    if not present:
        return NO_ANSWER if NO_ANSWER in words else None
    if len(present) == 1 and words.index(present[0]) >= len(words) - LAST_WORDS:
        return present[0]
    return None


def _by_text(answer: str, choices: Mapping[str, str]) -> str | None:
    if len(answer) > 2 * sum(len(option) for option in choices.values()):
        return None
    contained = [letter for letter, option in choices.items() if option.lower() in answer]
    return contained[0] if len(contained) == 1 else None


def questions(data: Path) -> list[Question]:
    """One question a row, rotations included."""
    table = read_table(_candidates(data)[0])
    return [_question(row, table) for row in table.rows.values()]


def _question(row: Row, table: Table) -> Question:
    letters = PROMPT_LETTERS[: len(row.options)]
    lines = [f"{letter}. {option}" for letter, option in zip(letters, row.options, strict=True)]
    prompt = "\n".join([*([row.hint] if row.hint else []), row.question, *lines])
    return Question(
        question_id=row.index,
        image=_picture(row, table),
        text=f"{prompt}\n{LETTER_ANSWER}",
        prompt=prompt,  # unlike the other benchmarks', saved without the suffix
        group=str(row.base),
        extra={"round_id": 0, "options": list(row.options), "option_char": list(letters)},
    )


def _picture(row: Row, table: Table) -> bytes:
    image = row.image
    if len(image) <= LONGEST_REFERENCE and image.isdigit() and int(image) in table.rows:
        image = table.rows[int(image)].image
    try:
        return base64.b64decode(image, validate=True)
    except binascii.Error as error:
        raise UsageError(f"{table.path}: the image of index {row.index} is not base64 ({error})") from error


def score(data: Path, answers: Sequence[Answer]) -> Score:
    """Circular accuracy over the questions that have an answer: right only if every rotation is."""
    paths = _candidates(data)
    table = _table_of(answers, paths)
    rows = list(table.rows.values())
    keys = [str(row.index) for row in rows]
    joined = join(answers, keys, lambda answer: str(answer.question_id), "last", keys)
    items = [_item(row, answer) for row, answer in zip(rows, joined.answers, strict=True) if answer is not None]
    circular = _circular(items, table)
    return Score(
        benchmark="mmbench",
        score=percent(circular.values()),
        metrics={
            "circular": percent(circular.values()),
            "vanilla_all": percent(bool(item["correct"]) for item in items),
            "vanilla_base": percent(bool(item["correct"]) for item in items if item["question_id"] == item["base"]),
            "n_questions": len(circular),
            "circular_per_question": {str(base): int(hit) for base, hit in circular.items()},
            "per_category": _per({base: table.rows[base].category for base in circular}, circular),
            "per_l2_category": _per({base: table.rows[base].l2_category for base in circular}, circular),
            "letter_rule": "vlmevalkit exact_matching",
            "table": table.path.name,
            "unparsable_percent": percent(item["letter"] is None for item in items),
            "data_sha256": dict(sha256_of_files([table.path], table.path.parent)),
        },
        n_scored=len(items),
        n_expected=len(rows),
        warnings=(*joined.warnings, *_warnings(table, len(paths), items)),
        items=tuple(items),
    )


def _candidates(data: Path) -> list[Path]:
    return [data] if data.is_file() else find_tables(benchmark_folder(data, "mmbench"))


def _table_of(answers: Sequence[Answer], paths: list[Path]) -> Table:
    """Of several tables, the one that knows most answers, then the one with fewest rows that lack one."""
    given = {str(answer.question_id) for answer in answers}

    def misfit(table: Table) -> tuple[int, int]:
        known = {str(index) for index in table.rows}
        return len(given - known), len(known - given)

    return min((read_table(path) for path in paths), key=misfit)


def _item(row: Row, answer: Answer) -> dict[str, JsonValue]:
    letter = parse(answer.text, row.choices)
    return {
        "question_id": row.index,
        "base": row.base,
        "letter": letter,
        "answer": row.answer,
        "correct": letter == row.answer,
    }


def _circular(items: list[dict[str, JsonValue]], table: Table) -> dict[int, bool]:
    """Index of each answered question -> whether all its rows were answered rightly; a missing row is not right."""
    right = {item["question_id"]: bool(item["correct"]) for item in items}
    rotations: dict[int, list[int]] = defaultdict(list)
    for index, row in table.rows.items():
        rotations[row.base].append(index)
    return {
        base: all(right.get(index, False) for index in indices)
        for base, indices in rotations.items()
        if base in table.rows and any(index in right for index in indices)
    }


def _per(names: dict[int, str], circular: dict[int, bool]) -> dict[str, JsonValue]:
    groups: dict[str, list[float]] = defaultdict(list)
    for base, name in names.items():
        if name:
            groups[name].append(float(circular[base]))
    return {name: mean(groups[name]) * 100 for name in sorted(groups)}


def _warnings(table: Table, n_tables: int, items: list[dict[str, JsonValue]]) -> list[str]:
    warnings = []
    if n_tables > 1 and len(items) < len(table.rows):
        warnings.append(f"{n_tables} tables in {table.path.parent}; scored against {table.path.name}")
    cut = sum(row.cut for row in table.rows.values())
    if cut:
        warnings.append(
            f"{cut} rows have an option that reads as a missing value (None, NA, null, ...); as in the published "
            "script the options of the prompt end there"
        )
    if all(index == row.base for index, row in table.rows.items()):
        warnings.append(f"{table.path.name} has no rotated rows: circular accuracy equals plain accuracy here")
    answered = {item["question_id"] for item in items}
    bases = {row.base for index, row in table.rows.items() if index in answered}
    partial = len({row.base for index, row in table.rows.items() if row.base in bases and index not in answered})
    if partial:
        warnings.append(f"{partial} questions lack the answer to a rotation; they count as not right")
    orphans = {row.base for row in table.rows.values()} - set(table.rows)
    if orphans:
        warnings.append(f"{len(orphans)} questions have rotated rows only and are left out, as in VLMEvalKit")
    return warnings
