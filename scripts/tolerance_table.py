"""Rules of bundle/tolerances.py -> the two tables of docs/verification.md on stdout."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bundle.tolerances import KERNELS, QUANTIZATION_FLOOR, QUANTIZATION_MARGIN, RULES


def table() -> str:
    """Both tables in Markdown."""
    lines = ["| kernels | bundles | family | visual tokens, embeddings, first logits, greedy | margin | source |"]
    lines.append("|---|---|---|---|---:|---|")
    for kernels, rows in RULES.items():
        bundles = "; ".join(
            f"{target} {', '.join(precision for precision, found in row.items() if found == kernels)}"
            for target, row in KERNELS.items()
            if kernels in row.values()
        )
        for family, rule in rows.items():
            floor = ", ".join(f"{number:g}" for number in rule.floor)
            lines.append(f"| {kernels} | {bundles} | {family} | {floor} | {rule.margin:g} | {rule.source} |")
    lines += ["", "| stage | weights: times plain rounding | floor |", "|---|---:|---:|"]
    lines += [f"| {stage} | {margin:g} | {QUANTIZATION_FLOOR:g} |" for stage, margin in QUANTIZATION_MARGIN.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
