"""Tokenizer file of a bundle -> text <-> ids, sentencepiece behind a small type."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from bundle.errors import UsageError
from bundle.manifest import TokenizerSpec
from bundle.staging import inside


class Tokenizer(Protocol):
    """What prompts and answers need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; the model may have more rows, never fewer."""

    def encode(self, text: str) -> list[int]:
        """Text -> ids without BOS or EOS; names of special tokens in the text stay text."""

    def decode(self, ids: list[int]) -> str:
        """Ids -> text; BOS, EOS and padding leave nothing."""


class SentencePiece:
    """A tokenizer.model, encoded the way LLaVA's legacy tokenizer does: each piece of text on its own."""

    def __init__(self, path: Path, special_ids: frozenset[int] = frozenset()) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"tokenizer {path} cannot be read as a sentencepiece model ({error}); copy it from the checkpoint again"
            ) from error
        self._special_ids = special_ids

    @property
    def vocab_size(self) -> int:
        return int(self._model.vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self._model.EncodeAsIds(text))

    def decode(self, ids: list[int]) -> str:
        unknown = [i for i in ids if not 0 <= i < self.vocab_size]
        if unknown:
            raise UsageError(f"token id {unknown[0]} is not in the tokenizer's range 0..{self.vocab_size - 1}")
        return str(self._model.DecodeIds([i for i in ids if i not in self._special_ids]))


def open_tokenizer(spec: TokenizerSpec, folder: Path) -> Tokenizer:
    """Open the tokenizer that ``spec`` names under ``folder``.

    Raises:
        UsageError: the file is missing or damaged, or its size contradicts the ids of ``spec``.
    """
    path = inside(folder, spec.path, "tokenizer path")
    if not path.is_file():
        raise UsageError(f"tokenizer {path} is missing; copy tokenizer.model from the checkpoint")
    tokenizer = SentencePiece(path, frozenset({spec.bos_id, spec.pad_id, *spec.eos_ids}))
    beyond = [i for i in (spec.bos_id, *spec.eos_ids) if not 0 <= i < tokenizer.vocab_size]
    if beyond:
        raise UsageError(
            f"{path} has {tokenizer.vocab_size} tokens, but the model's special id {beyond[0]} is outside them"
        )
    return tokenizer
