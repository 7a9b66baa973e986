"""alignkd-verify BUNDLE -> the stage ladder of every runtime of this host on stdout; exit 0, 3 or 6."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bundle.errors import VerificationError, run_command
from bundle.verify import Skipped, Verdict, verify_with_reasons


@dataclass(frozen=True)
class VerifyConfig:
    """Check every file of a bundle against its manifest, then replay its golden vectors on each runtime of this host.

    Prints error and tolerance of each stage and names the first stage that leaves it. Exit code 0: all within
    tolerance; 3: a stage is not, or a file was changed; 6: this host has no runtime for the bundle's target.
    """

    bundle: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BUNDLE")]
    """directory that alignkd-export wrote"""
    runtime: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """only this runtime (onnx, executorch, coreml, coreml_interpreter); may be repeated; default: all of this host"""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """end with one line of JSON on stdout"""


def verify(config: VerifyConfig) -> int:
    """Run one verification and print it."""
    try:
        verdicts, skipped = verify_with_reasons(config.bundle, config.runtime or None)
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

    table = Table(title=escape(f"{bundle.name} on {verdict.runtime}"), title_justify="left")
    for heading in ("stage", "error", "tolerance", "ok"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for result in verdict.stages:
        table.add_row(result.stage, f"{result.error:.2e}", f"{result.tolerance:.2e}", "yes" if result.ok else "NO")
    console = Console()
    console.print(table)
    bad = verdict.first_bad
    judged = "every stage is within tolerance" if bad is None else f"the first stage out of tolerance is '{bad.stage}'"
    console.print(escape(f"{judged}; covers: {verdict.covers}"), soft_wrap=True)


def _problem(bundle: Path, verdicts: list[Verdict]) -> str | None:
    bad = [(verdict.runtime, verdict.first_bad) for verdict in verdicts if verdict.first_bad is not None]
    if not bad:
        return None
    named = "; ".join(
        f"stage '{result.stage}' on {runtime} (error {result.error:.2e}, tolerance {result.tolerance:.2e})"
        for runtime, result in bad
    )
    return f"{bundle} does not compute what was recorded at export: first out of tolerance is {named}; export it again"


def _as_json(bundle: Path, verdicts: list[Verdict], skipped: list[Skipped], problem: str | None) -> dict[str, object]:
    return {
        "bundle": str(bundle),
        "ok": problem is None,
        "problem": problem,
        "verdicts": [
            {
                "runtime": verdict.runtime,
                "covers": verdict.covers,
                "ok": verdict.first_bad is None,
                "first_bad_stage": verdict.first_bad.stage if verdict.first_bad else None,
                "stages": [
                    {
                        "stage": result.stage,
                        "error": result.error if math.isfinite(result.error) else None,
                        "tolerance": result.tolerance,
                        "ok": result.ok,
                    }
                    for result in verdict.stages
                ],
            }
            for verdict in verdicts
        ],
        "skipped": [{"runtime": left_out.runtime, "reason": left_out.reason} for left_out in skipped],
    }


def main() -> None:
    """Entry point of alignkd-verify."""
    config = tyro.cli(VerifyConfig, prog="alignkd-verify")
    run_command(lambda: verify(config))


if __name__ == "__main__":
    main()
