"""Expected questions + answers -> the answer of each question, and warnings on what is missing, double or misplaced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bundle.errors import UsageError
from runtime_bench.accuracy.answers import Answer

SHOWN = 3  # ids named in a warning


@dataclass
class Joined:
    """``answers[i]`` answers the i-th expected question; None is missing."""

    answers: list[Answer | None]
    warnings: list[str] = field(default_factory=list)

    @property
    def n_scored(self) -> int:
        """Questions that have an answer."""
        return sum(answer is not None for answer in self.answers)


def join(
    answers: Sequence[Answer],
    expected: Sequence[Hashable],
    key: Callable[[Answer], Hashable],
    duplicates: Literal["refuse", "last"],
    asked: Sequence[Hashable] = (),
) -> Joined:
    """Match answers to questions by key, never by line.

    Args:
        expected: the key of every question; a key that stands k times takes k answers, in their order.
        key: the key of an answer; one that is not in ``expected`` is reported and left out.
        duplicates: what an answer too many does: end with an error, or replace the one before as the published
            script's dictionary does (with a warning).
        asked: the keys in the order of the question file, where that order is known.

    Raises:
        UsageError: no answer belongs to the data, or a duplicate that is to be refused.
    """
    known = {name: 0 for name in expected}
    given: dict[Hashable, list[Answer]] = defaultdict(list)
    unknown: list[Answer] = []
    for answer in answers:
        name = key(answer)
        if name in known:
            given[name].append(answer)
        else:
            unknown.append(answer)
    if not given:
        raise UsageError(_nothing_joined(answers, expected))
    joined = Joined([], _misplaced([key(answer) for answer in answers], asked))
    for name in expected:
        place, known[name] = known[name], known[name] + 1
        joined.answers.append(given[name][place] if place < len(given[name]) else None)
    extra = {name: found[known[name] :] for name, found in given.items() if len(found) > known[name]}
    if extra and duplicates == "refuse":
        first = min((many[0] for many in extra.values()), key=answers.index)
        raise UsageError(
            f"{first.where}: a second answer to question_id '{first.question_id}'; keep one line per question"
        )
    for index, name in enumerate(expected):
        if name in extra:
            joined.answers[index] = extra[name][-1]
    missing = [name for name, answer in zip(expected, joined.answers, strict=True) if answer is None]
    joined.warnings += _incomplete(missing, [many[0] for many in extra.values()], unknown, len(expected))
    return joined


def _incomplete(missing: list[Hashable], doubled: list[Answer], unknown: list[Answer], expected: int) -> list[str]:
    warnings = []
    if missing:
        warnings.append(
            f"{len(missing)} of {expected} questions have no answer; the score covers the others "
            f"(first missing: {_names(missing)})"
        )
    if doubled:
        warnings.append(
            f"{len(doubled)} questions are answered twice; the last answer counts, as in the published script "
            f"(first: {_at(doubled[0])})"
        )
    if unknown:
        warnings.append(f"{len(unknown)} answers match no question of the data, left out (first: {_at(unknown[0])})")
    return warnings


def _misplaced(found: Sequence[Hashable], asked: Sequence[Hashable]) -> list[str]:
    """A warning if the answers' keys do not follow the order of the question file; repeated keys are passed over."""
    place = {name: position for position, name in enumerate(asked)}
    positions = [place[name] for name in found if name in place]
    if all(before <= after for before, after in zip(positions, positions[1:], strict=False)):
        return []
    return ["the answers are not in the order of the question file; they were joined by id, not by line"]


def _nothing_joined(answers: Sequence[Answer], expected: Sequence[Hashable]) -> str:
    first = f"first answer: {_at(answers[0])}; " if answers else ""
    return (
        f"none of {len(answers)} answers belongs to the {len(expected)} questions of the data ({first}the data has: "
        f"{_names(expected)}); give --benchmark, --data and --answers of the same benchmark"
    )


def _at(answer: Answer) -> str:
    return f"{answer.where} question_id '{answer.question_id}'".strip()


def _names(names: Sequence[Hashable]) -> str:
    return ", ".join(" | ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in names[:SHOWN])
