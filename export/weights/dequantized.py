"""Weights that the files hold, and the checkpoint's -> nothing, or the first value that rounding does not explain.

Each target has its own way back from its files: our packer's inverse over the ONNX data file, levels and scales of the
.pte for ExecuTorch, the decompressed constants of weight.bin for Core ML, those of the program for Core AI. What comes
back is held against the checkpoint here by one rule for all of them, which knows nothing of packing: how far rounding
to nearest at the recipe's width can move a value. A scale of the wrong block, a transposed or shifted matrix cannot
pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from bundle.errors import VerificationError
from bundle.manifest import Stage
from export.weights.lazy import LazyWeights, read_weight
from export.weights.palette import entries_of, to_nearest
from export.weights.plan import StoragePlan
from export.weights.recipe import Bits, Storage

FLOAT16_STEP = 2.0**-10  # relative, twice the rounding error
SMALLEST_FLOAT16 = 2.0**-24
CHUNK_VALUES = 1 << 20  # compared or rounded at once: temporaries of a few MB
# Steps (largest magnitude of the group over the largest level) that rounding may move a value by. Symmetric codes end
# one level short on one side, and a scale that minimises the squared error clips the extremes: 1.5 steps were seen at
# 4 bits (blocks.py), 0.53 at 8 (coremltools). A method that moves values further to make up for others' errors
# (GPTQ) needs a limit of its own.
# A table of 16 values for 16 rows moves random weights as far as rounding to nearest in groups of 32 does (9.8 %
# against 9.6 %), so that rounding is the yardstick of tables too.
PALETTE_REFERENCE = 32
STEP_LIMITS: dict[Bits, float] = {4: 2.0, 8: 1.5}
STAGE_OF: tuple[tuple[str, Stage], ...] = (
    ("vision_tower.", "visual_tokens"),
    ("projector.", "visual_tokens"),
    ("language_model.embed_tokens.", "embeddings"),
    ("", "first_logits"),
)


def check_stored(
    weights: Mapping[str, torch.Tensor], dequantized: Mapping[str, torch.Tensor], plan: StoragePlan
) -> None:
    """Hold every value that the files hold against the checkpoint's; one weight at a time is in memory.

    Raises:
        VerificationError: a value is further from the checkpoint's than its rounding explains: it was packed wrongly.
    """
    buffers: dict[torch.Size, torch.Tensor] = {}  # filled again, as LazyWeights says
    for name in dequantized:
        coded = plan.chosen is not None and name in plan.chosen
        original = plan.chosen[name] if plan.chosen is not None and coded else weights[name]
        if isinstance(dequantized, LazyWeights):
            if original.shape not in buffers:
                buffers[original.shape] = torch.empty(original.shape)
            found = buffers[original.shape]
            dequantized.read_into(name, found)
        else:
            found = dequantized[name]
        _check(name, found, original, plan, coded)


def rounded(weight: torch.Tensor, storage: Storage) -> torch.Tensor:
    """Plain symmetric rounding to nearest: the reference that knows no target."""
    if storage.bits == 32:
        return weight
    if storage.bits == 16:
        return weight.half().to(weight.dtype)
    if storage.palette_rows is not None:
        storage = Storage(storage.bits, PALETTE_REFERENCE)
    rows = _rows(weight)
    groups = _groups(rows, storage)
    steps = _steps(groups, storage.bits)
    levels = torch.round(groups / steps.clamp_min(torch.finfo(weight.dtype).tiny))
    return (levels * steps).reshape(rows.shape[0], -1)[:, : rows.shape[1]].reshape(weight.shape)


class RoundedWeights(LazyWeights):
    """State-dict name -> the checkpoint's weight, ``rounded``; where codes were chosen, what they stand for."""

    def __init__(self, weights: Mapping[str, torch.Tensor], plan: StoragePlan) -> None:
        self._weights, self._plan = weights, plan

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._plan.chosen is not None and name in self._plan.chosen:
            return self._plan.chosen[name]
        weight = self._weights[name].float()
        return rounded(weight, self._plan.storage(name, tuple(weight.shape)))

    def read_into(self, name: str, out: torch.Tensor) -> None:
        if self._plan.chosen is not None and name in self._plan.chosen:
            out.copy_(self._plan.chosen[name])
            return
        read_weight(self._weights, name, out)
        storage = self._plan.storage(name, tuple(out.shape))
        if storage.bits < 32:
            for rows in _pieces(out):
                rows.copy_(rounded(rows, storage))

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _check(name: str, found: torch.Tensor, original: torch.Tensor, plan: StoragePlan, coded: bool) -> None:
    if found.shape != original.shape:
        raise _wrong(name, plan, f"has shape {list(found.shape)}, not {list(original.shape)}")
    storage = plan.storage(name, tuple(original.shape))
    if storage.palette_rows is not None:
        _check_palette(name, found, original, plan, storage)
        return
    groups_beyond, start, place = 0, 0, ""
    for mine, stored in zip(_pieces(found), _pieces(original), strict=True):
        theirs = stored.float()
        distance = _groups((mine - theirs).abs(), storage)  # [rows, groups, width]
        if storage.bits in STEP_LIMITS and not coded:
            allowed = STEP_LIMITS[storage.bits] * _steps(_groups(theirs, storage), storage.bits)
        else:
            allowed = _groups(theirs.abs(), storage) * FLOAT16_STEP + SMALLEST_FLOAT16
        beyond = ~(distance <= allowed)  # a value that is no number is beyond as well
        if bool(beyond.any()):
            groups_beyond += int(beyond.any(-1).sum())
            place = place or _place(beyond, distance, allowed, storage, start)
        start += len(mine)
    if groups_beyond:
        norm = original.float().norm().clamp_min(torch.finfo(torch.float32).tiny)
        relative = float((found - original).norm() / norm)
        raise _wrong(name, plan, f"is off by up to {place} ({groups_beyond} groups so; {relative:.2e} as a whole)")


