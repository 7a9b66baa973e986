"""Student + held-out LLaVA rows -> percent of answers that greedy decoding gets right to the last token, per family."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bundle.errors import UsageError
from bundle.tokenizer import Tokenizer
from distill.batches.collator import Collator
from distill.batches.dataset import Example
from distill.batches.encoding import IGNORED, encode_row
from distill.batches.image_store import ImageStore
from distill.data.rows import Row, read_rows
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing

ALL = "all"  # the family of rows that name none
MEAN = "mean"  # over families


@dataclass(frozen=True)
class Tally:
    """Answers asked and right, per family."""

    asked: dict[str, int]
    right: dict[str, int]

    def percent(self) -> dict[str, float]:
        """Family -> percent right, and their mean where there are several."""
        shares = {family: 100 * self.right[family] / asked for family, asked in sorted(self.asked.items()) if asked}
        return shares | ({MEAN: sum(shares.values()) / len(shares)} if len(shares) > 1 else {})


class HeldOut:
    """Encoded rows that no step trains on.

    Args:
        rows: each with the family that groups it.
        context: positions that the model has.
    """

    def __init__(
        self,
        rows: Sequence[tuple[Row, str]],
        processing: Processing,
        tokenizer: Tokenizer,
        context: int,
        batch_size: int,
    ) -> None:
        self._collator = Collator(processing.tokenizer.pad_id, ImageStore(processing.image, 0))
        encoded = [(encode_row(row, processing, tokenizer), row, family) for row, family in rows]
        kept = [
            (Example(input_ids=ids[:context], labels=labels[:context], row=row), family)
            for (ids, labels), row, family in encoded
        ]
        self.families = sorted({family for _, family in kept})
        ordered = sorted(kept, key=lambda pair: len(pair[0]["input_ids"]))  # little padding
        self._batches = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]

    def __len__(self) -> int:
        return sum(map(len, self._batches))

    @torch.no_grad()
    def tally(self, vlm: MobileVlm, device: torch.device, index: int = 0, count: int = 1) -> Tally:
        """Ask this process's part of the rows; ``count`` processes that each ask theirs ask every row once.

        All of them run the same number of batches, since sharded weights are gathered by all together.
        """
        asked: dict[str, int] = defaultdict(int)
        right: dict[str, int] = defaultdict(int)
        for start in range(0, len(self._batches), count):
            mine = start + index < len(self._batches)
            pairs = self._batches[start + index if mine else start]
            batch = {name: value.to(device) for name, value in self._collator([one for one, _ in pairs]).items()}
            correct, answers = answers_right(vlm, batch)
            for (_, family), good, number in zip(pairs, correct, answers, strict=True):
                asked[family] += number if mine else 0
                right[family] += good if mine else 0
        return Tally({name: asked[name] for name in self.families}, {name: right[name] for name in self.families})


def read_held_out(
    data: Path, limit: int, processing: Processing, tokenizer: Tokenizer, context: int, batch_size: int
) -> HeldOut:
    """Open a held-out file, ``limit`` rows evenly spread over it.

    Raises:
        UsageError: the file or one of its rows is not usable.
    """
    rows = read_rows(data)
    numbers = range(len(rows)) if len(rows) <= limit else [i * len(rows) // limit for i in range(limit)]
    kept = [(rows[number], family_of(rows.raw(number))) for number in numbers]
    return HeldOut(kept, processing, tokenizer, context, batch_size)


def answers_right(vlm: MobileVlm, batch: dict[str, torch.Tensor]) -> tuple[list[int], list[int]]:
    """Per row of the batch, the answers that are right, and all of them.

    The answers are fed in, and every token of one must be the most likely: greedy decoding would then write just it.
    """
    visual = vlm.encode_images(batch["pixel_values"])  # [n, N, D]; of a blank in a batch of text: shards are shared
    has_images = bool((batch["input_ids"] == vlm.image_token_id).any())
    expanded = vlm.expand(batch["input_ids"], batch["attention_mask"], visual if has_images else None, batch["labels"])
    assert expanded.labels is not None
    wanted = expanded.labels[:, 1:]  # [B, L - 1], what position t must say next
    likeliest = vlm.lm_head(vlm.hidden_states(expanded)[:, :-1]).argmax(-1)  # [B, L - 1]
    counts = wanted != IGNORED  # [B, L - 1]
    begins = counts & ~torch.nn.functional.pad(counts, (1, 0))[:, :-1]  # [B, L - 1]
    answer = begins.long().cumsum(1) * counts  # [B, L - 1], 1, 2, ... within answers, 0 outside
    wrong = torch.zeros(len(wanted), wanted.shape[1] + 1, dtype=torch.long, device=wanted.device)
    wrong.scatter_add_(1, answer, ((likeliest != wanted) & counts).long())  # [B, L], faults per answer
    answers = begins.sum(1)  # [B]
    spoilt = (wrong[:, 1:] > 0).sum(1)  # [B]
    return (answers - spoilt).tolist(), answers.tolist()


def family_of(raw: Any) -> str:
    """The field ``family`` of a raw row, or the one family of rows that name none."""
    family = raw.get("family", ALL) if isinstance(raw, dict) else ALL
    if not isinstance(family, str):
        raise UsageError(f"a held-out row names its family {family!r}; it must be text")
    return family
