"""alignkd's Align-KD training step against the published formulation: same weights, same batch, alternating.

    OMP_NUM_THREADS=2 python benchmarks/distill_step.py
    python benchmarks/distill_step.py --device cuda --dtype bf16 --shape 1.7B --batch 16

Prints a Markdown table. A step is forward, losses and backward, without the optimizer. Memory is the peak above the
loaded models: with the gradients that the step makes, and with gradients held before it. On the CPU each is the peak of
resident memory in a fresh fork; on a GPU what PyTorch's allocator says, and the table has tokens/s and the share of the
card's peak FLOP rate as well. The rows:

- published: the published formulation (``published_step.py``) in float32. The original holds its teacher in half
  precision: "published, bf16 teacher" is what that alone gives.
- alignkd: the same arithmetic as published, float32 throughout: what the formulation alone gives.
- alignkd, bf16 teacher: what the claim "x times faster than published" is about (``--teacher-dtype bfloat16``).
- features known: the tower's features are in memory, as alignkd-distill keeps them where they fit.
- teacher recorded: the teacher's side is in memory, as read from a teacher cache; with or without the features.
- bf16 autocast: the student's arithmetic in bfloat16 too.

With --dtype bf16 every row is under autocast with a bf16 teacher, published as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from step_arms import FROM_CACHE, OURS, POSITIONS, PUBLISHED, SHAPES, Arms, make_arms, term_differences
from step_cost import operations, peak_bytes, peak_rate, seconds_of

from runtime_bench.device import local_device, source_commit


@dataclass(frozen=True)
class Row:
    """What was measured of one arm."""

    seconds: list[float]
    peak: int
    peak_beside_gradients: int
    operations: int | None = None


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    flags = parse(arguments)
    autocast = flags.dtype == "bf16"
    arms = make_arms(flags.shape, flags.batch, flags.device, autocast)
    rows = measure(arms, flags.device, flags.repeats, flags.processor_time)
    card = torch.cuda.get_device_name() if flags.device == "cuda" else None
    peak = None if card is None else peak_rate(card, autocast)
    conditions = {
        "torch": torch.__version__,
        "device": card or local_device().cpu,
        "threads": torch.get_num_threads(),
        "dtype": flags.dtype,
        "shape": flags.shape,
        "batch": flags.batch,
        "positions": POSITIONS,
        "repeats": flags.repeats,
        "clock": "processor time" if flags.processor_time else "wall",
        "commit": source_commit(),
    }
    differences = term_differences(arms)
    lines = [table(rows, flags.batch * POSITIONS, peak), "", claim(rows), ""]
    if differences:
        found = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        lines += [f"Terms with a bf16 teacher against float32, relative difference: {found}", ""]
    lines.append(", ".join(f"{name} {value}" for name, value in conditions.items()))
    sys.stdout.write("\n".join(lines) + "\n")
    if flags.json is not None:
        facts: dict[str, Any] = {"conditions": conditions, "term_differences": differences}
        facts["rows"] = {name: vars(row) for name, row in rows.items()}
        flags.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bf16"], default="float32")
    parser.add_argument(
        "--processor-time", action="store_true", help="seconds of this process, not of the wall clock; for one thread"
    )
    parser.add_argument("--json", type=Path, help="also write every sample there")
    flags = parser.parse_args(arguments)
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; use --device cpu")
    if flags.processor_time and (flags.device == "cuda" or torch.get_num_threads() > 1):
        parser.error("--processor-time is for --device cpu and OMP_NUM_THREADS=1")
    return flags


def measure(arms: Arms, device: str, repeats: int, processor_time: bool) -> dict[str, Row]:
    """Peaks first, then seconds, the arms taking turns; the first round warms up."""
    peaks: dict[str, tuple[int, int]] = {}
    counted: dict[str, int | None] = {}
    for name, step in arms.steps.items():
        if device == "cuda":  # the libraries' workspaces are no part of a step
            step().backward()
            arms.clear()
        total = peak_bytes(step, device)
        arms.clear()
        peaks[name] = (total, peak_bytes(step, device, arms.parameters()))
        arms.clear()
        counted[name] = operations(step) if device == "cuda" else None  # CPU attention is not counted
        arms.clear()
    seconds: dict[str, list[float]] = {name: [] for name in arms.steps}
    for number in range(repeats + 1):
        for name, step in arms.steps.items():
            taken = seconds_of(step, device, processor_time)
            arms.clear()
            if number:
                seconds[name].append(taken)
    return {name: Row(seconds[name], *peaks[name], counted[name]) for name in arms.steps}


def table(rows: dict[str, Row], tokens: int, peak_flops: float | None = None) -> str:
    """Markdown: medians and peaks, with the ratios to the published formulation.

    Args:
        tokens: positions of the batch.
        peak_flops: FLOP/s of the card, where known.
    """
    on_gpu = all(row.operations is not None for row in rows.values())
    heads = ["step", "s", "faster", "tokens/s", "MiB above the models", "share", "MiB beside gradients", "share"]
    heads += ["TFLOP", "TFLOP/s", "share of peak"] if on_gpu else []
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    base = rows[PUBLISHED]
    for name, row in rows.items():
        median = statistics.median(row.seconds)
        cells = [name, f"{median:.3g}", f"{statistics.median(base.seconds) / median:.2f}x", f"{tokens / median:.0f}"]
        cells += [f"{row.peak / 2**20:.0f}", f"{row.peak / base.peak:.2f}x"]
        beside = row.peak_beside_gradients
        cells += [f"{beside / 2**20:.0f}", f"{beside / max(1, base.peak_beside_gradients):.2f}x"]
        if on_gpu:
            assert row.operations is not None
            rate = row.operations / median
            share = "unknown card" if peak_flops is None else f"{rate / peak_flops:.0%}"
            cells += [f"{row.operations / 1e12:.3g}", f"{rate / 1e12:.3g}", share]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claim(rows: dict[str, Row]) -> str:
    """The two figures that are claimed, and of which rows."""
    base, ours, cached = (rows[name] for name in (PUBLISHED, OURS, FROM_CACHE))
    faster, from_cache = (statistics.median(base.seconds) / statistics.median(row.seconds) for row in (ours, cached))
    return (
        f"'{OURS}' is {faster:.2f}x faster than '{PUBLISHED}' at {ours.peak / base.peak:.2f}x of its memory; "
        f"'{FROM_CACHE}' is {from_cache:.2f}x faster."
    )


if __name__ == "__main__":
    main()
