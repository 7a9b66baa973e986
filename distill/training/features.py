"""Rows + a frozen tower -> tower features of every image, each computed once in one process, where they fit memory."""

from __future__ import annotations

import torch

from distill.align_kd.module import AlignKD
from distill.batches.image_store import BadImageError, ImageStore
from distill.data.conversation import Row
from distill.data.image_source import ImageSource
from distill.data.rows import Rows
from distill.training.ranks import Ranks

IMAGES_PER_BATCH = 32

Features = dict[ImageSource, torch.Tensor]


def known_features(
    module: AlignKD,
    rows: Rows,
    images: ImageStore,
    budget_bytes: int,
    leave_out_bad: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Features | None:
    """Image -> features [P, D_v] of this process's share, or None where every batch has to run the tower.

    That is so when the tower is trained, when teacher and student have different towers, or when the features of all
    images would not fit ``budget_bytes``; the rows are then read no further than the budget reaches.

    Args:
        leave_out_bad: an image that cannot be read gets no features, instead of raising.
        share: this process's number, and how many share the images.

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
    features: Features = {}
    waiting: list[tuple[ImageSource, torch.Tensor]] = []
    mine = list(by_image.items())[share[0] :: share[1]]
    for number, (image, row) in enumerate(mine, 1):
        try:
            waiting.append((image, images.decode(row)))
        except BadImageError:
            if not leave_out_bad:
                raise
        if waiting and (len(waiting) == IMAGES_PER_BATCH or number == len(mine)):
            features.update(_features(module, waiting))
            waiting.clear()
    return features


def everyones_features(mine: Features, ranks: Ranks, module: AlignKD) -> Features:
    """The features of all processes' shares, sent a batch of images at a time; ``mine`` is emptied on the way.

    Every process must ask.
    """
    if ranks.count == 1:
        return mine
    device, shape = module.student.device, module.student.config.feature_shape
    features: Features = {}
    for source, images in enumerate(ranks.gathered(list(mine))):
        for start in range(0, len(images), IMAGES_PER_BATCH):
            some = images[start : start + IMAGES_PER_BATCH]
            if source == ranks.index:
                values = torch.stack([mine.pop(image) for image in some])
            else:
                values = torch.empty(len(some), *shape, dtype=module.student.dtype)
            features.update(zip(some, ranks.sent(values, source, device).unbind(), strict=True))  # [b, P, D_v]
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
def _features(module: AlignKD, decoded: list[tuple[ImageSource, torch.Tensor]]) -> Features:
    pixels = torch.stack([one for _, one in decoded])  # [b, 3, S, S]
    seen = module.student.tower_features(pixels.to(module.student.device)).cpu()  # [b, P, D_v]
    return dict(zip((image for image, _ in decoded), seen.unbind(), strict=True))
