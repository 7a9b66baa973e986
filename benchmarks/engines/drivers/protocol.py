"""A driver's argument (one JSON object) -> its answer (one JSON object, the last line of stdout).

Runs in each engine's own environment: standard library and numpy only. A driver opens one engine in a process of its
own, answers random prompts or encodes random pictures with it, and says how long it took and what memory it needed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Job:
    """What a driver is to do.

    Attributes:
        model: the file or folder of ``part``, as the engine's conversion left it.
        part: "text" answers prompts, "vision" encodes pictures.
        repeats: measured runs, after one that warms up.
        image_size: S; pictures are [1, 3, S, S].
        options: what only this engine understands.
    """

    model: str
    part: Literal["text", "vision"]
    threads: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    vocabulary: int
    image_size: int
    options: dict[str, str] = field(default_factory=dict)


@dataclass
class Answer:
    """What a driver measured; seconds are wall time of single runs.

    Attributes:
        engine: name and version, by the engine itself.
        peak_bytes: high-water mark of the process's resident memory (VmHWM), mapped files included.
        anonymous_bytes: resident private memory at the end (RssAnon): what mapped files do not explain.
    """

    engine: str = ""
    load_s: float = 0.0
    encode_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    anonymous_bytes: int = 0


class Engine(Protocol):
    """One opened engine."""

    name: str

    def encode(self, pixels: np.ndarray) -> float:
        """Pixels [1, 3, S, S] -> seconds of tower and projector."""

    def answer(self, ids: list[int], new_tokens: int) -> tuple[float, float]:
        """Prompt from an empty cache, then ``new_tokens`` greedy steps -> seconds of the prefill, of all the steps."""


def timed_answer(next_token: Callable[[list[int]], int], ids: list[int], new_tokens: int) -> tuple[float, float]:
    """``Engine.answer`` of an engine that appends ids to its cache and gives the greedy token behind them."""
    start = time.perf_counter()
    token = next_token(ids)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        token = next_token([token])
    return prefilled - start, time.perf_counter() - prefilled


def run_driver(open_engine: Callable[[Job], Engine]) -> None:
    """Do the job of the command line and print the answer."""
    job = Job(**json.loads(sys.argv[1]))
    start = time.perf_counter()
    engine = open_engine(job)
    answer = Answer(engine=engine.name, load_s=time.perf_counter() - start)
    random = np.random.default_rng(0)
    for run in range(job.repeats + 1):
        if job.part == "vision":
            seconds = engine.encode(random.normal(size=(1, 3, job.image_size, job.image_size)).astype(np.float32))
            answer.encode_s += [seconds] if run else []
        if job.part == "text":
            # another prompt every time: an engine that keeps prefixes has none of this one
            ids = [int(i) for i in random.integers(3, job.vocabulary, job.prompt_tokens)]
            prefill, decode = engine.answer(ids, job.new_tokens if run else WARM_UP_TOKENS)
            answer.prefill_s += [prefill] if run else []
            answer.decode_s += [decode] if run else []
    answer.peak_bytes, answer.anonymous_bytes = (status_bytes(name) for name in ("VmHWM", "RssAnon"))
    sys.stdout.write("\n" + json.dumps(asdict(answer)) + "\n")
    sys.stdout.flush()


def status_bytes(name: str) -> int:
    """A field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
