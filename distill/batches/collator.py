"""Encoded conversations -> a right-padded batch: images in reading order, and what a teacher said, if recorded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from distill.batches.dataset import Example
from distill.batches.encoding import IGNORED
from distill.batches.image_store import BadImageError, ImageStore, OtherRowsImages
from distill.data.conversation import Row
from distill.data.image_source import ImageSource

BAD_ROWS = "bad_rows"  # in a batch: numbers of rows whose image could not be read; whoever trains takes it out


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
        ``recorded`` holds the flat tensors of ``distill.teacher.recorded_view``, of the rows that are in the batch.

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