def _check_palette(name: str, found: torch.Tensor, original: torch.Tensor, plan: StoragePlan, storage: Storage) -> None:
    """Rows that share a table hold few different values, and each weight the nearest of them."""
    assert storage.palette_rows is not None
    pairs = zip(found.split(storage.palette_rows), original.split(storage.palette_rows), strict=True)
    for group, (mine, theirs) in enumerate(pairs):
        values, wanted = mine.numpy(), theirs.float().numpy()
        entries = entries_of(values)
        allowed = to_nearest(wanted, entries) + np.abs(wanted) * FLOAT16_STEP + SMALLEST_FLOAT16
        distance = np.abs(values - wanted)
        rows = f"rows {group * storage.palette_rows} to {group * storage.palette_rows + len(values) - 1}"
        if len(entries) > 1 << storage.bits:
            raise _wrong(name, plan, f"has {len(entries)} different values in {rows}, a table {1 << storage.bits}")
        if not bool((distance <= allowed).all()):
            at = np.unravel_index(int(np.argmax(distance - allowed)), distance.shape)
            raise _wrong(
                name, plan, f"is off by up to {distance[at]:.2e} in {rows}, their table explains {allowed[at]:.2e}"
            )


def _place(beyond: torch.Tensor, distance: torch.Tensor, allowed: torch.Tensor, storage: Storage, start: int) -> str:
    """Where the first value beyond its limit lies; ``start`` is the number of rows before these."""
    row, group, _ = (int(at) for at in beyond.nonzero()[0])
    where = f"row {start + row}"
    if storage.group_size is not None:
        where += f", group {group} of {storage.group_size} values"
    off, limit = float(distance[row, group].max()), float(allowed[row, group].max())
    return f"{off:.2e} in {where}, rounding explains {limit:.2e}"


def _wrong(name: str, plan: StoragePlan, what: str) -> VerificationError:
    stage = next(stage for prefix, stage in STAGE_OF if name.startswith(prefix))
    return VerificationError(
        f"stage '{stage}', kind quantization: the {plan.target} files do not hold the checkpoint's weights at "
        f"{plan.precision}: '{name}' {what}"
    )


def _rows(values: torch.Tensor) -> torch.Tensor:
    """[rows, width]; vectors are one row."""
    return values.reshape(values.shape[0], -1) if values.dim() > 1 else values.reshape(1, -1)


def _pieces(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``_rows`` in pieces of some CHUNK_VALUES."""
    rows = _rows(values)
    return rows.split(max(1, CHUNK_VALUES // rows.shape[1]))


def _groups(rows: torch.Tensor, storage: Storage) -> torch.Tensor:
    """[rows, width] -> [rows, groups, group]; the last group of a row that the size does not divide ends in zeros."""
    size = storage.group_size or rows.shape[1]
    return nn.functional.pad(rows, (0, -rows.shape[1] % size)).reshape(rows.shape[0], -1, size)


def _steps(groups: torch.Tensor, bits: Bits) -> torch.Tensor:
    """The step of each group [rows, groups, 1] when its largest magnitude takes the largest level."""
    return groups.abs().amax(-1, keepdim=True) / ((1 << (bits - 1)) - 1)
