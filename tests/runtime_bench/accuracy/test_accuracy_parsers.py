"""The parsers' slips and traps, one by one, and that no text whatever makes them fail."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_bench.accuracy import gqa, mmbench, mme, pope, sqa, textvqa
from runtime_bench.accuracy.mmbench_table import MISSING
from runtime_bench.accuracy.textvqa_words import CONTRACTIONS

ANIMALS = {"A": "cat", "B": "dog", "C": "bird", "D": "fish"}


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("Red.", "red"), ("Red. ", "red. "), ("red\n", "red\n"), ("TV...", "tv"), ("the man", "the man"),
     (".", ""), ("İPhone", "i̇phone"), ("It is.red", "it is.red")],
)  # fmt: skip
def test_gqa(text: str, verdict: str) -> None:
    assert gqa.normalize(text) == verdict


@pytest.mark.parametrize(
    ("text", "n_choices", "letter", "index"),
    [("A", 2, "A", 0), ("E", 5, "E", 4), ("E", 4, "E", -1), ("B. apostrophe", 2, "B", 1), ("A. ", 3, "A", 0),
     ("A.", 2, "FAILED", -1), ("a", 2, "FAILED", -1), ("(A)", 2, "FAILED", -1), ("B ", 2, "FAILED", -1),
     ("AB", 2, "FAILED", -1), ("The answer is B.", 2, "B", 1), ("The answer is B", 2, "FAILED", -1),
     ("The answer is B!", 2, "B", 1), ("The answer is Bad", 2, "B", 1), ("The answer is B\n", 2, "FAILED", -1),
     ("The answer is C. The answer is A.", 4, "FAILED", -1), ("The answer is Z.", 4, "Z", -1),
     ("so: The answer is A.", 2, "A", 0), ("F. x", 5, "FAILED", -1), ("", 2, "FAILED", -1)],
)  # fmt: skip
def test_sqa(text: str, n_choices: int, letter: str, index: int) -> None:
    choice = sqa.parse(text, n_choices)
    assert (choice, choice.pred_idx) == (letter, index)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("No", "no"), ("no, there is", "no"), ("It is not.", "no"), ("Yes. no", "yes"), (". no", "yes"), ("NO", "yes"),
     ("No!", "yes"), ('"No"', "yes"), ("Not really", "yes"), ("none", "yes"), ("I cannot tell", "yes"), ("", "yes"),
     ("n,o", "no"), ("yes\nno", "yes"), ("no\u00a0", "yes")],
)  # fmt: skip
def test_pope(text: str, verdict: str) -> None:
    assert pope.parse(text) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("Yes", "yes"), ("NO.", "no"), ("Not sure", "no"), ("Now", "no"), ("None", "no"), ("The answer is yes", "other"),
     ("", "other"), ("Y", "other"), (" yes", "yes"), ("  yes", "other"), ("noye", "no"), ("anno", "no"),
     ("I know", "other")],
)  # fmt: skip
def test_mme(text: str, verdict: str) -> None:
    assert mme.parse(text) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("A", "A"), ("(D)", "D"), ("C) because", "C"), ("**B**", "B"), ("A. C", None), ("b", None), ("dog", "B"),
     ("Dogs and cats", None), ("The answer is d", "D"), ("Answer is **b** of course", "B"), ("answer is E", None),
     ("B one two three", "B"), ("B one two three four", None), ("Z", "Z"), ("Cannot determine the answer, A", "Z"),
     ("Failed to obtain answer via API A", None), ("a dog " * 6, None), ("", None)],
)  # fmt: skip
def test_mmbench(text: str, verdict: str | None) -> None:
    assert mmbench.parse(text, ANIMALS) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("Two", "2"), ("none", "0"), ("the   Answer", "answer"), ("5.", "5"), ("1.5", "1.5"), ("U.S.A.", "usa"),
     ("2,000", "2000"), ("king's", "king 's"), ("dont", "don't"), ("x-ray", "x ray"), ("x -ray", "x ray"),
     ("a - b-c", "bc"), ("10:30 $5", "10:30 $5"), ("somebody'd", "somebodyd"), ("\ttwo\nlines", "2 lines"),
     ("a." * 33, "a" * 33 + "."), ("", "")],
)  # fmt: skip
def test_textvqa(text: str, verdict: str) -> None:
    assert textvqa.normalize(text) == verdict


def test_textvqa_contractions() -> None:
    assert len(CONTRACTIONS) == 114, "the published table without identities and capitals"
    assert CONTRACTIONS["couldnt've"] == CONTRACTIONS["couldn'tve"] == "couldn't've"
    assert CONTRACTIONS["'ow'sat"] == "'ow's'at"
    assert not {"im", "ive", "its", "well", "were", "shell", "ill", "wed"} & set(CONTRACTIONS)


@pytest.mark.parametrize(
    ("prompt", "question"),
    [("What IS it?\nReference OCR token: a, b\nAnswer.", "what is it?"), ("What?\nAnswer.", "what?"),
     ("Reference OCR token: a\nWhat?\nAnswer.", "what?"), ("OCR tokens: a. Question: What? Short answer:", "what?"),
     ("What?\nReference OCR token: a\nb\nAnswer.", None), ("What?", None), ("OCR tokens: a. What?", None)],
)  # fmt: skip
def test_textvqa_question_of_prompt(prompt: str, question: str | None) -> None:
    assert textvqa.question_of(prompt) == question


@pytest.mark.parametrize(("matches", "value"), [(0, None), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_textvqa_soft_score(matches: int, value: float | None) -> None:
    humans = ["x"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert textvqa.soft_scores(humans).get("x") == (None if value is None else pytest.approx(value, abs=1e-12))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text())
def test_parsers_take_any_text(text: str) -> None:
    assert not gqa.normalize(text).endswith(".")
    assert pope.parse(text) in ("yes", "no") and mme.parse(text) in ("yes", "no", "other")
    assert sqa.parse(text, 3).pred_idx in (-1, 0, 1, 2)
    assert mmbench.parse(text, ANIMALS) in (None, "Z", *ANIMALS)
    assert textvqa.normalize(text).split() == textvqa.normalize(text).split(" ") or not textvqa.normalize(text)


def test_missing_values_are_those_of_pandas() -> None:
    assert {"", "None", "NA", "n/a", "null", "nan", "NULL", "<NA>"} <= MISSING and "none" not in MISSING
