"""Bridging numbers of visual tokens: known answers, mass, means, and lines where there is no square grid."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from distill.teacher.bridge import on_students_grid, resample_attention, resample_tokens, shares
from distill.teacher.view import TeacherView

PAIRS = [(576, 144), (729, 144), (144, 576), (729, 576), (577, 576), (9, 10), (4, 9)]


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_attention_keeps_its_mass_and_tokens_their_mean(theirs: int, ours: int) -> None:
    torch.manual_seed(0)
    block, visual = torch.rand(2, 3, 4, theirs), torch.randn(2, theirs, 5)
    moved, seen = resample_attention(block, ours), resample_tokens(visual, ours)
    assert moved.shape == (2, 3, 4, ours) and seen.shape == (2, ours, 5)
    torch.testing.assert_close(moved.sum(-1), block.sum(-1))
    torch.testing.assert_close(seen.mean(1), visual.mean(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(resample_tokens(torch.full((1, theirs, 2), 3.0), ours), torch.full((1, ours, 2), 3.0))


def test_a_grid_that_divides_another_is_average_pooling() -> None:
    visual = torch.randn(2, 576, 5)
    plane = F.avg_pool2d(visual.mT.unflatten(2, (24, 24)), 2)
    torch.testing.assert_close(resample_tokens(visual, 144), plane.flatten(2).mT, atol=1e-6, rtol=1e-5)
    block = torch.rand(1, 2, 3, 576)
    torch.testing.assert_close(
        resample_attention(block, 144),
        4 * F.avg_pool2d(block.unflatten(3, (24, 24)).flatten(0, 2), 2).view(1, 2, 3, 144),
    )


def test_known_answers() -> None:
    # 2x2 -> 3x3: the corner cell keeps 2/3 * 2/3 of its area in the corner, the middle gets a quarter of every cell's
    share = shares(4, 9).view(2, 2, 3, 3)
    torch.testing.assert_close(share[0, 0], torch.tensor([[4.0, 2, 0], [2, 1, 0], [0, 0, 0]]) / 9)
    # 2 -> 3 is no square: a line
    torch.testing.assert_close(shares(2, 3), torch.tensor([[2.0, 1, 0], [0, 1, 2]]) / 3)


def test_equal_numbers_are_left_alone() -> None:
    view = TeacherView(attention=torch.rand(1, 2, 3, 9), visual=torch.rand(1, 9, 4))
    same = on_students_grid(view, 9)
    assert same.attention is view.attention and same.visual is view.visual and same.group_attention is None
