"""Bundle + data root -> an answer file per benchmark, resumed where it stopped, and its Score."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bundle.errors import UsageError
from bundle.image import open_image, resize
from bundle.manifest import MANIFEST_FILE, Manifest
from bundle.prompt import build_prompt
from bundle.session import Picture, Vlm, open_bundle
from bundle.staging import sha256_of
from runtime_bench.accuracy.answers import Answer, answer_line, read_answers
from runtime_bench.accuracy.questions import Question, spread
from runtime_bench.accuracy.registry import BENCHMARKS
from runtime_bench.accuracy.score import BenchmarkName, Score

ALL: tuple[BenchmarkName, ...] = tuple(BENCHMARKS)
TOO_LONG = "prompt longer than context"


@dataclass(frozen=True)
class RunSettings:
    """How to ask.

    Attributes:
        limit: about so many questions of each benchmark, spread over it; None asks all.
        sqa_image: MobileVLM crops ScienceQA's pictures, LLaVA of today pads them like all others.
    """

    limit: int | None = None
    threads: int | None = None
    runtime: str | None = None
    sqa_image: Literal["crop", "pad"] = "crop"


@dataclass(frozen=True)
class AccuracyRun:
    """What came out: a score per benchmark; and the bundle and runtime that answered."""

    scores: dict[BenchmarkName, Score]
    manifest: Manifest
    runtime: str
    covers: str


def run_accuracy(
    bundle: Path, data: Path, benchmarks: Sequence[BenchmarkName], answers: Path, settings: RunSettings
) -> AccuracyRun:
    """Ask every question greedily and score the answers.

    Args:
        data: a folder with one folder per benchmark.
        answers: folder for ``<benchmark>.jsonl``; one that holds the beginning of the same run is continued.

    Raises:
        UsageError: no such data, a picture is missing, or ``answers`` holds another run.
    """
    plans = {name: spread(BENCHMARKS[name].questions(data), settings.limit) for name in _present(data, benchmarks)}
    for name, questions in plans.items():
        _check_pictures(name, questions)
    scores: dict[BenchmarkName, Score] = {}
    with closing(open_bundle(bundle, settings.threads, settings.runtime)) as vlm:
        digest = sha256_of(bundle / MANIFEST_FILE)
        for name, questions in plans.items():
            path = answers / f"{name}.jsonl"
            _ask(vlm, digest, name, questions, path, crop=BENCHMARKS[name].crop and settings.sqa_image == "crop")
            given = read_answers(path)
            scores[name] = _with_warnings(BENCHMARKS[name].score(data, given), vlm.manifest, given)
        return AccuracyRun(scores, vlm.manifest, vlm.runtime.name, vlm.runtime.covers)


def _present(data: Path, benchmarks: Sequence[BenchmarkName]) -> list[BenchmarkName]:
    """All asked for; where that is the default, all six, those that the data root has."""
    if tuple(benchmarks) != ALL:
        return list(benchmarks)
    present = [name for name in ALL if (data / name).is_dir()]
    if not present:
        raise UsageError(f"{data} has none of the folders {', '.join(ALL)}; make one with: alignkd-data make-demo DIR")
    return present


def _check_pictures(name: BenchmarkName, questions: Sequence[Question]) -> None:
    if not questions:
        raise UsageError(f"{name}: the question file is empty")
    missing = [
        f"{question.image} of question_id '{question.question_id}'"
        for question in questions
        if isinstance(question.image, Path) and not question.image.is_file()
    ]
    if missing:
        raise UsageError(f"{name}: the pictures of {len(missing)} questions do not exist; first: {missing[0]}")


def _ask(vlm: Vlm, digest: str, name: BenchmarkName, questions: list[Question], path: Path, crop: bool) -> None:
    """Append one answer line per question that ``path`` does not have yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = _resume(path, questions, digest)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with path.open("a", encoding="utf-8") as file, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=len(questions), completed=done)
        for question in questions[done:]:
            try:
                text, finish = _answer(vlm, name, question, crop)
            except UsageError as error:
                raise UsageError(f"{name} question_id '{question.question_id}': {error}") from error
            file.write(answer_line(question, text, vlm.manifest.name, digest, finish))
            file.flush()
            progress.advance(task)


def _answer(vlm: Vlm, name: BenchmarkName, question: Question, crop: bool) -> tuple[str, str]:
    """Answer and why it ended; a prompt longer than the context gets no answer instead of ending the whole run."""
    manifest = vlm.manifest
    has_image = question.image is not None
    prompt = build_prompt(manifest.prompt, vlm.tokenizer, manifest.tokenizer, question.text, has_image)
    rows = len(prompt.token_ids) + (manifest.model.visual_tokens - 1 if has_image else 0)
    if rows > manifest.model.context_length:
        return "", TOO_LONG
    said = vlm.generate(_picture(question, vlm, crop), question.text, BENCHMARKS[name].max_new_tokens)
    return said.text, said.finish


def _resume(path: Path, questions: Sequence[Question], digest: str) -> int:
    """Number of questions that ``path`` has answers to; a line that was cut off is dropped.

    Raises:
        UsageError: its answers are not the beginning of this run.
    """
    if not path.exists():
        return 0
    whole = path.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    path.write_bytes(whole)
    done = read_answers(path) if whole else []
    asked = [(str(question.question_id), question.prompt, digest) for question in questions]
    given = [(str(answer.question_id), answer.prompt, answer.metadata.get("manifest_sha256")) for answer in done]
    if given != asked[: len(given)]:
        raise UsageError(
            f"{path} holds answers of another bundle, data or --limit; remove {path.parent} or choose another --output"
        )
    return len(done)


def _picture(question: Question, vlm: Vlm, crop: bool) -> Picture | None:
    """Cropped to the encoder's size ahead, a picture passes the bundle's own padding and resizing unchanged."""
    if question.image is None or not crop:
        return question.image
    return resize(open_image(question.image), vlm.manifest.image.model_copy(update={"strategy": "crop"}))


def _with_warnings(score: Score, manifest: Manifest, answers: Sequence[Answer]) -> Score:
    warnings = list(score.warnings)
    if manifest.prompt.template != "v1":
        warnings.append(
            f"asked with the bundle's template '{manifest.prompt.template}'; the published numbers are with 'v1'"
        )
    context = f"the bundle's context of {manifest.model.context_length} tokens"
    cut = sum(answer.metadata.get("finish") == "context" for answer in answers)
    if cut:
        warnings.append(f"{cut} answers were cut off by {context}")
    unasked = sum(answer.metadata.get("finish") == TOO_LONG for answer in answers)
    if unasked:
        warnings.append(f"{unasked} questions are longer than {context}; scored as an empty answer")
    return score.model_copy(update={"warnings": tuple(warnings)})
