"""Tokenizer file of a bundle -> text <-> ids: sentencepiece or tokenizers behind one small type."""

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

    @property
    def special_names(self) -> tuple[str, ...]:
        """Names that ``encode_template`` reads as special tokens; a user's text may not hold them."""

    def encode(self, text: str) -> list[int]:
        """Text -> ids without BOS or EOS; names of special tokens in the text stay text."""

    def encode_template(self, text: str, image_marker: str, image_token_id: int) -> list[int]:
        """Text of a template -> ids without BOS, the image id where a marker stands."""

    def piece(self, token: int) -> str:
        """The text that the vocabulary holds for an id."""

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

    @property
    def special_names(self) -> tuple[str, ...]:
        return ()

    def encode(self, text: str) -> list[int]:
        return list(self._model.EncodeAsIds(text))

    def encode_template(self, text: str, image_marker: str, image_token_id: int) -> list[int]:
        """Each piece between markers is encoded on its own, as LLaVA does."""
        first, *rest = text.split(image_marker)
        ids = self.encode(first)
        for piece in rest:
            ids += [image_token_id, *self.encode(piece)]
        return ids

    def piece(self, token: int) -> str:
        return str(self._model.IdToPiece(token))

    def decode(self, ids: list[int]) -> str:
        _refuse_unknown(ids, self.vocab_size)
        return str(self._model.DecodeIds([i for i in ids if i not in self._special_ids]))


class TokenizerJson:
    """A tokenizer.json, encoded as transformers does: a template's whole text at once, special tokens by name."""

    def __init__(self, path: Path, special_ids: frozenset[int] = frozenset()) -> None:
        from tokenizers import Tokenizer as Library

        try:
            self._model = Library.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower for a damaged file
            raise UsageError(
                f"tokenizer {path} cannot be read as a tokenizer.json ({error}); copy it from the checkpoint again"
            ) from error
        self._model.no_padding()
        self._model.no_truncation()
        self._special_ids = special_ids

    @property
    def vocab_size(self) -> int:
        return int(self._model.get_vocab_size(with_added_tokens=True))

    @property
    def special_names(self) -> tuple[str, ...]:
        return tuple(token.content for token in self._model.get_added_tokens_decoder().values() if token.special)

    @property
    def opening_ids(self) -> list[int]:
        """What its own post-processor puts before a text: BOS, or nothing."""
        return list(self._model.encode("").ids)

    def encode(self, text: str) -> list[int]:
        return self._ids(text, names_stay_text=True)

    def encode_template(self, text: str, image_marker: str, image_token_id: int) -> list[int]:
        """The image marker is a token of its own, which stands once for the whole image."""
        return self._ids(text, names_stay_text=False)

    def piece(self, token: int) -> str:
        return self._model.id_to_token(token) or ""  # a hole in the ids

    def decode(self, ids: list[int]) -> str:
        _refuse_unknown(ids, self.vocab_size)
        return str(self._model.decode([i for i in ids if i not in self._special_ids]))

    def _ids(self, text: str, names_stay_text: bool) -> list[int]:
        self._model.encode_special_tokens = names_stay_text
        return list(self._model.encode(text, add_special_tokens=False).ids)


KINDS: dict[str, type[SentencePiece] | type[TokenizerJson]] = {
    "sentencepiece": SentencePiece,
    "tokenizers": TokenizerJson,
}


def open_tokenizer(spec: TokenizerSpec, folder: Path) -> Tokenizer:
    """Open the tokenizer that ``spec`` names under ``folder``.

    Raises:
        UsageError: the file is missing or damaged, or its size contradicts the ids of ``spec``.
    """
    path = inside(folder, spec.path, "tokenizer path")
    if not path.is_file():
        raise UsageError(f"tokenizer {path} is missing; copy {path.name} from the checkpoint")
    marks = [*spec.eos_ids] if spec.bos_id is None else [spec.bos_id, *spec.eos_ids]
    tokenizer = KINDS[spec.kind](path, frozenset({spec.pad_id, *marks}))
    beyond = [i for i in marks if not 0 <= i < tokenizer.vocab_size]
    if beyond:
        raise UsageError(
            f"{path} has {tokenizer.vocab_size} tokens, but the model's special id {beyond[0]} is outside them"
        )
    return tokenizer


def _refuse_unknown(ids: list[int], size: int) -> None:
    unknown = [i for i in ids if not 0 <= i < size]
    if unknown:
        raise UsageError(f"token id {unknown[0]} is not in the tokenizer's range 0..{size - 1}")
