"""Request file -> response file, in a process that opens one bundle and nothing else: its memory is the bundle's.

Run as ``python -m runtime_bench.probe REQUEST.json RESPONSE.json`` by runtime_bench/measure.py.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from bundle.errors import AlignKDError
from bundle.manifest import Manifest, read_manifest
from bundle.runtimes.contract import Runtime
from bundle.runtimes.registry import open_runtime
from bundle.staging import write_text_whole
from bundle.tokenizer import open_tokenizer
from runtime_bench.memory import read_memory
from runtime_bench.pages import drop_pages
from runtime_bench.result import Memory, Quantity
from runtime_bench.workload import make_workload, run_once


class ProbeRequest(BaseModel):
    """What to measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: str
    runtime: str
    threads: int | None = None
    warmup: int = 2
    repeats: int = 10
    load_repeats: int = 3
    prompt_tokens: int | None = None
    new_tokens: int = 32


class ProbeResponse(BaseModel):
    """Raw samples, or the error that ended the run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: str = ""
    covers: str = ""
    prompt_tokens: int = 0
    known_tokens: int = 0
    cold: bool = False
    samples: dict[Quantity, tuple[float, ...]] = {}
    memory: Memory | None = None
    error: str | None = None
    exit_code: int = 0


def probe(request: ProbeRequest) -> ProbeResponse:
    """Load, warm up, repeat, read the memory mark, and only then load again and again.

    The reloads come last so that the memory mark is that of one loaded bundle.
    """
    bundle = Path(request.bundle)
    manifest = read_manifest(bundle)
    tokenizer = open_tokenizer(manifest.tokenizer, bundle)
    work = make_workload(manifest, tokenizer, request.prompt_tokens, request.new_tokens)
    samples: dict[Quantity, list[float]] = defaultdict(list)
    baseline = read_memory().peak_bytes
    cold = drop_pages(bundle)
    runtime = _timed_load(samples, "first_load_ms", bundle, manifest, request)
    for repeat in range(request.warmup + request.repeats):
        timed = run_once(runtime, manifest, tokenizer, work, time.perf_counter_ns)
        for quantity, value in timed.items() if repeat >= request.warmup else ():
            samples[quantity].append(value)
    resident = read_memory()
    memory = Memory(
        peak_bytes=resident.peak_bytes,
        baseline_bytes=baseline,
        anonymous_bytes=resident.anonymous_bytes,
        file_bytes=resident.file_bytes,
    )
    runtime.close()
    for _ in range(request.load_repeats):
        cold = drop_pages(bundle) and cold
        _timed_load(samples, "cold_load_ms", bundle, manifest, request).close()
        _timed_load(samples, "warm_load_ms", bundle, manifest, request).close()
    return ProbeResponse(
        runtime=runtime.name,
        covers=runtime.covers,
        prompt_tokens=work.prompt_tokens,
        known_tokens=work.known_tokens,
        cold=cold,
        samples={quantity: tuple(values) for quantity, values in samples.items()},
        memory=memory,
    )


def _timed_load(
    samples: dict[Quantity, list[float]], quantity: Quantity, bundle: Path, manifest: Manifest, request: ProbeRequest
) -> Runtime:
    start = time.perf_counter_ns()
    runtime = open_runtime(bundle, manifest, request.threads, request.runtime)
    samples[quantity].append((time.perf_counter_ns() - start) / 1e6)
    return runtime


def main(request_path: Path, response_path: Path) -> None:
    """Answer one request; a user's mistake goes back as its one line and exit code."""
    request = ProbeRequest.model_validate_json(request_path.read_text(encoding="utf-8"))
    try:
        response = probe(request)
    except AlignKDError as error:
        response = ProbeResponse(error=str(error), exit_code=error.exit_code)
    write_text_whole(response_path, response.model_dump_json())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
