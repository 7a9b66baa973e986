"""A teacher and a batch -> the cache entries of each conversation and image, as they will be stored."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch

from bundle.errors import UsageError
from distill.batches.encoding import IGNORED
from distill.losses.attention import focus_tokens
from distill.models.mobilevlm import MobileVlm, MobileVlmConfig
from distill.models.roles import Roles, look, predicting_rows, spans_of
from distill.teacher.recorded_view import ATTENTION_SCALE
from distill.teacher.sparse_rows import sparse_block, sparse_rows
from distill.teacher.view import LiveRows, TeacherView, Wanted, live_view
from distill.teacher_cache.identity import Identity
from distill.teacher_cache.parts import Asked
from distill.teacher_cache.shards import KEY_BYTES, Entry

MAX_LOGITS = 1 << 22  # logits alive at a time: 16 MiB in float32
DTYPES = {"float16": torch.float16, "float32": torch.float32}


class Recorder:
    """Runs the teacher and stores what it says.

    Args:
        teacher: frozen.
        asked: what the losses compute with.
        identities: part -> how its entries are stored.
        image_token_id: stands for an image in the ids.
    """

    def __init__(
        self, teacher: MobileVlm, asked: Asked, identities: Mapping[str, Identity], image_token_id: int
    ) -> None:
        self._teacher, self._asked, self._image_token_id = teacher, asked, image_token_id
        self._identities = identities

    @torch.no_grad()
    def entries(
        self, batch: Mapping[str, torch.Tensor], parts: Collection[str], seeds: Sequence[int]
    ) -> dict[str, list[Entry]]:
        """Part -> entries in the order of the batch: one a conversation for ``rows``, else one an image.

        Args:
            batch: input_ids, attention_mask, labels [B, T], pixel_values [n, 3, S, S].
            parts: to compute.
            seeds: [B], of what chance decides; by content, so that a second recording is the same one.

        Raises:
            UsageError: a number does not fit the stored precision.
        """
        entries: dict[str, list[Entry]] = {}
        is_image = batch["input_ids"] == self._image_token_id  # [B, T]
        has_image = is_image.any(1)  # [B]
        features = self._teacher.tower_features(batch["pixel_values"]) if has_image.any() else None  # [n, P, D_v]
        visual = None if features is None else self._teacher.projector(features)  # [n, N, D_T]
        if "features" in parts and features is not None:
            entries["features"] = [{"values": self._stored("features", one)} for one in features]
        if "visual" in parts and visual is not None:
            entries["visual"] = [{"values": self._stored("visual", one)} for one in visual]
        if not set(parts) <= {"features", "visual"}:
            wanted = self._wanted(parts)
            ids = batch["input_ids"].where(~is_image, self._teacher.image_token_id)  # [B, T] the teacher's own
            mask = "all" if wanted.groups else wanted.rows or "none"
            seen = look(self._teacher, ids, batch["attention_mask"], batch["labels"], visual, wanted.groups > 0, mask)
            view = live_view(self._teacher, seen, wanted)
            if isinstance(view.rows, LiveRows):
                entries["rows"] = self._rows(view.rows, seen, seeds)
            if visual is not None:
                entries |= self._attention(view, seen, parts, [seeds[i] for i in has_image.nonzero()[:, 0].tolist()])
        return entries

    def _wanted(self, parts: Collection[str]) -> Wanted:
        return Wanted(
            rows=self._asked.mask if "rows" in parts else None,
            temperature=self._asked.temperature,
            attention="attention" in parts or "focus" in parts,
            groups=self._asked.groups if "groups" in parts else 0,
            visual=False,
        )

    def _rows(self, live: LiveRows, seen: Roles, seeds: Sequence[int]) -> list[Entry]:
        words, dtype = int(self._identities["rows"]["words"]), self._dtype("rows")
        vocabulary = self._teacher.config.text_config.vocab_size
        numbers = torch.arange(len(seeds), device=seen.hidden.device)[:, None, None]  # [B, 1, 1]
        owner = predicting_rows(replace(seen, hidden=numbers.expand(*seen.hidden.shape[:2], 1)), self._asked.mask)[0]
        counts = owner[:, 0].bincount(minlength=len(seeds)).tolist()  # rows of each conversation
        uniform = torch.cat([_uniform(seed, count) for seed, count in zip(seeds, counts, strict=True)]).to(owner.device)
        size = max(1, MAX_LOGITS // vocabulary)
        pieces = [
            sparse_rows(part.log_probabilities(), words, dtype, some)
            for part, some in zip(live.split(size), uniform.split(size), strict=True)
        ]
        index = torch.uint16 if vocabulary <= 1 << 16 else torch.int32
        fields = {
            "ids": torch.cat([piece.ids for piece in pieces]).to(index),
            "log_p": torch.cat([piece.log_p for piece in pieces]),
            "log_rest": torch.cat([piece.log_rest for piece in pieces]),
            "log_threshold": torch.cat([piece.log_threshold for piece in pieces]),
        }
        split = {name: tensor.cpu().split(counts) for name, tensor in fields.items()}
        return [{name: parts[i] for name, parts in split.items()} for i in range(len(seeds))]

    def _attention(
        self, view: TeacherView, seen: Roles, parts: Collection[str], seeds: Sequence[int]
    ) -> dict[str, list[Entry]]:
        spans = spans_of(seen.expanded)
        counts = spans.row_mask.sum(1).tolist()  # text rows behind each image
        entries: dict[str, list[Entry]] = {}
        if view.attention is not None and "attention" in parts:
            cut = [block[:, :count] for block, count in zip(view.attention, counts, strict=True)]  # [H, R, N]
            entries["attention"] = [self._block(block, seed) for block, seed in zip(cut, seeds, strict=True)]
        if view.attention is not None and "focus" in parts:
            focus = focus_tokens(view.attention, spans.row_mask, self._asked.top_k)  # [n, k]
            entries["focus"] = [{"values": one.to(torch.uint16).cpu()} for one in focus]
        if view.group_attention is not None:
            blocks = torch.cat(view.group_attention, 1).transpose(1, 2)  # [n, R, G, N]
            entries["groups"] = [
                {"block": self._stored("groups", block[:count] * ATTENTION_SCALE)}
                for block, count in zip(blocks, counts, strict=True)
            ]
        return entries

    def _block(self, block: torch.Tensor, seed: int) -> Entry:
        """One image's [H, R, N]."""
        identity = self._identities["attention"]
        if identity["form"] == "heads":
            return {"block": self._stored("attention", block.transpose(0, 1) * ATTENTION_SCALE)}  # [R, H, N]
        mean = block.mean(0)  # [R, N]
        if identity["form"] == "mean":
            return {"block": self._stored("attention", mean[:, None] * ATTENTION_SCALE)}  # [R, 1, N]
        columns, values = sparse_block(mean, int(identity["columns"]), _uniform(seed + 1, len(mean)).to(mean.device))
        index = torch.uint8 if block.shape[-1] <= 1 << 8 else torch.int32
        return {
            "columns": columns.to(index).cpu(),  # [R, C]
            "values": self._stored("attention", values * ATTENTION_SCALE),  # [R, C]
        }

    def _dtype(self, part: str) -> torch.dtype:
        return DTYPES[self._identities[part]["precision"]]

    def _stored(self, part: str, tensor: torch.Tensor) -> torch.Tensor:
        stored = tensor.to(self._dtype(part)).cpu().contiguous()
        if not stored.isfinite().all():
            raise UsageError(
                f"{part} of the teacher: a number does not fit float16; record it with --precision float32"
            )
        return stored


