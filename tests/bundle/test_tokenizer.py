"""bundle.tokenizer: contract vectors, byte fallback, special ids, damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.errors import UsageError
from bundle.manifest import TokenizerSpec
from bundle.tokenizer import open_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
CONTRACT = json.loads((GOLDEN / "contract/tokens.json").read_text(encoding="utf-8"))
SPEC = TokenizerSpec.model_validate(CONTRACT["tokenizer"])
TOKENIZER = open_tokenizer(SPEC, GOLDEN)


@pytest.mark.parametrize("case", CONTRACT["encode"])
def test_contract_encode(case: dict) -> None:
    assert TOKENIZER.encode(case["text"]) == case["ids"]


@pytest.mark.parametrize("case", CONTRACT["decode"])
def test_contract_decode(case: dict) -> None:
    assert TOKENIZER.decode(case["ids"]) == case["text"]


@settings(max_examples=50, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp", "Cn", "Cf"]), min_size=1, max_size=30)
)
def test_any_text_survives_through_byte_fallback(text: str) -> None:
    if "\u2581" not in text:  # sentencepiece's own mark for a space
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_special_ids_are_never_made_of_text_and_leave_no_text() -> None:
    assert not {0, 1, 2} & set(TOKENIZER.encode("<s> </s> <unk>"))
    yes = TOKENIZER.encode("yes")
    assert TOKENIZER.decode([1, *yes, 2, 0]) == "yes"


def test_an_id_outside_the_vocabulary_is_named() -> None:
    for bad in (-200, TOKENIZER.vocab_size):
        with pytest.raises(UsageError, match=f"token id {bad} is not in the tokenizer's range 0..511"):
            TOKENIZER.decode([bad])


def test_missing_damaged_or_foreign_files_are_one_line(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"path": "tokenizer.model"})
    with pytest.raises(UsageError, match="tokenizer.model is missing"):
        open_tokenizer(spec, tmp_path)
    for content in (b"", b"no tokenizer", (GOLDEN / SPEC.path).read_bytes()[:1000]):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read as a sentencepiece model"):
            open_tokenizer(spec, tmp_path)
    with pytest.raises(UsageError, match="leaves its folder"):
        open_tokenizer(SPEC.model_copy(update={"path": "../tokenizer.model"}), tmp_path)


def test_ids_that_the_tokenizer_lacks_are_refused() -> None:
    with pytest.raises(UsageError, match="has 512 tokens, but the model's special id 32000"):
        open_tokenizer(SPEC.model_copy(update={"eos_ids": (32000,)}), GOLDEN)
