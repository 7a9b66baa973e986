"""``alignkd-bench score`` and ``alignkd-bench accuracy``: their flags, and what they print."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bundle.errors import UsageError
from bundle.staging import refuse_existing, write_text_whole
from runtime_bench.accuracy.answers import read_answers
from runtime_bench.accuracy.registry import BENCHMARKS
from runtime_bench.accuracy.run import ALL, AccuracyRun, RunSettings, run_accuracy
from runtime_bench.accuracy.score import BenchmarkName, Score
from runtime_bench.device import local_device, source_commit
from runtime_bench.measure import EMULATED_RUNTIMES, check_bundle
from runtime_bench.result import Accuracy, BenchmarkScore, Row, bundle_ref, now, write_results


@dataclass(frozen=True)
class ScoreConfig:
    """Score a LLaVA answer file by the benchmark's published rule."""

    benchmark: BenchmarkName
    """which of the six"""
    data: Path
    """the benchmark's folder, or the folder that holds all of them"""
    answers: Path
    """jsonl with question_id, prompt and text"""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """end with one line of JSON on stdout: score, metrics, warnings and every item's verdict"""


@dataclass(frozen=True)
class AccuracyConfig:
    """Ask a bundle the questions of the six benchmarks and score its answers.

    An answer file per benchmark, for the original scripts too, is written beside --output; a run that was stopped goes
    on from there.
    """

    bundle: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BUNDLE")]
    """directory that alignkd-export wrote"""
    data: Path
    """folder with the benchmarks' folders (gqa, sqa, textvqa, pope, mme, mmbench)"""
    output: Path = Path("accuracy.json")
    """results file to write; must not exist"""
    benchmarks: tuple[BenchmarkName, ...] = ALL
    """which to run; by default those of the six that --data has"""
    limit: int | None = None
    """ask about so many questions of each benchmark, spread over it; None = all"""
    threads: int | None = None
    """CPU threads of the engine; None = its own choice"""
    runtime: str | None = None
    """runtime by name; None = the first that can run here"""
    sqa_image: Literal["crop", "pad"] = "crop"
    """ScienceQA pictures: cropped as MobileVLM does, or padded like the other benchmarks'"""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """end with one line of JSON on stdout: the row that --output holds"""

    def __post_init__(self) -> None:
        wrong = [
            f"--{name} is {value}; it must be at least 1"
            for name, value in {"limit": self.limit, "threads": self.threads}.items()
            if value is not None and value < 1
        ]
        if not self.benchmarks:
            wrong.append(f"--benchmarks is empty; allowed: {', '.join(ALL)}")
        if wrong:
            raise UsageError("; ".join(wrong))


def score(config: ScoreConfig) -> int:
    """Print one benchmark's score; the last line is the whole Score with --json."""
    result = BENCHMARKS[config.benchmark].score(config.data, read_answers(config.answers))
    _print_summary([result])
    if config.json:
        sys.stdout.write(jsonlib.dumps(result.model_dump(mode="json")) + "\n")  # ASCII, and really one line
    return 0


def accuracy(config: AccuracyConfig) -> int:
    """Run the benchmarks on a bundle; write the results row, the answer files and the verdict of every item."""
    refuse_existing(config.output)
    _, runtime = check_bundle(config.bundle, config.runtime)
    answers = config.output.with_name(f"{config.output.stem}-answers")
    settings = RunSettings(config.limit, config.threads, runtime, config.sqa_image)
    start = time.perf_counter()
    run = run_accuracy(config.bundle, config.data, config.benchmarks, answers, settings)
    seconds = time.perf_counter() - start
    for name, result in run.scores.items():
        write_text_whole(answers / f"{name}.score.json", result.model_dump_json(indent=1) + "\n")
    row = _row(config, run, emulated=runtime in EMULATED_RUNTIMES, seconds=seconds)
    write_results(config.output, [row])
    _print_summary(run.scores.values())
    sys.stdout.write(f"results: {config.output}; answers and verdicts: {answers}\n")
    if config.json:
        line = {"output": str(config.output), "answers": str(answers), "row": row.model_dump(mode="json")}
        sys.stdout.write(jsonlib.dumps(line) + "\n")
    return 0


def _row(config: AccuracyConfig, run: AccuracyRun, emulated: bool, seconds: float) -> Row:
    return Row(
        kind="accuracy",
        time=now(),
        commit=source_commit(),
        bundle=bundle_ref(config.bundle, run.manifest),
        runtime=run.runtime,
        covers=run.covers,
        emulated=emulated,
        device=local_device(),
        accuracy=Accuracy(
            data=str(config.data),
            benchmarks={name: _without_items(result) for name, result in run.scores.items()},
            seconds=seconds,
        ),
    )


def _without_items(result: Score) -> BenchmarkScore:
    return BenchmarkScore(
        score=result.score,
        n_scored=result.n_scored,
        n_expected=result.n_expected,
        protocol=result.protocol,
        metrics=result.metrics,
        warnings=result.warnings,
    )


def _print_summary(results: Iterable[Score]) -> None:
    """Scores on stdout, warnings on stderr."""
    for result in results:
        sys.stdout.write(
            f"{BENCHMARKS[result.benchmark].title}: {result.score:.2f} "
            f"({result.n_scored} of {result.n_expected} questions, protocol {result.protocol})\n"
        )
        for warning in result.warnings:
            sys.stderr.write(f"warning: {result.benchmark}: {warning}\n")