def entry_bytes(
    part: str,
    identity: Identity,
    teacher: MobileVlmConfig,
    input_ids: Sequence[int],
    labels: Sequence[int],
    image_id: int,
) -> int:
    """What an entry takes on disk, before it is computed; 0 where there is none."""
    if part != "rows" and image_id not in input_ids:
        return 0
    vision, text = teacher, teacher.text_config
    columns, number = vision.visual_tokens, 4 if identity.get("precision") == "float32" else 2
    if part == "rows":
        words = min(int(identity["words"]), text.vocab_size)
        index = 2 if text.vocab_size <= 1 << 16 else 4
        rows = _predicting(identity["mask"], input_ids, labels, image_id, columns)
        return KEY_BYTES + 8 + rows * (words * (index + number) + 8)
    after = len(input_ids) - 1 - list(input_ids).index(image_id) if image_id in input_ids else 0
    drawn = min(int(identity.get("columns", 0)), columns)
    attention = {
        "heads": int(text.num_attention_heads or 0) * columns * number,
        "mean": columns * number,
        "columns": drawn * (number + (1 if columns <= 1 << 8 else 4)),
    }
    sizes = {
        "attention": after * attention[identity.get("form", "mean")],
        "focus": 2 * min(int(identity.get("top_k", 0)), columns),
        "groups": after * int(identity.get("groups", 0)) * columns * number,
        "visual": columns * int(text.hidden_size or 0) * number,
        "features": math.prod(vision.feature_shape) * number,
    }
    return KEY_BYTES + 8 + sizes[part]


def _predicting(mask: str, ids: Sequence[int], labels: Sequence[int], image_id: int, visual_tokens: int) -> int:
    """Rows of ``predicting_rows`` for one conversation, counted from its ids."""
    supervised = sum(label != IGNORED for label in labels[1:])
    at = [position for position, number in enumerate(ids) if number == image_id]
    if mask == "all":
        return len(ids) - 1 + len(at) * (visual_tokens - 1)
    if mask == "answer+vision":
        followed = sum(position + 1 < len(ids) and labels[position + 1] != IGNORED for position in at)
        last = sum(position + 1 == len(ids) for position in at)
        return supervised + len(at) * visual_tokens - followed - last
    return supervised


def _uniform(seed: int, count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))
