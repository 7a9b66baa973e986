"""A student, a teacher and the chosen terms -> may they be a pair? One line on what bars it, and what would do instead.

Widths, depths, heads and numbers of visual tokens may differ (bridge.py here, the maps of AlignKD), and
so may towers and preprocessing. What cannot be bridged is another vocabulary: a term that compares words, or attention
of words, needs both models to read the same ids. Extra rows at the end (padding, added tokens) are no other vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from bundle.errors import UsageError
from bundle.prompt import build_prompt
from bundle.tokenizer import Tokenizer, open_tokenizer
from distill.models.mobilevlm import MobileVlm, MobileVlmConfig
from distill.models.processing import Processing
from distill.settings.terms import ATTENTION_TERMS, PUBLISHED_TERMS, VISUAL_TERMS, WORDLESS_TERMS


@dataclass(frozen=True)
class Side:
    """One model of a pair, by what its checkpoint says."""

    path: Path
    config: MobileVlmConfig
    processing: Processing

    @classmethod
    def of(cls, path: Path, vlm: MobileVlm, processing: Processing) -> Side:
        return cls(path, vlm.config, processing)

    @property
    def rows(self) -> int:
        """Rows of the output matrix."""
        return int(self.config.text_config.vocab_size)

    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.processing.tokenizer, self.processing.tokenizer_path.parent)

    def sight(self) -> str:
        """How it sees, for messages."""
        image = self.processing.image
        return f"{image.size} px {image.strategy}, {self.config.visual_tokens} visual tokens"


def check_pair(student: Side, teacher: Side, terms: Collection[str], mask: str) -> list[str]:
    """Refuse a pair that the terms cannot compare.

    Returns:
        What the user should know of a pair that is allowed, one line each.

    Raises:
        UsageError: the first thing that bars it.
    """
    wordy = [name for name in terms if name not in (*WORDLESS_TERMS, "cross_entropy")]
    if wordy:
        _need_one_vocabulary(student, teacher, wordy)
    differs = student.config.visual_tokens != teacher.config.visual_tokens
    if differs and mask != "answer" and wordy:
        raise UsageError(
            f"--mask {mask} compares positions inside the image, but student {student.path} and teacher {teacher.path} "
            f"have {student.config.visual_tokens} and {teacher.config.visual_tokens} visual tokens: use --mask answer"
        )
    published = [name for name in terms if name in PUBLISHED_TERMS]
    if published and (differs or student.rows != teacher.rows):
        raise UsageError(
            f"{', '.join(published)} as published compare models of one shape; student {student.path} has "
            f"{student.config.visual_tokens} visual tokens and {student.rows} words, teacher {teacher.path} "
            f"{teacher.config.visual_tokens} and {teacher.rows}: use --losses paper"
        )
    return _notes(student, teacher, terms, bool(wordy))


def _need_one_vocabulary(student: Side, teacher: Side, wordy: list[str]) -> None:
    ours, theirs = student.tokenizer(), teacher.tokenizer()
    if not _same_words(ours, theirs):
        raise UsageError(
            f"student {student.path} and teacher {teacher.path} have different vocabularies ({ours.vocab_size} and "
            f"{theirs.vocab_size} tokens, different {student.processing.tokenizer_path.name}); {', '.join(wordy)} need "
            f"one: choose another pair, keep only terms of {', '.join(WORDLESS_TERMS)} (weight 0 for the others), or "
            "train without a teacher: --losses ce"
        )
    beyond = [i for i in _marks(student, ours) if i >= teacher.rows]
    if beyond:
        raise UsageError(
            f"the prompt of student {student.path} holds the token '{ours.piece(beyond[0])}' (id {beyond[0]}), which "
            f"teacher {teacher.path} does not have ({teacher.rows} words): choose a pair with one vocabulary"
        )


def _same_words(ours: Tokenizer, theirs: Tokenizer) -> bool:
    """Equal words as far as both go; what only one has are tokens that were added to it, not words of a text."""
    common = min(ours.vocab_size, theirs.vocab_size)
    if any(ours.piece(i) != theirs.piece(i) for i in range(common)):
        return False
    longer = ours if ours.vocab_size > common else theirs
    return all(longer.piece(i) in longer.special_names for i in range(common, longer.vocab_size))


def _marks(student: Side, tokenizer: Tokenizer) -> list[int]:
    """The ids that every conversation of the student holds, its image's aside."""
    processing = student.processing
    spec = processing.tokenizer
    prompt = build_prompt(processing.prompt, tokenizer, spec, "", has_image=True)
    return [i for i in (*prompt.token_ids, *spec.eos_ids) if i != spec.image_token_id]


def _notes(student: Side, teacher: Side, terms: Collection[str], wordy: bool) -> list[str]:
    notes = []
    ours, theirs = student.processing, teacher.processing
    if ours.image != theirs.image or student.config.visual_tokens != teacher.config.visual_tokens:
        notes.append(f"student sees {student.sight()}; teacher {teacher.sight()}")
    if ours.image.strategy != theirs.image.strategy and any(name in ATTENTION_TERMS + VISUAL_TERMS for name in terms):
        notes.append(
            f"pictures that are no squares show student ({ours.image.strategy}) and teacher ({theirs.image.strategy}) "
            "different parts in one place; terms that compare places are blurred by that"
        )
    if wordy and ours.prompt != theirs.prompt:
        notes.append(f"teacher {teacher.path} reads the student's prompt template, not its own")
    return notes
