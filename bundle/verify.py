"""Bundle directory -> a verdict per runtime: the error of each stage against the golden vectors, and the first bad one.

What a bundle is off from its checkpoint comes apart into three: the weights were rounded (quantization), kernels round
activations (activations), and the graph computes something else (graph). docs/verification.md explains the ladder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bundle.diagnosis import Diagnosis, StageResult, diagnose
from bundle.errors import BackendMissingError, UsageError
from bundle.golden import Recording, read_golden
from bundle.manifest import STAGES, Family, Manifest, Stage, check_files, read_manifest
from bundle.prefix_check import PrefixCheck, check_prefix
from bundle.replay import Measured, Replay, quantization_errors, replay
from bundle.runtimes.registry import RuntimeEntry, no_runtime, runs_elsewhere, runtime_entries


@dataclass(frozen=True)
class Verdict:
    """What one runtime makes of a bundle.

    Attributes:
        family: whose tolerances were used.
        agreed: of ``rows`` decoder rows those whose most likely token is the checkpoint's in float32.
        diagnosis: of the first bad stage; None when there is none.
        prefix: of bundles that have a prefix cache.
    """

    runtime: str
    covers: str
    family: Family
    stages: tuple[StageResult, ...]
    agreed: int
    rows: int
    diagnosis: Diagnosis | None
    prefix: PrefixCheck | None = None

    @property
    def problem(self) -> str | None:
        """What is out of tolerance, in one line, or None."""
        if self.diagnosis is not None:
            return str(self.diagnosis)
        return None if self.prefix is None or self.prefix.ok else f"{self.prefix}; export the bundle again"

    @property
    def first_bad(self) -> StageResult | None:
        """The first stage of the ladder that leaves its tolerance."""
        return next((result for result in self.stages if not result.ok), None)


@dataclass(frozen=True)
class Skipped:
    """A runtime of the target that this host cannot run, and why."""

    runtime: str
    reason: str


def verify_bundle(
    path: str | Path, runtimes: tuple[str, ...] | None = None, tolerance_scale: float = 1.0
) -> list[Verdict]:
    """Compare every file with the manifest, then replay the golden vectors on each runtime of this host.

    Args:
        path: the bundle directory.
        runtimes: names of bundle.runtimes.registry; None takes all that can run here.
        tolerance_scale: multiplies every tolerance, for measuring a new processor.

    Raises:
        UsageError: no bundle, or a manifest or golden folder of the wrong shape.
        VerificationError: a file is missing, changed or not listed, by name.
        BackendMissingError: no runtime for the target can run here.
    """
    return verify_with_reasons(Path(path), runtimes, tolerance_scale)[0]


def verify_with_reasons(
    bundle: Path, runtimes: tuple[str, ...] | None = None, tolerance_scale: float = 1.0
) -> tuple[list[Verdict], list[Skipped]]:
    """``verify_bundle``, and the runtimes that were left out with their reasons."""
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    elsewhere = runs_elsewhere(manifest)
    if elsewhere is not None:
        raise BackendMissingError(f"{bundle}: files are whole, but nothing was verified: {elsewhere}")
    recording = read_golden(bundle, manifest)
    names: tuple[str | None, ...] = runtimes if runtimes else (None,)
    entries = [entry for name in names for entry in runtime_entries(manifest.target, name)]
    verdicts: list[Verdict] = []
    skipped: list[Skipped] = []
    for entry in entries:
        reason = entry.load().available()
        if reason is None:
            verdicts.append(verdict_of(entry, bundle, manifest, recording, tolerance_scale))
        else:
            skipped.append(Skipped(entry.name, reason))
    if not verdicts:
        raise no_runtime(manifest.target, {s.runtime: s.reason for s in skipped})
    return verdicts, skipped


def verdict_of(
    entry: RuntimeEntry, bundle: Path, manifest: Manifest, recording: Recording, tolerance_scale: float = 1.0
) -> Verdict:
    """Replay the golden vectors on one runtime that can run here.

    Raises:
        UsageError: the manifest has no tolerances for what computes here.
    """
    family = entry.family()
    tolerances = _scaled(_complete(bundle, manifest, family), tolerance_scale)
    runtime = entry.load().open_runtime(bundle, manifest, None)
    try:
        found = replay(runtime, manifest, recording, tolerances)
        prefix = check_prefix(runtime, manifest, recording, tolerances["first_logits"])
    finally:
        runtime.close()
    stages = _results(manifest, found, quantization_errors(recording), tolerances, tolerance_scale)
    return Verdict(
        runtime.name,
        runtime.covers,
        family,
        stages,
        found.agreed,
        found.rows,
        diagnose(stages, bundle, manifest),
        prefix,
    )


def _complete(bundle: Path, manifest: Manifest, family: Family) -> dict[Stage, float]:
    table = manifest.golden.tolerances
    if family not in table:
        raise UsageError(
            f"{bundle}: the manifest has no tolerances for '{family}', which computes here; it has them for "
            f"{', '.join(table) or 'none'}; export the bundle again"
        )
    missing = [stage for stage in STAGES if stage not in table[family]]
    if missing:
        raise UsageError(
            f"{bundle}: the manifest has no tolerance for stage '{missing[0]}' on '{family}'; export the bundle again"
        )
    return table[family]


def _scaled(tolerances: dict[Stage, float], scale: float) -> dict[Stage, float]:
    return {stage: tolerance * scale for stage, tolerance in tolerances.items()}


def _results(
    manifest: Manifest,
    found: Replay,
    quantization: dict[Stage, Measured],
    tolerances: dict[Stage, float],
    scale: float,
) -> tuple[StageResult, ...]:
    golden = manifest.golden
    return tuple(
        StageResult(
            stage=stage,
            error=found.graph[stage].error,
            tolerance=tolerances[stage],
            activation_error=golden.activation_error.get(stage, 0.0),
            quantization_error=quantization[stage].error,
            quantization_tolerance=golden.quantization_tolerances.get(stage, 0.0) * scale,
            total_error=found.total[stage].error,
            where=found.graph[stage].where,
        )
        for stage in STAGES
    )
