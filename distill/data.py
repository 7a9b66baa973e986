"""Rows + processing -> training tensors: v1 or plain ids with labels on the answers alone, images by position."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from bundle.prompt import build_prompt, encode_pieces
from bundle.tokenizer import Tokenizer
from distill.batch_order import LengthGroupedOrder as LengthGroupedOrder
from distill.chat_rows import encode_chat
from distill.conversation import Row, Turn
from distill.image_source import ImageSource
from distill.image_store import BadImageError, OtherRowsImages
from distill.image_store import ImageStore as ImageStore
from distill.models.processing import Processing
from distill.rows import Rows

IGNORED = -100  # label of a position that no loss looks at
BAD_ROWS = "bad_rows"  # in a batch: numbers of rows whose image could not be read; whoever trains takes it out
NEXT_QUESTION = {"v1": "USER: ", "plain": ""}  # how every turn after the first begins, as in vicuna_v1
ANSWER_END = {"v1": "", "plain": "\n"}  # plain captions end with a line feed, v1 answers with EOS


class Example(TypedDict):
    """One encoded conversation."""

    input_ids: list[int]
    labels: list[int]
    row: Row


def encode_row(row: Row, processing: Processing, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A conversation -> ids with one image id, and labels of the same length: the answers, IGNORED elsewhere.

    The first question is encoded by the function that encodes questions at inference, so both see the same ids.
    """
    if processing.turns is not None:
        return encode_chat(row, processing, processing.turns, tokenizer)
    template, spec = processing.prompt.template, processing.tokenizer
    ids: list[int] = []
    labels: list[int] = []
    for turn in row.turns:
        asked = _first_question(turn, processing, tokenizer) if not ids else _next_question(turn, processing, tokenizer)
        answer = tokenizer.encode(turn.answer + ANSWER_END[template])
        answer += [spec.eos_ids[0]] if template == "v1" else []
        ids += asked + answer
        labels += [IGNORED] * len(asked) + answer
    return ids, labels


def _first_question(turn: Turn, processing: Processing, tokenizer: Tokenizer) -> list[int]:
    question = turn.question if processing.prompt.template == "v1" else ""  # stage 1 captions an image unasked
    return list(build_prompt(processing.prompt, tokenizer, processing.tokenizer, question, turn.has_image).token_ids)


def _next_question(turn: Turn, processing: Processing, tokenizer: Tokenizer) -> list[int]:
    prompt = processing.prompt
    image = prompt.image_marker + prompt.after_image if turn.has_image else ""
    text = f"{NEXT_QUESTION[prompt.template]}{image}{turn.question}{prompt.suffix}"
    return encode_pieces(text, tokenizer, processing.tokenizer.image_token_id, prompt.image_marker)


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


def room_for_ids(row: Row, context_length: int, visual_tokens: int) -> int:
    """How many ids of a row fit: its one image id becomes ``visual_tokens`` positions."""
    return context_length - (visual_tokens - 1 if row.image else 0)


class Recording(Protocol):
    """What a teacher said to the conversations of a data set."""

    @property
    def has_features(self) -> bool:
        """Whether it holds the vision tower's features as well."""
        ...

    def batch(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Flat tensors of a batch; of none, those of a batch without any predicting row."""
        ...

    def features(self, image: ImageSource) -> torch.Tensor | None:
        """[P, D_v] of an image, None where it holds none."""
        ...

    def blank_features(self) -> torch.Tensor:
        """[P, D_v] of an image of nothing."""
        ...


@dataclass
class Collator:
    """Examples -> a right-padded batch; images in reading order, as tower features where these are known already.

    A row whose image cannot be read either ends the run, or leaves its batch: no loss term sees anything of it, every
    process still makes the same number of steps, and a resumed run, which reads the same files, leaves out the same
    rows. Where no row is left, the first one stays without its image and without a label.

    Attributes:
        features: image -> tower features [P, D_v]; when not None, an image that it lacks could not be read.
        report_bad: put the numbers of the rows left out into the batch as ``bad_rows`` [k], instead of raising.
        teacher_images: the same pictures as the teacher wants them, where it wants them differently.
        recording: what the teacher said to each conversation, and the features too where these were recorded.
    """

    pad_id: int
    images: ImageStore
    features: dict[ImageSource, torch.Tensor] | None = None
    report_bad: bool = False
    teacher_images: ImageStore | OtherRowsImages | None = None
    recording: Recording | None = None

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """input_ids, attention_mask, labels [B, T], and pixel_values [n, 3, S, S] or image_features [n, P, D_v].

        A batch of text alone brings one blank image, so that every batch uses every trained parameter. With a recording
        ``recorded`` holds the flat tensors of ``distill.recorded_view``, of the rows that are in the batch.

        Raises:
            BadImageError: an image cannot be read, unless ``report_bad``.
        """
        good: list[Example] = []
        bad: list[Example] = []
        images: list[torch.Tensor] = []
        for example in examples:
            try:
                images += self._images_of(example["row"])
                good.append(example)
            except BadImageError:
                if not self.report_bad:
                    raise
                bad.append(example)
        batch: dict[str, Any] = self._padded(good or [_nothing_of(bad[0])])
        if images or self.features is None or self.features:
            name = "image_features" if self._recorded_features or self.features is not None else "pixel_values"
            batch[name] = torch.stack(images or [self._blank()])  # [n, 3, S, S] or [n, P, D_v]
        if self.recording is not None:
            batch["recorded"] = self.recording.batch(good)
        if self.teacher_images is not None and images:
            seen = [example["row"] for example in good if example["row"].image is not None]
            batch["teacher_pixel_values"] = torch.stack([self.teacher_images.pixels(row) for row in seen])
        if bad:
            batch[BAD_ROWS] = torch.tensor([example["row"].number for example in bad])  # [k]
        return batch

    def _images_of(self, row: Row) -> list[torch.Tensor]:
        if row.image is None:
            return []
        if self._recorded_features is not None:
            known = self._recorded_features.features(row.image)
            if known is None:
                self.images.decode(row)  # says what is wrong with it
                raise BadImageError(f"row {row.number}: image {row.image} changed since the run began")
            return [known]  # [P, D_v]
        if self.features is None:
            return [self.images.pixels(row)]  # [3, S, S]
        if row.image not in self.features:
            raise BadImageError(f"row {row.number}: image {row.image} could not be read when the run began")
        return [self.features[row.image]]  # [P, D_v]

    @property
    def _recorded_features(self) -> Recording | None:
        return self.recording if self.recording is not None and self.recording.has_features else None

    def _blank(self) -> torch.Tensor:
        """An image of nothing: [3, S, S], or [P, D_v] where features are known."""
        if self._recorded_features is not None:
            return self._recorded_features.blank_features()
        return self.images.blank() if self.features is None else torch.zeros_like(next(iter(self.features.values())))

    def _padded(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        shape = (len(examples), length)
        input_ids = torch.full(shape, self.pad_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for i, example in enumerate(examples):
            n = len(example["input_ids"])
            input_ids[i, :n] = torch.tensor(example["input_ids"])
            attention_mask[i, :n] = 1
            labels[i, :n] = torch.tensor(example["labels"])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _nothing_of(example: Example) -> Example:
    """The first id of a row, without its image and without a label: a batch on which every loss term is 0."""
    return {"input_ids": example["input_ids"][:1], "labels": [IGNORED], "row": replace(example["row"], image=None)}
