"""Flat tensors of a batch, as the collator reads them from a teacher cache -> TeacherView, on the batch's device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distill.teacher.sparse_rows import SparseRows
from distill.teacher.view import TeacherView

# Stored attention is multiplied by this power of two: entries near 1 / length would be subnormal in float16.
ATTENTION_SCALE = 2.0**15


def recorded_view(recorded: Mapping[str, torch.Tensor]) -> TeacherView:
    """One batch of a recorded teacher.

    Args:
        recorded: any of
            row_ids, row_log_p [S, K], row_log_rest, row_log_threshold [S], the predicting rows of the batch in order;
            attention [n, H, R, N] scaled, R the most text rows of an image of the batch, zeros behind shorter ones;
            groups [n, G, R, N], the same; focus [n, k]; visual [n, N, D_T]. No image: without the last four.
    """
    rows = None
    if "row_ids" in recorded:
        names = ("row_ids", "row_log_p", "row_log_rest", "row_log_threshold")
        rows = SparseRows(*(recorded[name] for name in names))
    groups = recorded.get("groups")
    return TeacherView(
        rows=rows,
        attention=_unscaled(recorded["attention"]) if "attention" in recorded else None,
        group_attention=None if groups is None else tuple(_unscaled(groups).split(1, dim=1)),
        focus=recorded["focus"].long() if "focus" in recorded else None,
        visual=recorded["visual"].float() if "visual" in recorded else None,
    )


def _unscaled(block: torch.Tensor) -> torch.Tensor:
    return block.float() / ATTENTION_SCALE
