"""Rows + a frozen tower -> tower features of every image, computed once, when they fit into memory."""

from __future__ import annotations

import torch

from distill.align_kd.module import AlignKD
from distill.batches.image_store import BadImageError, ImageStore
from distill.data.conversation import Row
from distill.data.image_source import ImageSource
from distill.data.rows import Rows

IMAGES_PER_BATCH = 32


def known_features(
    module: AlignKD, rows: Rows, images: ImageStore, budget_bytes: int, leave_out_bad: bool = False
) -> dict[ImageSource, torch.Tensor] | None:
    """Image -> features [P, D_v], or None where every batch has to run the tower.

    That is so when the tower is trained, when teacher and student have different towers, or when the features of all
    images would not fit ``budget_bytes``; the rows are then read no further than the budget reaches.

    Args:
        leave_out_bad: an image that cannot be read gets no features, instead of raising.

    Raises:
        BadImageError: an image is missing or corrupt; the line names the row.
    """
    config = module.student.config
    positions, width = config.feature_shape
    bytes_each = positions * width * 4
    if not module.freeze_tower or not (module.teacher is None or module.shares_tower):
        return None
    by_image = _first_rows(rows, budget_bytes // bytes_each)
    if by_image is None:
        return None
    features: dict[ImageSource, torch.Tensor] = {}
    waiting: list[tuple[ImageSource, torch.Tensor]] = []
    for number, (image, row) in enumerate(by_image.items(), 1):
        try:
            waiting.append((image, images.decode(row)))
        except BadImageError:
            if not leave_out_bad:
                raise
        if waiting and (len(waiting) == IMAGES_PER_BATCH or number == len(by_image)):
            features.update(_features(module, waiting))
            waiting.clear()
    return features


def _first_rows(rows: Rows, most: int) -> dict[ImageSource, Row] | None:
    """A row of every image, or None where there are more images than ``most``."""
    by_image: dict[ImageSource, Row] = {}
    for number in rows.with_image.nonzero()[0].tolist():
        row = rows[number]
        if row.image is not None and row.image not in by_image:
            if len(by_image) >= most:
                return None
            by_image[row.image] = row
    return by_image


@torch.no_grad()
def _features(module: AlignKD, decoded: list[tuple[ImageSource, torch.Tensor]]) -> dict[ImageSource, torch.Tensor]:
    pixels = torch.stack([one for _, one in decoded])  # [b, 3, S, S]
    seen = module.student.tower_features(pixels.to(module.student.device)).cpu()  # [b, P, D_v]
    return dict(zip((image for image, _ in decoded), seen.unbind(), strict=True))
