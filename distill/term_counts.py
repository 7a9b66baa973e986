"""A batch's ids -> how many items each loss term's mean runs over, so that means of several batches add up rightly.

A mean over a micro batch weighs each of its rows by one over that batch's rows. Summed over accumulation steps and
processes, rows of sparse batches would count for more; weighed by these counts, every row counts the same, and two
processes train as one does.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from distill.align_kd import ATTENTION_TERMS, DIVERGENCES, VISUAL_TERMS

IGNORED = -100
ROW_TERMS = ("cross_entropy", *DIVERGENCES)  # over supervised rows


def term_counts(
    terms: Iterable[str],
    image_token_id: int,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Term -> number of items of its mean, a float64 scalar.

    Args:
        terms: names of the terms.
        image_token_id: stands for one image in ``input_ids``.
        input_ids, attention_mask, labels: [B, T], as AlignKD takes them.
    """
    is_image = (input_ids == image_token_id) & attention_mask.bool()  # [B, T]
    images_before = is_image.long().cumsum(1)  # [B, T]
    is_text = attention_mask.bool() & ~is_image  # [B, T]
    kinds = {
        ROW_TERMS: (labels[:, 1:] != IGNORED).sum(),
        VISUAL_TERMS: is_image.sum(),
        ATTENTION_TERMS: (images_before * is_text).sum(),  # text rows behind each image
    }
    by_term = {name: count.double() for names, count in kinds.items() for name in names}
    return {name: by_term[name] for name in terms}
