"""Contestants -> samples: every one in a process of its own, taking turns, round after round."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engines.drivers.protocol import Answer, Job
from engines.peers import HERE, ROOT

TIMEOUT_S = 300


@dataclass(frozen=True)
class Contestant:
    """An engine with its files.

    Attributes:
        files: part -> every file that it reads; its parts are what is measured.
    """

    label: str
    python: Path
    driver: str
    model: Path
    files: dict[str, list[Path]]
    options: dict[str, str] = field(default_factory=dict)
    ours: bool = False
    note: str = ""


@dataclass
class Sample:
    """One process: its answer, or the line that says why there is none."""

    label: str
    part: str
    threads: int
    round: int
    load_average: float
    answer: Answer | None
    failure: str = ""


@dataclass(frozen=True)
class Work:
    """What every process does."""

    prompt_tokens: int
    new_tokens: int
    vocabulary: int
    image_size: int
    rounds: int
    repeats: int
    threads: tuple[int, ...]


def run_rounds(contestants: Sequence[Contestant], work: Work, progress: Callable[[str], None]) -> list[Sample]:
    """All samples; who begins changes with the round, and who fails once is not asked again."""
    samples: list[Sample] = []
    failed: set[tuple[str, str]] = set()
    for number in range(work.rounds):
        first = number % len(contestants)
        order = [*contestants[first:], *contestants[:first]]
        for threads in work.threads:
            for part in ("vision", "text"):
                for contestant in order:
                    if part in contestant.files and (contestant.label, part) not in failed:
                        sample = _sample(contestant, part, threads, number, work)
                        samples.append(sample)
                        if sample.answer is None:
                            failed.add((contestant.label, part))
                        progress(_line(sample))
    return samples


def _sample(contestant: Contestant, part: str, threads: int, number: int, work: Work) -> Sample:
    job = Job(
        model=str(contestant.model),
        part="text" if part == "text" else "vision",
        threads=threads,
        prompt_tokens=work.prompt_tokens,
        new_tokens=work.new_tokens,
        repeats=work.repeats,
        vocabulary=work.vocabulary,
        image_size=work.image_size,
        options=contestant.options,
    )
    load = os.getloadavg()[0]
    answer, failure = run_driver_process(contestant.python, contestant.driver, job)
    return Sample(contestant.label, part, threads, number, load, answer, failure)


def run_driver_process(python: Path, driver: str, job: Job) -> tuple[Answer | None, str]:
    """One driver in its own process -> its answer, or None and its last line."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(job.threads)}
    command = [str(python), str(HERE / "drivers" / driver), json.dumps(asdict(job))]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {TIMEOUT_S} s"
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        return None, f"{driver} ended with code {done.returncode}: {lines[-1].strip()}"
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return Answer(**found), ""


def _line(sample: Sample) -> str:
    head = f"round {sample.round + 1}, {sample.threads} thread(s), {sample.part}, {sample.label}: "
    answer = sample.answer
    if answer is None:
        return head + sample.failure
    times = [("encode", answer.encode_s), ("prefill", answer.prefill_s), ("decode", answer.decode_s)]
    return head + ", ".join(f"{name} {min(seconds):.2f} s" for name, seconds in times if seconds)
