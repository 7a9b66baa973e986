"""Rows + a frozen teacher -> what the losses need of it for every row, computed once, when it fits into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distill.align_kd import AlignKD
from distill.data import Collator, LlavaDataset
from distill.models.roles import look
from distill.teacher_view import LiveRows, TeacherView, Wanted, live_view

ROWS_PER_BATCH = 32


@dataclass(frozen=True)
class DenseRows:
    """Recorded log-probabilities over the whole vocabulary."""

    log_teacher: torch.Tensor  # [S, V]

    def split(self, rows: int) -> list[DenseRows]:
        return [DenseRows(part) for part in self.log_teacher.split(rows)]

    def beside(self, log_student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return log_student, self.log_teacher.float()


@dataclass(frozen=True)
class RowView:
    """The teacher's view of one row; parts that no term asks for, and image parts of a row of text, are None."""

    rows: torch.Tensor | None  # [S, V] float16 log-probabilities
    attention: torch.Tensor | None  # [H_T, R, N]
    groups: torch.Tensor | None  # [G, R, N]
    visual: torch.Tensor | None  # [N, D_T]


def record_teacher(module: AlignKD, dataset: LlavaDataset, collator: Collator) -> list[RowView]:
    """Run the teacher once over every row."""
    assert module.teacher is not None
    views: list[RowView] = []
    indexes = range(len(dataset))
    for start in range(0, len(dataset), ROWS_PER_BATCH):
        batch = collator([dataset[i] for i in indexes[start : start + ROWS_PER_BATCH]])
        views += _views(module, batch)
    return views


@torch.no_grad()
def _views(module: AlignKD, batch: dict[str, torch.Tensor]) -> list[RowView]:
    teacher, wanted = module.teacher, module.wanted
    assert teacher is not None
    known = batch["image_features"] if "image_features" in batch else teacher.tower_features(batch["pixel_values"])
    has_image = (batch["input_ids"] == teacher.image_token_id).any(1)
    visual = teacher.projector(known) if has_image.any() else None
    seen = look(
        teacher, batch["input_ids"], batch["attention_mask"], batch["labels"], visual, every_layer=wanted.groups > 0
    )
    view = live_view(teacher, seen, wanted)
    counts = _rows_each(seen.expanded.labels, wanted)
    log_rows: Sequence[torch.Tensor | None] = [None] * len(has_image)
    if isinstance(view.rows, LiveRows):
        dense = view.rows.beside(view.rows.hidden)[1].half()
        log_rows = dense.split(counts)
    views, image = [], 0
    from distill.models.roles import spans_of

    mask = spans_of(seen.expanded).row_mask if visual is not None else None
    for row, with_image in enumerate(has_image.tolist()):
        if not with_image:
            views.append(RowView(log_rows[row], None, None, None))
            continue
        assert mask is not None
        real = int(mask[image].sum())
        groups = view.group_attention
        views.append(
            RowView(
                log_rows[row],
                None if view.attention is None else view.attention[image, :, :real].clone(),
                None if groups is None else torch.stack([group[image, 0, :real] for group in groups]),
                None if view.visual is None else view.visual[image].clone(),
            )
        )
        image += 1
    return views


def _rows_each(labels: torch.Tensor | None, wanted: Wanted) -> list[int]:
    assert labels is not None and wanted.rows in (None, "answer")
    return [int(n) for n in (labels[:, 1:] != -100).sum(1)]


def together(views: list[RowView]) -> TeacherView:
    """Rows of a batch -> its TeacherView, text rows after an image padded to the longest."""
    log_rows = [view.rows for view in views if view.rows is not None]
    rows = DenseRows(torch.cat(log_rows)) if log_rows else None
    attention = [view.attention for view in views if view.attention is not None]
    groups = [view.groups for view in views if view.groups is not None]
    visual = [view.visual for view in views if view.visual is not None]
    grouped = _padded(groups)  # [n, G, R, N]
    return TeacherView(
        rows,
        _padded(attention),
        None if grouped is None else tuple(part[:, None] for part in grouped.unbind(1)),
        torch.stack(visual) if visual else None,
    )


def _padded(blocks: list[torch.Tensor]) -> torch.Tensor | None:
    if not blocks:
        return None
    longest = max(block.shape[1] for block in blocks)
    whole = blocks[0].new_zeros(len(blocks), blocks[0].shape[0], longest, blocks[0].shape[2])
    for i, block in enumerate(blocks):
        whole[i, :, : block.shape[1]] = block
    return whole
