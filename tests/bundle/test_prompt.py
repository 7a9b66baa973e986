"""bundle.prompt: the published template letter for letter, ids around the image, splicing, answer clean-up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from bundle.errors import UsageError
from bundle.manifest import PromptSpec, TokenizerSpec
from bundle.prompt import TEMPLATES, build_prompt, clean_answer, encode_pieces, splice, text_ids
from bundle.tokenizer import open_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
CONTRACT = json.loads((GOLDEN / "contract/prompt.json").read_text(encoding="utf-8"))
SPEC = TokenizerSpec.model_validate(CONTRACT["tokenizer"])
TOKENIZER = open_tokenizer(SPEC, GOLDEN)


def test_v1_is_the_published_template_letter_for_letter() -> None:
    prompt = build_prompt(TEMPLATES["v1"], TOKENIZER, SPEC, "Is it overcast?", True)
    assert prompt.text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nIs it overcast? ASSISTANT:"
    )
    assert prompt.token_ids[0] == 1 and prompt.token_ids.count(1) == 1 and prompt.token_ids.count(-200) == 1
    without = build_prompt(TEMPLATES["v1"], TOKENIZER, SPEC, "Is it overcast?", False)
    assert without.text.endswith("USER: Is it overcast? ASSISTANT:") and -200 not in without.token_ids


def test_plain_gives_the_recorded_ids_of_the_published_code() -> None:
    recorded = load_file(GOLDEN / "reference/outputs.safetensors")["plain_b1.input_ids"][0].tolist()
    caption = "a red circle left of a blue square, and three green triangle in the top right of the picture.\n"
    assert list(build_prompt(TEMPLATES["plain"], TOKENIZER, SPEC, caption, True).token_ids) == recorded


@pytest.mark.parametrize("case", CONTRACT["cases"])
def test_contract_prompts(case: dict) -> None:
    spec = PromptSpec.model_validate(CONTRACT["templates"][case["template"]])
    assert spec == TEMPLATES[case["template"]]
    prompt = build_prompt(spec, TOKENIZER, SPEC, case["question"], case["has_image"])
    assert prompt.text == case["text"]
    assert list(prompt.token_ids) == case["token_ids"]


@settings(max_examples=50, deadline=None)
@given(question=st.text(max_size=40).filter(lambda text: "<image>" not in text))
def test_each_piece_is_encoded_on_its_own(question: str) -> None:
    prompt = build_prompt(TEMPLATES["v1"], TOKENIZER, SPEC, question, True)
    before, after = prompt.text.split("<image>")
    assert list(prompt.token_ids) == [1, *TOKENIZER.encode(before), -200, *TOKENIZER.encode(after)]


def test_an_image_marker_in_the_question_is_refused() -> None:
    for has_image in (True, False):
        with pytest.raises(UsageError, match="the question holds '<image>'.*remove '<image>'"):
            build_prompt(TEMPLATES["v1"], TOKENIZER, SPEC, "<image>\nWhat is it?", has_image)


def test_encode_pieces_places_every_marker() -> None:
    ids = encode_pieces("<image>yes<image>", TOKENIZER, -200)
    assert ids == [-200, *TOKENIZER.encode("yes"), -200]


def test_splice_puts_the_visual_rows_where_the_image_id_stood() -> None:
    embeddings = np.array([[[1.0], [2.0], [3.0]]], dtype=np.float32)
    visual = np.array([[[8.0], [9.0]]], dtype=np.float32)
    assert splice((1, -200, 5, 6), -200, embeddings, visual).ravel().tolist() == [1, 8, 9, 2, 3]
    assert splice((1, 5, 6), -200, embeddings, None) is embeddings
    assert text_ids((1, -200, 5, 6), -200) == [1, 5, 6]


@pytest.mark.parametrize("case", json.loads((GOLDEN / "contract/tokens.json").read_text(encoding="utf-8"))["clean"])
def test_contract_answers(case: dict) -> None:
    assert clean_answer(case["decoded"]) == case["answer"]
