"""Recorded distributions: exact when whole, unbiased where that is said, nearer with more words; drawn attention."""

from __future__ import annotations

import pytest
import torch

from distill.losses.attention import attention_kl
from distill.losses.divergences import DIVERGENCES
from distill.settings.terms import DIVERGENCE_TERMS, TermWeights
from distill.teacher.sparse_rows import SUPPORTS, draw, log_weight, sparse_block, sparse_rows
from distill.teacher_cache.parts import NEEDS

VOCABULARY = 40
WEIGHTED = [name for name, support in SUPPORTS.items() if support == "weighted"]


@pytest.fixture
def sides() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a student and a sharper teacher [5, V]."""
    draws = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, VOCABULARY, generator=draws) for _ in range(2))
    return student.log_softmax(-1), (2.5 * teacher).log_softmax(-1)


def estimate(
    name: str, student: torch.Tensor, teacher: torch.Tensor, words: int, seed: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    uniform = torch.rand(len(teacher), generator=torch.Generator().manual_seed(seed))
    return DIVERGENCES[name](*sparse_rows(teacher, words, dtype, uniform).beside(student).on(name))


def gradient(name: str, logits: torch.Tensor, teacher: torch.Tensor, words: int, seed: int) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    estimate(name, logits.log_softmax(-1), teacher, words, seed).sum().backward()
    assert logits.grad is not None
    return logits.grad


def test_every_divergence_says_how_it_is_recorded() -> None:
    assert set(SUPPORTS) == set(DIVERGENCES) == set(DIVERGENCE_TERMS)
    assert set(NEEDS) == {name for name in TermWeights.__dataclass_fields__ if not name.startswith("published")}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_with_every_word_stored_nothing_is_lost(name: str, sides: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = sides
    exact = DIVERGENCES[name](student, teacher)
    for words in (VOCABULARY, 10 * VOCABULARY):
        torch.testing.assert_close(estimate(name, student, teacher, words, 0), exact, atol=2e-6, rtol=2e-6)
    halved = estimate(name, student, teacher, VOCABULARY, 0, torch.float16)
    torch.testing.assert_close(halved, exact, atol=2e-3, rtol=4e-3)  # 2**-11 of each log-probability
    twin = estimate(name, teacher, teacher, VOCABULARY, 0)
    torch.testing.assert_close(twin, torch.zeros(5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", WEIGHTED)
def test_weighted_words_are_unbiased_in_value_and_gradient(name: str, sides: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The mean over an even grid of what chance decides is the expectation, up to a grid step."""
    student, teacher = sides
    chances = 4000
    uniform = ((torch.arange(chances) + 0.5) / chances).repeat_interleave(5)
    many = teacher.repeat(chances, 1)  # [5 * chances, V]
    logits = student.clone().requires_grad_()
    rows = sparse_rows(many, 3, torch.float32, uniform).beside(logits.log_softmax(-1).repeat(chances, 1))
    values = DIVERGENCES[name](*rows.on(name)).view(chances, 5)
    exact = DIVERGENCES[name](student, teacher)
    torch.testing.assert_close(values.mean(0), exact, atol=1e-3, rtol=1e-3)
    assert (values.std(0) > 0.05).any()  # chance does decide
    values.mean(0).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, gradient(name, student, teacher, VOCABULARY, 0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_error_of_the_gradient_falls_with_the_words(name: str, sides: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = sides
    exact = gradient(name, student, teacher, VOCABULARY, 0)
    errors = [
        sum((gradient(name, student, teacher, words, seed) - exact).norm().item() for seed in range(20)) / 20
        for words in (2, 10, 36)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.6 * errors[0]


def test_exactly_so_many_words_and_the_likeliest_among_them() -> None:
    teacher = torch.tensor([[0.6, 0.3, 0.04, 0.03, 0.02, 0.01]]).log()
    counts = torch.zeros(6)
    for number in range(400):
        drawn = draw(teacher, 3, torch.tensor([(number + 0.5) / 400]))
        picked = drawn.picked[0]
        assert len(set(picked.tolist())) == 3
        counts[picked] += 1
    assert counts.tolist() == pytest.approx([400, 400, 160, 120, 80, 40], abs=2)  # one of four, by its probability
    weights = log_weight(teacher, drawn.log_threshold).exp()[0]
    assert weights.tolist() == pytest.approx([1, 1, 0.1 / 0.04, 0.1 / 0.03, 0.1 / 0.02, 0.1 / 0.01], rel=1e-4)


def test_a_teacher_without_doubt_and_one_without_preference() -> None:
    sure = torch.full((2, 9), -300.0)
    sure[:, 4] = 0.0
    even = torch.zeros(2, 9).log_softmax(-1)
    for teacher in (sure.log_softmax(-1), even):
        for words in (1, 4, 8, 9):
            rows = sparse_rows(teacher, words, torch.float16, torch.tensor([0.0, 0.999]))
            assert rows.ids.shape == (2, words)
            for name, divergence in DIVERGENCES.items():
                value = divergence(*rows.beside(even).on(name))
                assert value.isfinite().all(), (name, words)
    assert (sparse_rows(sure.log_softmax(-1), 4, torch.float16, torch.rand(2)).ids == 4).any(1).all()


def test_pieces_are_the_whole(sides: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = sides
    rows = sparse_rows(teacher, 6, torch.float32, torch.rand(5))
    whole = rows.beside(student).on("skew_kl")[1]
    pieces = [part.beside(student[: len(part.ids)]).on("skew_kl")[1] for part in rows.split(2)]
    torch.testing.assert_close(torch.cat(pieces), whole)


def test_drawn_columns_keep_a_rows_mass_and_are_unbiased() -> None:
    block = torch.rand(3, 30, generator=torch.Generator().manual_seed(2)).square() * 0.02  # [R, N]
    chances = 1000
    uniform = ((torch.arange(chances) + 0.5) / chances).repeat_interleave(3)
    columns, values = sparse_block(block.repeat(chances, 1), 6, uniform)  # [3 * chances, C]
    assert columns.shape == (3 * chances, 6)
    torch.testing.assert_close(values.sum(-1), block.sum(-1).repeat(chances), rtol=1e-4, atol=0)
    total = torch.zeros(3 * chances, 30).scatter(-1, columns, values).view(chances, 3, 30).mean(0)
    torch.testing.assert_close(total, block, atol=1e-4, rtol=0)
    columns, values = sparse_block(block, 30, torch.rand(3))
    dense = torch.zeros_like(block).scatter(-1, columns, values)
    student, mask = torch.rand(1, 2, 3, 30), torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(
        attention_kl(student, dense[None, None], mask), attention_kl(student, block[None, None], mask)
    )
