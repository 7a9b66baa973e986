"""Bundle directory -> a verdict per runtime: the error of each stage against the golden vectors, and the first bad one.

Each stage is fed the golden output of the stage before it, so an error shows where it arises and nowhere later.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bundle.errors import UsageError
from bundle.golden import GoldenCase, Recording, read_golden
from bundle.image import open_image, preprocess
from bundle.manifest import STAGES, Manifest, Stage, check_files, read_manifest
from bundle.prompt import build_prompt, splice, text_ids
from bundle.runtimes.contract import Floats, Runtime
from bundle.runtimes.registry import RuntimeEntry, no_runtime, runtime_entries
from bundle.staging import inside
from bundle.tokenizer import open_tokenizer

# Noise of the tolerated size (tolerance x rms of the logits) flips the top token only where its margin is a few times
# smaller than this; a token that was surer than that must be the same.
SURE_MARGIN = 8.0
SMALLEST_NORM = 1e-30  # keeps the error of an all-zero reference finite


@dataclass(frozen=True)
class StageResult:
    """Worst case of one stage: relative L2 error (0 or 1 for the prompt)."""

    stage: Stage
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Within tolerance; an error that is not a number is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Verdict:
    """What one runtime makes of a bundle."""

    runtime: str
    covers: str
    stages: tuple[StageResult, ...]

    @property
    def first_bad(self) -> StageResult | None:
        """The first stage of the ladder that leaves its tolerance."""
        return next((result for result in self.stages if not result.ok), None)


@dataclass(frozen=True)
class Skipped:
    """A runtime of the target that this host cannot run, and why."""

    runtime: str
    reason: str


def verify_bundle(path: str | Path, runtimes: tuple[str, ...] | None = None) -> list[Verdict]:
    """Compare every file with the manifest, then replay the golden vectors on each runtime of this host.

    Args:
        path: the bundle directory.
        runtimes: names of bundle.runtimes.registry; None takes all that can run here.

    Raises:
        UsageError: no bundle, or a manifest or golden folder of the wrong shape.
        VerificationError: a file is missing, changed or not listed, by name.
        BackendMissingError: no runtime for the target can run here.
    """
    return verify_with_reasons(Path(path), runtimes)[0]


def verify_with_reasons(bundle: Path, runtimes: tuple[str, ...] | None = None) -> tuple[list[Verdict], list[Skipped]]:
    """``verify_bundle``, and the runtimes that were left out with their reasons."""
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    recording = read_golden(bundle, manifest)
    names: tuple[str | None, ...] = runtimes if runtimes else (None,)
    entries = [entry for name in names for entry in runtime_entries(manifest.target, name)]
    verdicts: list[Verdict] = []
    skipped: list[Skipped] = []
    for entry in entries:
        reason = entry.load().available()
        if reason is None:
            verdicts.append(_verdict(entry, bundle, manifest, recording))
        else:
            skipped.append(Skipped(entry.name, reason))
    if not verdicts:
        raise no_runtime(manifest.target, {s.runtime: s.reason for s in skipped})
    return verdicts, skipped


def replay(runtime: Runtime, manifest: Manifest, golden: Recording) -> dict[Stage, float]:
    """The error of each stage, the worst over all golden cases."""
    tokenizer = open_tokenizer(manifest.tokenizer, golden.bundle)
    worst: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
    for case in golden.cases:
        prompt = build_prompt(manifest.prompt, tokenizer, manifest.tokenizer, case.question, case.image is not None)
        same = (prompt.text, prompt.token_ids) == (case.prompt_text, case.token_ids)
        errors: dict[Stage, float] = {"prompt": 0.0 if same else 1.0}
        errors |= _image_errors(runtime, manifest, golden, case) if case.image is not None else {}
        errors |= _text_errors(runtime, manifest, golden, case)
        worst |= {stage: max(worst[stage], error) for stage, error in errors.items()}
    return worst


def relative_error(found: Floats, wanted: Floats) -> float:
    """L2 norm of the difference over that of ``wanted``; infinite for another shape or values that are no numbers."""
    if found.size != wanted.size:
        return float("inf")
    reference = wanted.astype(np.float64).ravel()
    difference = float(np.linalg.norm(found.astype(np.float64).ravel() - reference))
    if not np.isfinite(difference):
        return float("inf")
    return difference / max(float(np.linalg.norm(reference)), SMALLEST_NORM)


def _verdict(entry: RuntimeEntry, bundle: Path, manifest: Manifest, recording: Recording) -> Verdict:
    missing = [stage for stage in STAGES if stage not in manifest.golden.tolerances]
    if missing:
        raise UsageError(f"{bundle}: the manifest has no tolerance for stage '{missing[0]}'; export the bundle again")
    runtime = entry.load().open_runtime(bundle, manifest, None)
    try:
        errors = replay(runtime, manifest, recording)
    finally:
        runtime.close()
    stages = tuple(StageResult(stage, errors[stage], manifest.golden.tolerances[stage]) for stage in STAGES)
    return Verdict(runtime.name, runtime.covers, stages)


def _image_errors(runtime: Runtime, manifest: Manifest, golden: Recording, case: GoldenCase) -> dict[Stage, float]:
    assert case.image is not None
    pixels = golden.vector(case, "pixels")  # [1, 3, S, S]
    here = preprocess(open_image(inside(golden.bundle, case.image, "golden image")), manifest.image)
    visual = runtime.encode_image(pixels)  # [1, N, D]
    return {
        "pixels": relative_error(here, pixels),
        "visual_tokens": relative_error(visual, golden.vector(case, "visual_tokens")),
    }


def _text_errors(runtime: Runtime, manifest: Manifest, golden: Recording, case: GoldenCase) -> dict[Stage, float]:
    image_id = manifest.tokenizer.image_token_id
    embeddings = golden.vector(case, "embeddings")  # [1, T, D]
    visual = golden.vector(case, "visual_tokens") if case.image is not None else None
    ids = np.array([text_ids(case.token_ids, image_id)], dtype=np.int64)  # [1, T]
    runtime.reset()
    first = runtime.decode(splice(case.token_ids, image_id, embeddings, visual))  # [V]
    return {
        "embeddings": relative_error(runtime.embed(ids), embeddings),
        "first_logits": relative_error(first, golden.vector(case, "first_logits")),
        "greedy_tokens": _greedy_error(runtime, manifest, golden, case),
    }


def _greedy_error(runtime: Runtime, manifest: Manifest, golden: Recording, case: GoldenCase) -> float:
    """Steps after the prefill, each fed the golden token before it; a sure token that changes is an error of 1."""
    tolerance = manifest.golden.tolerances["greedy_tokens"]
    wanted = golden.vector(case, "greedy_logits")  # [32, V]
    worst = 0.0
    for step in range(1, len(case.greedy_ids)):
        previous = np.array([[case.greedy_ids[step - 1]]], dtype=np.int64)
        logits = runtime.decode(runtime.embed(previous))  # [V]
        worst = max(worst, relative_error(logits, wanted[step]))
        if int(logits.argmax()) != case.greedy_ids[step] and _is_sure(wanted[step], tolerance):
            worst = max(worst, 1.0)
    return worst


def _is_sure(logits: Floats, tolerance: float) -> bool:
    second, first = np.partition(logits, -2)[-2:]
    rms = float(np.sqrt(np.mean(np.square(logits, dtype=np.float64))))
    return float(first - second) > SURE_MARGIN * tolerance * rms
