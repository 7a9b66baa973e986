"""AlignKD and training rows -> its maps between visual tokens set to their least-squares fit, before the first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distill.align_kd.module import AlignKD
from distill.batches.collator import Collator
from distill.batches.dataset import LlavaDataset

IMAGES = 512  # with 144 tokens each, 36 tokens for every row of a 2048-wide map
IMAGES_PER_BATCH = 16
RIDGE = 1e-6  # of the mean square of a token's entries
VISUAL_INPUTS = ("pixel_values", "image_features", "teacher_pixel_values", "recorded")  # of AlignKD.visual_pair


@torch.no_grad()
def fit_visual_maps(module: AlignKD, dataset: LlavaDataset, collator: Collator) -> int:
    """Set ``visual_map`` and ``student_map`` to the best linear maps over the first images; returns how many were used.

    The fit is one pass: the normal equations are summed up batch by batch in float64, so that memory does not grow with
    the number of images, and a small ridge keeps them solvable where tokens span fewer directions than they have.
    """
    trained = [m for m in (module.visual_map, module.student_map) if m is not None and m.weight.requires_grad]
    if not trained:  # the published code leaves its maps at random
        return 0
    rows = dataset.rows.with_image.nonzero()[0][:IMAGES].tolist()
    device = module.student.device
    sums = {"theirs": _Sums(), "ours": _Sums()}
    used = 0
    for start in range(0, len(rows), IMAGES_PER_BATCH):
        batch = collator([dataset[i] for i in rows[start : start + IMAGES_PER_BATCH]])
        pair = module.visual_pair(**{name: _to(batch[name], device) for name in VISUAL_INPUTS if name in batch})
        if pair is None:
            return 0
        ours, theirs = (tokens.flatten(0, 1).double() for tokens in pair)  # [n * N, D]
        sums["theirs"].add(theirs, ours)
        sums["ours"].add(ours, theirs)
        used += len(pair[0])
    if not used:
        return 0
    for linear, found in ((module.visual_map, sums["theirs"]), (module.student_map, sums["ours"])):
        if linear in trained:
            found.solve_into(linear)
    return used


class _Sums:
    """Normal equations of target = source @ W + b, added up over batches."""

    def __init__(self) -> None:
        self._square: torch.Tensor | None = None
        self._product: torch.Tensor | None = None

    def add(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """source [m, D_in], target [m, D_out]."""
        with_one = torch.cat([source, torch.ones_like(source[:, :1])], 1)  # [m, D_in + 1]
        square, product = with_one.T @ with_one, with_one.T @ target
        self._square = square if self._square is None else self._square + square
        self._product = product if self._product is None else self._product + product

    def solve_into(self, linear: nn.Linear) -> None:
        assert self._square is not None and self._product is not None
        ridge = RIDGE * self._square.diagonal().mean()
        eye = torch.eye(len(self._square), dtype=self._square.dtype, device=self._square.device)
        solution = torch.linalg.solve(self._square + ridge * eye, self._product)  # [D_in + 1, D_out]
        linear.weight.copy_(solution[:-1].T)
        linear.bias.copy_(solution[-1])


def _to(value: Any, device: torch.device) -> Any:
    """A tensor, or a dictionary of tensors, on the device."""
    if isinstance(value, dict):
        return {name: tensor.to(device) for name, tensor in value.items()}
    return value.to(device)
