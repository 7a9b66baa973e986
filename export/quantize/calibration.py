"""A data set of conversations -> some of them as the model is fed them, and where it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bundle.errors import UsageError
from bundle.tokenizer import open_tokenizer
from distill.batches.dataset import LlavaDataset
from distill.batches.encoding import IGNORED
from distill.batches.image_store import ImageStore
from distill.data.rows import open_rows
from distill.models.mobilevlm_config import MobileVlmConfig
from distill.models.processing import Processing


@dataclass(frozen=True)
class CalibrationData:
    """Which conversations to look at.

    Attributes:
        data: as --data of alignkd-distill takes it.
        images: folder of the images; None: where the data lies.
        rows: how many, taken evenly from the whole set.
    """

    data: Path
    images: Path | None = None
    rows: int = 64


@dataclass(frozen=True)
class Conversation:
    """One conversation before the model has seen it.

    Attributes:
        ids: T ids, the image id once if there is an image.
        pixels: [1, 3, S, S] or None.
        answered: rows, visual tokens counted, whose logits predict a token of an answer.
    """

    ids: tuple[int, ...]
    pixels: torch.Tensor | None
    answered: torch.Tensor


@dataclass(frozen=True)
class Calibration:
    """The conversations that were read."""

    sha256: str  # of the data set
    conversations: Sequence[Conversation]


def read_calibration(
    wanted: CalibrationData, processing: Processing, config: MobileVlmConfig, context_length: int
) -> Calibration:
    """Read conversations and their images; those without an answer that fits are left out.

    Raises:
        UsageError: no such data, an unusable row, or none at all.
    """
    if wanted.rows < 1:
        raise UsageError(f"--calibration-rows {wanted.rows} leaves nothing to calibrate on; give at least 1")
    rows = open_rows(wanted.data, wanted.images)
    rows.check(missing_images=False)
    tokenizer = open_tokenizer(processing.tokenizer, processing.tokenizer_path.parent)
    visual = config.visual_tokens
    encoded = LlavaDataset(rows, processing, tokenizer, context_length, visual)
    images = ImageStore(processing.image, budget_bytes=0)
    found: list[Conversation] = []
    for number in _evenly(len(encoded), wanted.rows):
        example = encoded[number]
        ids, row = tuple(example["input_ids"]), example["row"]
        answered = _answered(ids, example["labels"], config.image_token_id, visual)
        if len(answered):
            pixels = None if row.image is None else images.pixels(row)[None]  # [1, 3, S, S]
            found.append(Conversation(ids, pixels, answered))
    if not found:
        raise UsageError(
            f"calibration data {wanted.data} holds no conversation with an answer; give training rows of the kind the "
            "model will see, or leave out --calibration and use --quant-method rtn or hqq"
        )
    return Calibration(rows.sha256, found)


def _evenly(of: int, count: int) -> list[int]:
    """At most ``count`` of the first ``of`` numbers, evenly apart."""
    return [int(number) for number in np.unique(np.linspace(0, of - 1, min(count, of)).astype(int))] if of else []


def _answered(ids: Sequence[int], labels: Sequence[int], image_id: int, visual_tokens: int) -> torch.Tensor:
    """Positions that predict the labelled ones, after the image id became ``visual_tokens`` rows."""
    place = ids.index(image_id) if image_id in ids else len(ids)
    return torch.tensor(
        [
            at - 1 + (visual_tokens - 1 if at > place else 0)
            for at, label in enumerate(labels)
            if label != IGNORED and at > 0
        ],
        dtype=torch.long,
    )
