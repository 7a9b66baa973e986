"""What a teacher says of its visual tokens -> the same of the student's, where they cut a picture differently finely.

Both see the same picture as a square grid of cells in reading order. A teacher cell's share of a student cell is the
part of its area that lies in it, so that attention keeps its mass (every teacher cell gives all it has) and a visual
token becomes the mean of what covers its area: average pooling where one grid divides the other, an adaptive one else.
Nothing is learned here; width is bridged by the learned maps that the terms have anyway. Tokens that form no square
grid (a class token among them) are taken as cells of a line in reading order.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from distill.teacher.view import TeacherView


def on_students_grid(view: TeacherView, tokens: int) -> TeacherView:
    """The view with ``tokens`` visual tokens per image, the student's number.

    Indexes of recorded tokens are no shares of an area: a cache is of one grid, see ``distill.teacher_cache.search``.
    """
    groups = view.group_attention
    assert view.focus is None or view.visual is None or view.visual.shape[1] == tokens
    return replace(
        view,
        attention=None if view.attention is None else resample_attention(view.attention, tokens),
        group_attention=None if groups is None else tuple(resample_attention(group, tokens) for group in groups),
        visual=None if view.visual is None else resample_tokens(view.visual, tokens),
    )


def resample_attention(block: torch.Tensor, tokens: int) -> torch.Tensor:
    """Attention [n, H, R, N_T] -> [n, H, R, tokens]; each row keeps its sum."""
    if block.shape[-1] == tokens:
        return block
    return block @ shares(block.shape[-1], tokens).to(block)  # [n, H, R, tokens]


def resample_tokens(visual: torch.Tensor, tokens: int) -> torch.Tensor:
    """Visual tokens [n, N_T, D] -> [n, tokens, D], each the mean over its area."""
    if visual.shape[1] == tokens:
        return visual
    share = shares(visual.shape[1], tokens).to(visual)  # [N_T, tokens]
    return (share / share.sum(0)).T @ visual  # [n, tokens, D]


@lru_cache(maxsize=8)
def shares(theirs: int, ours: int) -> torch.Tensor:
    """[theirs, ours]: which part of each teacher cell lies in each student cell; every row sums to 1."""
    sides = round(theirs**0.5), round(ours**0.5)
    if sides[0] ** 2 != theirs or sides[1] ** 2 != ours:
        return _overlaps(theirs, ours)
    along = _overlaps(*sides)
    return torch.kron(along, along)  # [g_T * g_T, g_S * g_S], rows of the picture first


def _overlaps(theirs: int, ours: int) -> torch.Tensor:
    """[theirs, ours]: the same for a line from 0 to 1, cut into equal cells."""
    cell = torch.arange(theirs, dtype=torch.float64)[:, None] / theirs  # left edges
    other = torch.arange(ours, dtype=torch.float64)[None] / ours
    right = torch.minimum(cell + 1 / theirs, other + 1 / ours)
    return ((right - torch.maximum(cell, other)).clamp_min(0) * theirs).float()
