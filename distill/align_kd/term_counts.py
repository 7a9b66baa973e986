"""A batch's ids -> how many items each loss term's mean runs over, so that means of several batches add up rightly.

A mean over a micro batch weighs each of its rows by one over that batch's rows. Summed over accumulation steps and
processes, rows of sparse batches would count for more; weighed by these counts, every row counts the same, and two
processes train as one does.
"""

from __future__ import annotations

import torch

from distill.align_kd.module import AlignKD
from distill.settings.terms import ATTENTION_TERMS, DIVERGENCE_TERMS, TERMS

IGNORED = -100
WHOLE_BATCH = "published_logits"  # looks at every position


def term_counts(
    module: AlignKD, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Each of the module's terms -> number of items of its mean, a float64 scalar.

    Args:
        module: says which terms there are, and where the divergences look.
        input_ids, attention_mask, labels: [B, T], as AlignKD takes them.
    """
    per_image = module.student.config.visual_tokens
    real = attention_mask.bool()  # [B, T]
    is_image = (input_ids == module.student.image_token_id) & real  # [B, T]
    images = is_image.sum()
    supervised = (labels[:, 1:] != IGNORED).sum()
    positions = real.sum() + images * (per_image - 1)
    looked_at = {
        "answer": supervised,
        "answer+vision": supervised + images * per_image - _answers_behind_images(is_image, labels),
        "all": positions - len(input_ids),
    }
    text_rows = (is_image.long().cumsum(1) * (real & ~is_image)).sum()  # behind each image
    by_term = dict.fromkeys(TERMS, images)  # the visual terms
    by_term |= dict.fromkeys(ATTENTION_TERMS, text_rows)
    by_term |= dict.fromkeys(DIVERGENCE_TERMS, looked_at[module.settings.mask])
    by_term |= {"cross_entropy": supervised, WHOLE_BATCH: positions}
    return {name: by_term[name].double() for name in module.weights}


def _answers_behind_images(is_image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Images whose last visual token predicts a supervised token: counted as an answer already."""
    return (is_image[:, :-1] & (labels[:, 1:] != IGNORED)).sum()
