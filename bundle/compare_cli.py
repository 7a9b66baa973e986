"""Two bundles -> the comparison that alignkd-verify --compare prints; exit 0, or 3 below --min-agreement."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from bundle.agreement import COMPARED_STAGES, Comparison
from bundle.errors import VerificationError


def print_comparison(
    first: Path,
    second: Path,
    *,
    runtime: str | None,
    cases: Path | None,
    max_new_tokens: int,
    min_agreement: float | None,
    as_json: bool,
) -> int:
    """Compare and print.

    Raises:
        VerificationError: the bundles agree on fewer tokens than ``min_agreement``.
    """
    from rich.console import Console
    from rich.markup import escape

    from bundle.compare import compare_bundles

    progress = Console(stderr=True)
    found = compare_bundles(
        first, second, runtime, cases, max_new_tokens, lambda line: progress.print(f"[dim]{escape(line)}[/dim]")
    )
    _print(first, second, found)
    problem = None
    if min_agreement is not None and found.agreement < min_agreement:
        problem = (
            f"{second} agrees with {first} on {found.agreement:.1%} of {found.tokens} answer tokens, "
            f"--min-agreement asks for {min_agreement:.1%}; run alignkd-verify on each of them: it names the stage"
        )
    if as_json:
        print(json.dumps(_as_json(first, second, found, problem)))
    if problem is not None:
        raise VerificationError(problem)
    return 0


def _print(first: Path, second: Path, found: Comparison) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    title = f"{second.name} on {found.runtimes[1]} against {first.name} on {found.runtimes[0]}"
    table = Table(title=escape(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("question", "tokens", "agree", "same place", "mean KL", "max KL", "parts at"):
        table.add_column(heading, justify="left" if heading == "question" else "right")
    for each in found.questions:
        table.add_row(
            escape(each.question.name),
            str(each.tokens),
            f"{each.agreed / each.tokens:.1%}",
            f"{each.matched / each.tokens:.1%}",
            f"{sum(each.kl) / len(each.kl):.2e}",
            f"{max(each.kl):.2e}",
            "-" if each.divergence is None else str(each.divergence.position),
        )
    console = Console()
    console.print(table)
    for line in _lines(found):
        console.print(escape(line), soft_wrap=True, highlight=False)


def _lines(found: Comparison) -> list[str]:
    errors = {stage: found.worst(stage) for stage in COMPARED_STAGES}
    shown = ", ".join(f"{stage} {'other shape' if e is None else f'{e:.2e}'}" for stage, e in errors.items())
    lines = [
        f"agreement {found.agreement:.1%} of {found.tokens} tokens, each fed the first bundle's; each by itself "
        f"{found.match_rate:.1%}; {found.same_answers} of {len(found.questions)} answers the same; "
        f"mean KL {sum(found.kl) / len(found.kl):.2e} nats",
        f"relative error by stage, each bundle from the picture on: {shown}",
    ]
    first = found.first_divergence
    if first is not None:
        lines.append(
            f"first divergence: {first.question}, answer token {first.position}: {first.pieces[0]!r} "
            f"({first.tokens[0]}, ahead by {first.margins[0]:.3g}) against {first.pieces[1]!r} "
            f"({first.tokens[1]}, ahead by {first.margins[1]:.3g}); logits of near ties flip under any rounding"
        )
    return lines


def _as_json(first: Path, second: Path, found: Comparison, problem: str | None) -> dict[str, object]:
    def finite(number: float | None) -> float | None:
        return number if number is not None and math.isfinite(number) else None

    return {
        "bundles": [str(first), str(second)],
        "runtimes": list(found.runtimes),
        "ok": problem is None,
        "problem": problem,
        "tokens": found.tokens,
        "agreement": found.agreement,
        "match_rate": found.match_rate,
        "same_answers": found.same_answers,
        "mean_kl_nats": finite(sum(found.kl) / len(found.kl)),
        "max_kl_nats": finite(max(found.kl)),
        "relative_error": {stage: finite(found.worst(stage)) for stage in COMPARED_STAGES},
        "first_divergence": asdict(found.first_divergence) if found.first_divergence else None,
        "questions": [
            {
                "name": each.question.name,
                "question": each.question.text,
                "tokens": each.tokens,
                "agreed": each.agreed,
                "matched": each.matched,
                "kl_nats": [finite(value) for value in each.kl],
                "relative_error": {stage: finite(error) for stage, error in each.errors.items()},
                "divergence": asdict(each.divergence) if each.divergence else None,
            }
            for each in found.questions
        ],
    }
