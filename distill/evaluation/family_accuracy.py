"""Checkpoint + a held-out file of the demo world -> share of right answers per task family."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from bundle.tokenizer import Tokenizer
from distill.data.rows import Row, read_rows
from distill.evaluation.held_out import MEAN, HeldOut, family_of
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing

BATCH = 100


def family_accuracy(
    vlm: MobileVlm, processing: Processing, tokenizer: Tokenizer, data: Path, per_family: int | None = None
) -> dict[str, float]:
    """Percent of answers of ``data`` that are the greedy ones as a whole, end of sequence included.

    ``per_family`` asks the first so many rows of each family.
    """
    rows, seen = read_rows(data), Counter[str]()
    kept: list[tuple[Row, str]] = []
    for row in rows:
        family = family_of(rows.raw(row.number))
        if per_family is None or seen[family] < per_family:
            kept.append((row, family))
        seen[family] += 1
    context = vlm.config.text_config.max_position_embeddings
    held_out = HeldOut(kept, processing, tokenizer, context, BATCH)
    shares = held_out.tally(vlm, torch.device("cpu")).percent()
    return {family: share for family, share in shares.items() if family != MEAN}
