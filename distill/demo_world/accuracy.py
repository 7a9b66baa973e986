"""Checkpoint + a held-out file of the demo world -> share of right answers per task family."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bundle.tokenizer import Tokenizer
from distill.accuracy import MEAN, HeldOut
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing
from distill.rows import read_json_list

BATCH = 100


def family_accuracy(
    vlm: MobileVlm, processing: Processing, tokenizer: Tokenizer, data: Path, per_family: int | None = None
) -> dict[str, float]:
    """Percent of rows of ``data`` whose whole answer, end of sequence included, is the greedy one.

    ``per_family`` asks the first so many rows of each family.
    """
    seen: Counter[str] = Counter()
    kept: list[tuple[int, Any]] = []
    for number, raw in enumerate(read_json_list(data)):
        if per_family is None or seen[raw["family"]] < per_family:
            kept.append((number, raw))
        seen[raw["family"]] += 1
    context = vlm.config.text_config.max_position_embeddings
    held_out = HeldOut(kept, data, data.parent, processing, tokenizer, context, BATCH)
    shares = held_out.tally(vlm, torch.device("cpu")).percent()
    return {family: share for family, share in shares.items() if family != MEAN}
