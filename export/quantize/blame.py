"""Losses, prices and chosen bits -> the blame table: which stage and part loses what, and what a fix costs in MB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bundle.manifest import Frozen, Stage, Target
from export.quantize.budget import MB, Shapes, price_bytes
from export.quantize.parts import Part
from export.quantize.sensitivity import Loss
from export.weights.recipe import Bits

BLAME_FILE = "blame.json"  # in a bundle whose recipe was chosen

TABLE_WIDTH = 120  # characters that no column is cut in


class BlameRow(Frozen):
    """One part: what it loses alone at 4 and at 8 bits, what 8 bits cost more, and what was chosen."""

    part: str
    stage: Stage
    int4: Loss
    int8: Loss
    fix_mb: float
    bits: int


class Blame(Frozen):
    """The whole table.

    Attributes:
        together: all parts at their bits at once, rounded to nearest: the rows do not quite add up.
    """

    rows: tuple[BlameRow, ...]
    together: Loss
    weights_mb: float
    budget_mb: float


def blame_rows(
    parts: Sequence[Part],
    losses: Mapping[str, Mapping[Bits, Loss]],
    bits: Mapping[str, Bits],
    shapes: Shapes,
    target: Target,
) -> tuple[BlameRow, ...]:
    """The worst at 4 bits first."""
    rows = [
        BlameRow(
            part=part.name,
            stage=part.stage,
            int4=losses[part.name][4],
            int8=losses[part.name][8],
            fix_mb=price_bytes(part, shapes, target) / MB,
            bits=bits[part.name],
        )
        for part in parts
    ]
    return tuple(sorted(rows, key=lambda row: row.int4.kl, reverse=True))


def blame_table(blame: Blame) -> Table:
    """The table as it is printed."""
    table = Table(
        title=f"what each part loses alone; weights {blame.weights_mb:.2f} MB of a budget of {blame.budget_mb:g} MB",
        caption=(
            "KL: from the float model's answer tokens, in nats; flips: answers that change; "
            f"all at their bits together, rounded to nearest: KL {blame.together.kl:.2e}, "
            f"flips {blame.together.flips_percent:.1f} %"
        ),
    )
    table.add_column("part", no_wrap=True)
    table.add_column("stage")
    for column in ("KL int4", "flips int4 %", "KL int8", "flips int8 %", "fix MB", "bits"):
        table.add_column(column, justify="right")
    for row in blame.rows:
        table.add_row(
            row.part,
            row.stage,
            f"{row.int4.kl:.2e}",
            f"{row.int4.flips_percent:.1f}",
            f"{row.int8.kl:.2e}",
            f"{row.int8.flips_percent:.1f}",
            f"{row.fix_mb:.3f}",
            str(row.bits),
        )
    return table


def print_blame(bundle: Path, console: Console) -> None:
    """Print the table of a bundle, if it has one."""
    path = bundle / BLAME_FILE
    if path.is_file():
        table = blame_table(Blame.model_validate_json(path.read_text(encoding="utf-8")))
        Console(file=console.file, width=max(console.width, TABLE_WIDTH)).print(table)
