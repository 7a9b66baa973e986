"""Rows + processing -> training tensors: v1 or plain ids with labels on the answers alone, images by position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch.utils.data import Dataset, Sampler

from bundle.errors import UsageError
from bundle.image import open_image, preprocess
from bundle.manifest import ImageSpec
from bundle.prompt import build_prompt, encode_pieces
from bundle.tokenizer import Tokenizer
from distill.models.processing import Processing
from distill.rows import Row, Turn

IGNORED = -100  # label of a position that no loss looks at
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
    """Rows encoded on first use and kept; images stay on disk.

    Args:
        context_length: positions a model has; longer conversations are cut at the end.
        visual_tokens: positions that one image takes.
    """

    def __init__(
        self, rows: list[Row], processing: Processing, tokenizer: Tokenizer, context_length: int, visual_tokens: int
    ) -> None:
        self.rows = rows
        self._processing, self._tokenizer = processing, tokenizer
        self._room = [context_length - (visual_tokens - 1 if row.image else 0) for row in rows]
        self._visual_tokens = visual_tokens
        self._encoded: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        if index not in self._encoded:
            ids, labels = encode_row(self.rows[index], self._processing, self._tokenizer)
            room = self._room[index]
            self._encoded[index] = {"input_ids": ids[:room], "labels": labels[:room], "row": self.rows[index]}
        return self._encoded[index]

    def text_lengths(self) -> list[int]:
        """Characters of each conversation plus its visual tokens: enough to put rows of like length together."""
        return [
            sum(len(turn.question) + len(turn.answer) for turn in row.turns) + (self._visual_tokens if row.image else 0)
            for row in self.rows
        ]


class ImageStore:
    """Image paths -> pixel_values, decoded images kept in memory while they fit the budget."""

    def __init__(self, spec: ImageSpec, budget_bytes: int) -> None:
        self._spec = spec
        self._left_bytes = budget_bytes
        self._kept: dict[Path, torch.Tensor] = {}

    def pixels(self, row: Row) -> torch.Tensor:
        """The row's image as [3, S, S] float32.

        Raises:
            UsageError: the image is missing or corrupt; the line names the row.
        """
        assert row.image is not None
        if row.image in self._kept:
            return self._kept[row.image]
        pixels = self.decode(row)
        if pixels.nbytes <= self._left_bytes:
            self._left_bytes -= pixels.nbytes
            self._kept[row.image] = pixels
        return pixels

    def blank(self) -> torch.Tensor:
        """A picture of nothing [3, S, S], for a batch without one: see ``AlignKD.forward``."""
        return torch.zeros(3, self._spec.size, self._spec.size)

    def decode(self, row: Row) -> torch.Tensor:
        """As ``pixels``, without keeping the image."""
        assert row.image is not None
        try:
            return torch.from_numpy(preprocess(open_image(row.image), self._spec))[0]  # [3, S, S]
        except UsageError as error:
            raise UsageError(f"row {row.number}: {error}") from error


@dataclass
class Collator:
    """Examples -> a right-padded batch; images in reading order, as tower features where these are known already.

    Attributes:
        features: image path -> tower features [P, D_v]; when not None it holds every image of the data set.
    """

    pad_id: int
    images: ImageStore
    features: dict[Path, torch.Tensor] | None = None
    teacher_views: Any = None

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """input_ids, attention_mask, labels [B, T], and pixel_values [n, 3, S, S] or image_features [n, P, D_v].

        A batch of text alone brings one blank image, so that every batch uses every trained parameter.
        """
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
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        rows = [example["row"] for example in examples if example["row"].image is not None]
        if self.features is not None:
            known = [self.features[row.image] for row in rows if row.image]
            if known or self.features:
                batch["image_features"] = torch.stack(known or [torch.zeros_like(next(iter(self.features.values())))])
        else:
            batch["pixel_values"] = torch.stack([self.images.pixels(row) for row in rows] or [self.images.blank()])
        if self.teacher_views is not None:
            batch["teacher_view"] = self.teacher_views(examples)
        return batch


class LengthGroupedOrder(Sampler[int]):
    """A new order each epoch, fixed by (seed, epoch) so that a resumed run sees what a straight one sees.

    Rows are shuffled, sorted by length within groups of 32 batches, and the batches shuffled again: little padding, and
    neighbours still vary.
    """

    BATCHES_PER_GROUP = 32

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = torch.tensor(lengths), batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        shuffled = torch.randperm(len(self._lengths), generator=draw)
        groups = shuffled.split(self._batch_size * self.BATCHES_PER_GROUP)
        batches = [
            b for group in groups for b in group[self._lengths[group].argsort(stable=True)].split(self._batch_size)
        ]
        full = [batch for batch in batches if len(batch) == self._batch_size]
        partial = [batch for batch in batches if len(batch) < self._batch_size]  # last, or it would shift the others
        for i in torch.randperm(len(full), generator=draw).tolist():
            yield from full[i].tolist()
        for batch in partial:
            yield from batch.tolist()
