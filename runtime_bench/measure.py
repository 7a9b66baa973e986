"""Bundle + settings -> Row of latency, memory and size, measured in a fresh process per bundle."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bundle.errors import AlignKDError, BackendMissingError, UsageError, VerificationError
from bundle.manifest import Manifest, Target, check_files, read_manifest
from bundle.runtimes.registry import no_runtime, runtime_entries
from runtime_bench.device import local_device, source_commit
from runtime_bench.probe import ProbeRequest, ProbeResponse
from runtime_bench.result import Row, Settings, bundle_ref, now
from runtime_bench.stats import measurement
from runtime_bench.workload import PICTURE

# walk the graph operation by operation: right answers, meaningless speed
EMULATED_RUNTIMES = frozenset({"coreml_interpreter", "coreai_interpreter"})
ERRORS = {kind.exit_code: kind for kind in (AlignKDError, UsageError, VerificationError, BackendMissingError)}
EXCLUDES = (
    "Times exclude: decoding the picture file, turning ids into text, sampling other than greedy, the check of the "
    "files' hashes, and the start of Python. First load includes importing the engine; cold load starts with the "
    "bundle's pages dropped from the file cache, warm load with them in it. Decode counts the steps after the first "
    "token, embedding and argmax included. Peak memory is the high-water mark (VmHWM) of a process that loaded and ran "
    "this bundle only; Python and numpy are in it (the baseline says how much), and mapped weights count as resident. "
    "Nothing here covers a phone's thermal limits, battery, GPU or NPU."
)


@dataclass(frozen=True)
class MeasureSettings:
    """How to measure one bundle; None leaves the choice to the engine or the template."""

    warmup: int = 2
    """runs thrown away before the measured ones"""
    repeats: int = 10
    """measured runs"""
    load_repeats: int = 3
    """cold and warm loads measured"""
    threads: int | None = None
    """CPU threads of the engine; None: the engine's own choice"""
    prompt_tokens: int | None = None
    """rows of the prefill, visual tokens included; None: template, question and image as they are"""
    new_tokens: int = 32
    """tokens made per run, the first one included"""
    runtime: str | None = None
    """onnx, executorch, coreml, coreml_interpreter, coreai or coreai_interpreter; None: the first that can run here"""

    def __post_init__(self) -> None:
        least = {"warmup": 0, "repeats": 1, "load_repeats": 1, "threads": 1, "prompt_tokens": 1, "new_tokens": 2}
        given: dict[str, int | None] = {
            "warmup": self.warmup,
            "repeats": self.repeats,
            "load_repeats": self.load_repeats,
            "threads": self.threads,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
        }
        wrong = [
            f"--{name.replace('_', '-')} is {value}; it must be at least {least[name]}"
            for name, value in given.items()
            if value is not None and value < least[name]
        ]
        if wrong:
            raise UsageError("; ".join(wrong))


def check_bundle(bundle: Path, runtime: str | None = None) -> tuple[Manifest, str]:
    """Manifest and the runtime that will run it, before anything is measured.

    Raises:
        UsageError: no bundle there, or no runtime of that name for its target.
        VerificationError: a file of the bundle is missing or changed.
        BackendMissingError: nothing on this host runs its target.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    return manifest, choose_runtime(manifest.target, runtime)


def choose_runtime(target: Target, name: str | None = None) -> str:
    """The first runtime for ``target`` that this host has, by its registry name."""
    reasons: dict[str, str] = {}
    for entry in runtime_entries(target, name):
        reason = entry.load().available()
        if reason is None:
            return entry.name
        reasons[entry.name] = reason
    raise no_runtime(target, reasons)


def measure_bundle(bundle: Path, settings: MeasureSettings) -> Row:
    """Measure one bundle in a process of its own."""
    manifest, runtime = check_bundle(bundle, settings.runtime)
    started = now()
    response = _run_probe(
        ProbeRequest(
            bundle=str(bundle.resolve()),
            runtime=runtime,
            threads=settings.threads,
            warmup=settings.warmup,
            repeats=settings.repeats,
            load_repeats=settings.load_repeats,
            prompt_tokens=settings.prompt_tokens,
            new_tokens=settings.new_tokens,
        )
    )
    return Row(
        kind="run",
        time=started,
        commit=source_commit(),
        bundle=bundle_ref(bundle, manifest),
        runtime=response.runtime,
        covers=response.covers,
        emulated=runtime in EMULATED_RUNTIMES,
        device=local_device(),
        settings=Settings(
            threads=settings.threads,
            warmup=settings.warmup,
            repeats=settings.repeats,
            load_repeats=settings.load_repeats,
            prompt_tokens=response.prompt_tokens,
            known_tokens=response.known_tokens,
            visual_tokens=manifest.model.visual_tokens,
            new_tokens=settings.new_tokens,
            image=PICTURE,
            cold=response.cold,
        ),
        measurements={quantity: measurement(values) for quantity, values in response.samples.items()},
        memory=response.memory,
        excludes=EXCLUDES,
    )


def _run_probe(request: ProbeRequest) -> ProbeResponse:
    with tempfile.TemporaryDirectory(prefix="alignkd-bench-") as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "response.json")
        asked.write_text(request.model_dump_json(), encoding="utf-8")
        child = subprocess.run(
            [sys.executable, "-m", "runtime_bench.probe", str(asked), str(answered)],
            stdout=subprocess.DEVNULL,  # engines chat there
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        if child.returncode != 0 or not answered.is_file():
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            raise AlignKDError(
                f"measuring {request.bundle} on {request.runtime} ended with code {child.returncode}: {last}; "
                f"run: alignkd-verify {request.bundle}"
            )
        response = ProbeResponse.model_validate_json(answered.read_text(encoding="utf-8"))
    if response.error is not None:
        raise ERRORS[response.exit_code](response.error)
    return response
