"""Entries of a teacher cache + the conversations of a batch -> what the teacher said, ready for ``AlignKD.forward``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bundle.errors import UsageError
from distill.batches.dataset import Example
from distill.data.image_source import ImageSource
from distill.teacher.view import TeacherShape
from distill.teacher_cache.identity import TeacherFacts, entry_key, sample_digest
from distill.teacher_cache.image_digests import ImageDigests
from distill.teacher_cache.parts import OF_SAMPLES
from distill.teacher_cache.shards import Entry, ShardReader

SHARDS, DIGESTS = "shards", "images.sqlite"


@dataclass(frozen=True)
class Contents:
    """A conversation by what it holds."""

    sample: bytes
    image: bytes | None

    def of(self, part: str) -> bytes | None:
        """What entries of a part are found by; None: there are none for a conversation without an image."""
        if part == "rows":
            return self.sample
        if self.image is None:
            return None
        return self.sample if part in OF_SAMPLES else self.image


def contents_of(example: Example, digests: ImageDigests) -> Contents:
    """Hash a conversation and its image."""
    image = example["row"].image
    digest = None if image is None else digests.digest(image)
    return Contents(sample_digest(example["input_ids"], example["labels"], digest), digest)


class TeacherCache:
    """The parts of a cache that one run reads; goes along to the processes that prepare batches.

    Args:
        reader: of the cache's shards.
        digests: of images.
        teacher: whose recording it is.
        parts: part -> identity hash of its entries.
        blank_features: [P, D_v], sizes of a picture's features.
    """

    def __init__(
        self,
        reader: ShardReader,
        digests: ImageDigests,
        teacher: TeacherFacts,
        parts: Mapping[str, str],
        blank_features: tuple[int, int],
    ) -> None:
        self._reader, self._digests, self._blank = reader, digests, blank_features
        self.teacher, self.parts = teacher, dict(parts)

    @property
    def shape(self) -> TeacherShape:
        """What adapters are made for."""
        return TeacherShape(self.teacher.heads, self.teacher.width)

    @property
    def has_features(self) -> bool:
        """Whether batches bring the tower's features along."""
        return "features" in self.parts

    def batch(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """What ``distill.teacher.recorded_view`` reads, for conversations in the order of the batch.

        Raises:
            UsageError: an entry is missing.
        """
        found: dict[str, list[Entry]] = {part: [] for part in self.parts if part != "features"}
        for example in examples:
            contents = contents_of(example, self._digests)
            for part, entries in found.items():
                content = contents.of(part)
                if content is not None:
                    entries.append(self._entry(part, content, example))
        tensors: dict[str, torch.Tensor] = {}
        for part, entries in found.items():
            if entries:
                tensors |= joined(part, entries, self.teacher.visual_tokens)
            elif part == "rows":
                tensors |= no_rows()
        return tensors

    def features(self, image: ImageSource) -> torch.Tensor | None:
        """The tower's features of an image [P, D_v]; None where there are none: it changed, or cannot be read."""
        try:
            content = self._digests.digest(image)
        except UsageError:
            return None
        number = self._reader.find(entry_key(self.parts["features"], content))
        return None if number is None else self._reader.read("features", number)["values"]

    def blank_features(self) -> torch.Tensor:
        """Features of an image of nothing [P, D_v]."""
        return torch.zeros(self._blank)

    def _entry(self, part: str, content: bytes, example: Example) -> Entry:
        number = self._reader.find(entry_key(self.parts[part], content))
        if number is None:
            raise UsageError(
                f"row {example['row'].number}: the teacher cache holds no {part} for it; its text or image changed "
                "since the run began: record again with alignkd-distill cache, then train with --resume"
            )
        return self._reader.read(part, number)


def joined(part: str, entries: list[Entry], visual_tokens: int) -> dict[str, torch.Tensor]:
    """Entries of a batch -> flat tensors under the names of ``recorded_view``."""
    if part == "rows":
        return {f"row_{name}": torch.cat([_readable(entry[name]) for entry in entries]) for name in entries[0]}
    if part == "attention":
        return {part: _padded([_block(entry, visual_tokens) for entry in entries])}  # [n, H, R, N]
    if part == "groups":
        return {part: _padded([entry["block"] for entry in entries])}  # [n, G, R, N]
    return {part: torch.stack([_readable(entry["values"]) for entry in entries])}  # [n, k] or [n, N, D_T]


def no_rows() -> dict[str, torch.Tensor]:
    """The tensors of rows for a batch in which nothing is predicted: every process has every term in every batch."""
    words, row = torch.zeros(0, 1), torch.zeros(0)
    return {"row_ids": words.int(), "row_log_p": words, "row_log_rest": row, "row_log_threshold": row}


def _block(entry: Entry, visual_tokens: int) -> torch.Tensor:
    """A stored block [R, H, N], or drawn columns and their values [R, C] as a block [R, 1, N]."""
    if "block" in entry:
        return entry["block"]
    empty = torch.zeros(len(entry["columns"]), visual_tokens, dtype=entry["values"].dtype)  # [R, N]
    return empty.scatter(-1, entry["columns"].long(), entry["values"])[:, None]


def _padded(blocks: list[torch.Tensor]) -> torch.Tensor:
    """Blocks [R_i, H, N] -> [n, H, R, N], zeros behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True).transpose(1, 2)


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """uint16 is for storage: torch's kernels do not take it."""
    return tensor.to(torch.int32) if tensor.dtype == torch.uint16 else tensor
