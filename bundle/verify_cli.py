"""alignkd-verify BUNDLE -> the stage ladder of every runtime of this host, or two bundles side by side."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bundle.diagnosis import StageResult
from bundle.errors import UsageError, VerificationError, run_command
from bundle.verify import Skipped, Verdict, verify_with_reasons

EXPLAINED = "docs/verification.md explains the columns"


@dataclass(frozen=True)
class VerifyConfig:
    """Check every file of a bundle against its manifest, then replay its golden vectors on each runtime of this host.

    Prints what graph, activations and weights move in each stage, and names the first stage that leaves its tolerance,
    the kind of fault and what to run next. With --compare both bundles answer the same questions instead, token by
    token. Exit code 0: all within tolerance; 3: a stage is not, a file was changed, or the bundles agree less than
    --min-agreement; 5: the bundles cannot be compared; 6: this host has no runtime for the bundle's target.
    """

    bundle: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BUNDLE")]
    """directory that alignkd-export wrote"""
    runtime: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """only this runtime (onnx, executorch, coreml, coreml_interpreter, coreai, coreai_interpreter); may be repeated;
    default: all of this host"""
    tolerance_scale: Annotated[float, tyro.conf.arg(metavar="X")] = 1.0
    """multiplies every tolerance, to measure a processor that has no numbers of its own yet"""
    compare: Annotated[Path | None, tyro.conf.arg(metavar="OTHER")] = None
    """another bundle: answer the golden questions of both with both, and compare token by token"""
    cases: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """with --compare: JSON lines of {"question": ..., "image": path or null} instead of the golden questions"""
    max_new_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 32
    """with --compare: answer tokens a question"""
    min_agreement: Annotated[float | None, tyro.conf.arg(metavar="SHARE")] = None
    """with --compare: exit with 3 when fewer answer tokens agree (0 to 1), each fed the first bundle's tokens"""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """end with one line of JSON on stdout"""

    def __post_init__(self) -> None:
        problems = []
        if not (math.isfinite(self.tolerance_scale) and self.tolerance_scale > 0):
            problems.append(f"--tolerance-scale {self.tolerance_scale} must be above 0")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            problems.append(f"--min-agreement {self.min_agreement} must lie between 0 and 1")
        if self.max_new_tokens < 1:
            problems.append(f"--max-new-tokens {self.max_new_tokens} must be at least 1")
        if self.compare is None and (self.cases is not None or self.min_agreement is not None):
            problems.append("--cases and --min-agreement need --compare OTHER")
        if self.compare is not None and len(self.runtime) > 1:
            problems.append(f"--compare takes one --runtime, not {len(self.runtime)}")
        if problems:
            raise UsageError("; ".join(problems))


def verify(config: VerifyConfig) -> int:
    """Run one verification, or one comparison, and print it."""
    if config.compare is not None:
        from bundle.compare_cli import print_comparison

        return print_comparison(
            config.bundle,
            config.compare,
            runtime=config.runtime[0] if config.runtime else None,
            cases=config.cases,
            max_new_tokens=config.max_new_tokens,
            min_agreement=config.min_agreement,
            as_json=config.json,
        )
    try:
        verdicts, skipped = verify_with_reasons(config.bundle, config.runtime or None, config.tolerance_scale)
    except VerificationError as error:
        if config.json:
            print(
                json.dumps(
                    {"bundle": str(config.bundle), "ok": False, "problem": str(error), "verdicts": [], "skipped": []}
                )
            )
        raise
    for verdict in verdicts:
        _print_verdict(config.bundle, verdict)
    for left_out in skipped:
        print(f"{left_out.runtime}: not run here ({left_out.reason})")
    problem = _problem(config.bundle, verdicts)
    if config.json:
        print(json.dumps(_as_json(config.bundle, verdicts, skipped, problem)))
    if problem is not None:
        raise VerificationError(problem)
    return 0


def _print_verdict(bundle: Path, verdict: Verdict) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    title = f"{bundle.name} on {verdict.runtime}, tolerances of {verdict.family}"
    table = Table(title=escape(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("stage", "graph", "allowed", "rounding", "weights", "allowed", "total", "ok"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for row in verdict.stages:
        measured = (row.error, row.tolerance, row.activation_error, row.quantization_error, row.quantization_tolerance)
        numbers = [f"{number:.1e}" for number in (*measured, row.total_error)]
        table.add_row(row.stage, *numbers, "yes" if row.ok else "NO")
    console = Console()
    console.print(table)
    lines = [
        f"{verdict.agreed} of {verdict.rows} answer tokens are the checkpoint's in float32; covers: {verdict.covers}; "
        + EXPLAINED,
        "every stage is within tolerance",
    ]
    if verdict.diagnosis is not None:
        found = verdict.diagnosis
        lines[1:] = [
            f"first out of tolerance: {found.stage}",
            f"  kind:  {found.kind}",
            f"  error: {found.measured}",
            f"  cause: {found.cause}",
            f"  next:  {found.next_step}",
        ]
    if verdict.prefix is not None:
        lines.append(str(verdict.prefix) + ("" if verdict.prefix.ok else ": out of tolerance"))
    for line in lines:
        console.print(escape(line), soft_wrap=True, highlight=False)


def _problem(bundle: Path, verdicts: list[Verdict]) -> str | None:
    bad = [f"{verdict.problem} (on {verdict.runtime})" for verdict in verdicts if verdict.problem is not None]
    if not bad:
        return None
    return f"{bundle} does not compute what was recorded at export: {'; '.join(bad)}"


def _as_json(bundle: Path, verdicts: list[Verdict], skipped: list[Skipped], problem: str | None) -> dict[str, object]:
    return {
        "bundle": str(bundle),
        "ok": problem is None,
        "problem": problem,
        "verdicts": [
            {
                "runtime": verdict.runtime,
                "covers": verdict.covers,
                "family": verdict.family,
                "ok": verdict.problem is None,
                "first_bad_stage": verdict.first_bad.stage if verdict.first_bad else None,
                "diagnosis": asdict(verdict.diagnosis) if verdict.diagnosis else None,
                "prefix_cache": asdict(verdict.prefix) if verdict.prefix else None,
                "tokens_agreed": verdict.agreed,
                "tokens_compared": verdict.rows,
                "stages": [_stage_json(result) for result in verdict.stages],
            }
            for verdict in verdicts
        ],
        "skipped": [{"runtime": left_out.runtime, "reason": left_out.reason} for left_out in skipped],
    }


def _stage_json(result: StageResult) -> dict[str, object]:
    row = asdict(result)
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return {**finite, "ok": result.ok}


def main() -> None:
    """Entry point of alignkd-verify."""
    run_command(lambda: verify(tyro.cli(VerifyConfig, prog="alignkd-verify")))


if __name__ == "__main__":
    main()
