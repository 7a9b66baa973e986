"""Rows + a frozen tower -> tower features of every image, computed once, when they fit into memory."""

from __future__ import annotations

from pathlib import Path

import torch

from distill.align_kd import AlignKD
from distill.data import ImageStore
from distill.rows import Row

IMAGES_PER_BATCH = 32


def known_features(
    module: AlignKD, rows: list[Row], images: ImageStore, budget_bytes: int
) -> dict[Path, torch.Tensor] | None:
    """Image path -> features [P, D_v], or None where every batch has to run the tower.

    That is so when the tower is trained, when teacher and student have different towers, or when the features of all
    images would not fit ``budget_bytes``.

    Raises:
        UsageError: an image is missing or corrupt; the line names the row.
    """
    config = module.student.config
    by_path = {row.image: row for row in rows if row.image is not None}
    positions, width = config.feature_shape
    bytes_each = positions * width * 4
    if not module.freeze_tower or not (module.teacher is None or module.shares_tower):
        return None
    if len(by_path) * bytes_each > budget_bytes:
        return None
    features: dict[Path, torch.Tensor] = {}
    paths = list(by_path)
    for start in range(0, len(paths), IMAGES_PER_BATCH):
        some = paths[start : start + IMAGES_PER_BATCH]
        pixels = torch.stack([images.decode(by_path[path]) for path in some])  # [b, 3, S, S]
        with torch.no_grad():
            seen = module.student.tower_features(pixels.to(module.student.device)).cpu()  # [b, P, D_v]
        features.update(zip(some, seen.unbind(), strict=True))
    return features
