"""Rows of a data set -> encoded conversations, one at a time and when they are asked for; images stay on disk."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from bundle.tokenizer import Tokenizer
from distill.batches.encoding import encode_row, room_for_ids
from distill.data.conversation import Row
from distill.data.rows import Rows
from distill.models.processing import Processing


class Example(TypedDict):
    """One encoded conversation."""

    input_ids: list[int]
    labels: list[int]
    row: Row


class LlavaDataset(Dataset[Example]):
    """Rows encoded when they are asked for; the last ones are kept, images stay on disk.

    Args:
        context_length: positions a model has; longer conversations are cut at the end.
        visual_tokens: positions that one image takes.
        kept: encoded rows that stay in memory, a few kilobytes each.
    """

    KEPT = 1 << 14

    def __init__(
        self,
        rows: Rows,
        processing: Processing,
        tokenizer: Tokenizer,
        context_length: int,
        visual_tokens: int,
        kept: int = KEPT,
    ) -> None:
        self.rows = rows
        self._processing, self._tokenizer = processing, tokenizer
        self._context, self._visual_tokens, self._kept = context_length, visual_tokens, kept
        self._encoded: OrderedDict[int, tuple[NDArray[np.int32], NDArray[np.int32], Row]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        if index in self._encoded:
            self._encoded.move_to_end(index)
        else:
            self._encoded[index] = self._encode(self.rows[index])
            if len(self._encoded) > self._kept:
                self._encoded.popitem(last=False)
        ids, labels, row = self._encoded[index]
        return {"input_ids": ids.tolist(), "labels": labels.tolist(), "row": row}

    def _encode(self, row: Row) -> tuple[NDArray[np.int32], NDArray[np.int32], Row]:
        room = room_for_ids(row, self._context, self._visual_tokens)
        encoded = encode_row(row, self._processing, self._tokenizer)
        ids, labels = (np.array(numbers[:room], np.int32) for numbers in encoded)
        if row.image is not None and self._processing.tokenizer.image_token_id not in ids:
            row = replace(row, image=None)  # cut off with a late question; an image without a place has no meaning
        return ids, labels, row

    def text_lengths(self) -> NDArray[np.int64]:
        """Characters of each conversation plus its visual tokens: enough to put rows of like length together."""
        return self.rows.characters + self._visual_tokens * self.rows.with_image.astype(np.int64)
