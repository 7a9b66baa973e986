"""Checkpoint + a held-out file of the demo world -> share of right answers per task family."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch

from bundle.tokenizer import Tokenizer
from distill.data import IGNORED, Collator, Example, ImageStore, encode_row
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing
from distill.rows import Row, read_rows

BATCH = 100


def family_accuracy(
    vlm: MobileVlm, processing: Processing, tokenizer: Tokenizer, data: Path, per_family: int | None = None
) -> dict[str, float]:
    """Percent of single-turn rows of ``data`` whose whole answer, end of sequence included, is the greedy one.

    The answer is fed in and every one of its tokens must be the most likely: greedy decoding would then write just it.
    """
    families: dict[str, list[Row]] = defaultdict(list)
    held_out = read_rows(data)
    for row in held_out:
        families[held_out.raw(row.number)["family"]].append(row)
    collator = Collator(processing.tokenizer.pad_id, ImageStore(processing.image, 0))
    return {
        family: 100 * _share_right(vlm, [_example(row, processing, tokenizer) for row in rows[:per_family]], collator)
        for family, rows in families.items()
    }


def _example(row: Row, processing: Processing, tokenizer: Tokenizer) -> Example:
    ids, labels = encode_row(row, processing, tokenizer)
    return {"input_ids": ids, "labels": labels, "row": row}


@torch.no_grad()
def _share_right(vlm: MobileVlm, examples: list[Example], collator: Collator) -> float:
    right = 0
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    for start in range(0, len(ordered), BATCH):
        batch = collator(ordered[start : start + BATCH])
        has_images = bool((batch["input_ids"] == vlm.image_token_id).any())
        visual = vlm.encode_images(batch["pixel_values"]) if has_images else None
        expanded = vlm.expand(batch["input_ids"], batch["attention_mask"], visual, batch["labels"])
        assert expanded.labels is not None
        likeliest = vlm.lm_head(vlm.hidden_states(expanded)).argmax(-1)  # [B, L]
        wanted = expanded.labels[:, 1:]  # [B, L - 1], what position t must say next
        right += int(((likeliest[:, :-1] == wanted) | (wanted == IGNORED)).all(1).sum())
    return right / len(examples)
