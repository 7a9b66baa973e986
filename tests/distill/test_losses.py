"""Loss functions on small tensors: known answers, zero for identical inputs, finite when all is masked."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import attention, divergences, visual

DIVERGENCES = [
    divergences.forward_kl,
    divergences.reverse_kl,
    divergences.jensen_shannon,
    divergences.skew_kl,
    divergences.adaptive_kl,
    divergences.cosine,
]
Divergence = Callable[..., torch.Tensor]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_divergences_have_the_known_values() -> None:
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2]]).log()
    assert divergences.forward_kl(student, teacher).item() == pytest.approx(
        0.8 * math.log(1.6) + 0.2 * math.log(0.4), abs=1e-6
    )
    assert divergences.reverse_kl(student, teacher).item() == pytest.approx(
        0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2), abs=1e-6
    )
    middle = (0.65, 0.35)
    to_teacher = 0.8 * math.log(0.8 / middle[0]) + 0.2 * math.log(0.2 / middle[1])
    to_student = 0.5 * math.log(0.5 / middle[0]) + 0.5 * math.log(0.5 / middle[1])
    assert divergences.jensen_shannon(student, teacher).item() == pytest.approx((to_teacher + to_student) / 2, abs=1e-6)
    mixed = (0.1 * 0.8 + 0.9 * 0.5, 0.1 * 0.2 + 0.9 * 0.5)
    skewed = 0.8 * math.log(0.8 / mixed[0]) + 0.2 * math.log(0.2 / mixed[1])
    assert divergences.skew_kl(student, teacher).item() == pytest.approx(skewed, abs=1e-6)


def test_adaptive_kl_and_cosine_have_the_known_values() -> None:
    student, teacher = torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([[0.7, 0.2, 0.1]])
    forward = divergences.forward_kl(student.log(), teacher.log()).item()
    reverse = divergences.reverse_kl(student.log(), teacher.log()).item()
    in_head = 0.5 / (0.5 + 0.1 + 0.4)  # the first word alone holds more than half of the teacher's mass
    found = divergences.adaptive_kl(student.log(), teacher.log()).item()
    assert found == pytest.approx(in_head * forward + (1 - in_head) * reverse, abs=1e-6)
    dot, norms = 0.14 + 0.06 + 0.05, math.sqrt(0.04 + 0.09 + 0.25) * math.sqrt(0.49 + 0.04 + 0.01)
    assert divergences.cosine(student.log(), teacher.log()).item() == pytest.approx(1 - dot / norms, abs=1e-6)


def test_label_smoothing_mixes_in_a_uniform_target() -> None:
    logits, target = normal(3, 5), torch.tensor([1, 4, -100])
    log_p = logits.log_softmax(-1)
    expected = [-0.9 * log_p[row, word] - 0.1 * log_p[row].mean() for row, word in ((0, 1), (1, 4))]
    found = divergences.cross_entropy_rows(logits, target, 0.1)
    assert found.tolist() == pytest.approx([*(value.item() for value in expected), 0.0], abs=1e-6)


def test_cross_entropy_leaves_ignored_targets_out() -> None:
    logits = torch.tensor([[2.0, 0.0], [5.0, 5.0]])
    assert divergences.cross_entropy(logits, torch.tensor([1, -100])).item() == pytest.approx(
        math.log(math.e**2 + 1), abs=1e-6
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 4))
def test_divergences_are_zero_for_identical_inputs_and_positive_else(
    divergence: Divergence, seed: int, temperature: float
) -> None:
    one, other = normal(3, 7, seed=seed) * 4, normal(3, 7, seed=seed + 5000) * 4
    assert divergence(one, one, temperature=temperature).item() == pytest.approx(0, abs=1e-5)
    assert divergence(one, other, temperature=temperature).item() > 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_skip_masked_rows_and_stay_finite_without_any(divergence: Divergence) -> None:
    student, teacher = normal(4, 9).requires_grad_(), normal(4, 9, seed=1)
    mask = torch.tensor([True, False, True, False])
    assert divergence(student, teacher, mask).item() == pytest.approx(divergence(student[mask], teacher[mask]).item())
    nothing = divergence(student, teacher, torch.zeros(4, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0 and torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_do_not_depend_on_the_order_of_rows_or_words(divergence: Divergence) -> None:
    student, teacher = normal(5, 6), normal(5, 6, seed=1)
    rows, words = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([5, 0, 3, 1, 4, 2])
    moved = divergence(student[rows][:, words], teacher[rows][:, words])
    assert moved.item() == pytest.approx(divergence(student, teacher).item(), abs=1e-6)


def test_temperature_keeps_the_gradient_scale() -> None:
    student, teacher = normal(2, 5), normal(2, 5, seed=1)
    expected = 4 * divergences.forward_kl(student / 2, teacher / 2).item()
    assert divergences.forward_kl(student, teacher, temperature=2.0).item() == pytest.approx(expected)


def test_half_precision_logits_are_compared_in_float32() -> None:
    student = (normal(3, 50) * 30).to(torch.float16)
    assert divergences.reverse_kl(student, student).dtype == torch.float32
    assert divergences.cross_entropy(student, torch.tensor([1, 2, 3])).dtype == torch.float32


def test_attention_mse_means_over_real_rows_only() -> None:
    student, teacher = torch.zeros(2, 1, 2, 3), torch.zeros(2, 1, 2, 3)
    teacher[0, 0, 0] = torch.tensor([1.0, 2.0, 3.0])
    teacher[1, 0, 1] = 100.0
    mask = torch.tensor([[True, True], [True, False]])
    assert attention.attention_mse(student, teacher, mask).item() == pytest.approx(14 / 9)
    assert attention.attention_mse(student, teacher, torch.zeros_like(mask)).item() == 0


def test_attention_kl_ignores_how_much_of_the_attention_is_on_the_image() -> None:
    student, teacher = normal(1, 4, 3, 6).softmax(-1), normal(1, 8, 3, 6, seed=1).softmax(-1)
    mask = torch.ones(1, 3, dtype=torch.bool)
    whole = attention.attention_kl(student, teacher, mask)
    assert whole.item() > 0
    assert attention.attention_kl(student * 0.2, teacher, mask).item() == pytest.approx(whole.item(), rel=1e-4)
    assert attention.attention_kl(teacher, teacher, mask).item() == pytest.approx(0, abs=1e-6)


def test_attention_kl_by_mass_counts_rows_by_the_teachers_mass_on_the_image() -> None:
    student, teacher = torch.tensor([[[[0.1, 0.3], [0.2, 0.2]]]]), torch.tensor([[[[0.5, 0.3], [0.01, 0.09]]]])
    mask = torch.tensor([[True, True]])
    each = [attention.attention_kl(student, teacher, torch.tensor([[row == 0, row == 1]])).item() for row in (0, 1)]
    assert attention.attention_kl(student, teacher, mask).item() == pytest.approx(sum(each) / 2, abs=1e-6)
    weighted = (0.8 * each[0] + 0.1 * each[1]) / 0.9
    assert attention.attention_kl(student, teacher, mask, by_mass=True).item() == pytest.approx(weighted, abs=1e-6)
    assert attention.attention_kl(student, teacher, ~mask, by_mass=True).item() == 0


def test_visual_terms_without_a_map_to_the_student() -> None:
    tokens = normal(2, 4, 6)
    assert visual.normed_visual_mse(tokens, 3 * tokens + 2).item() == pytest.approx(0, abs=1e-5)  # scale and shift
    assert visual.normed_visual_mse(normal(2, 4, 6, seed=1), tokens).item() > 0.5
    turn = torch.linalg.qr(normal(6, 6, seed=2)).Q
    assert visual.relation_distance(tokens, 2 * tokens @ turn).item() == pytest.approx(0, abs=1e-5)  # a rotation
    one, other = torch.tensor([[[1.0, 0], [0, 1]]]), torch.tensor([[[1.0, 0, 0], [1, 0, 0]]])
    assert visual.relation_distance(one, other).item() == pytest.approx(1 - 2 / (math.sqrt(2) * 2), abs=1e-6)


def test_focus_looks_at_the_tokens_with_most_attention_from_real_rows() -> None:
    weights = torch.zeros(1, 2, 2, 4)
    weights[0, :, 0] = torch.tensor([[0.0, 0.9, 0.0, 0.1], [0.0, 0.0, 0.2, 0.5]])  # head means .45, .1, .3
    weights[0, :, 1, 0] = 5.0  # a masked row
    mask = torch.tensor([[True, False]])
    assert attention.focus_tokens(weights, mask, 2).tolist() == [[1, 3]]
    student, teacher = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)
    teacher[0, 3] = 2.0
    teacher[0, 0] = 50.0
    assert visual.focus_mse(student, teacher, weights, mask, 2).item() == pytest.approx(2.0)
    assert visual.visual_mse(student, teacher).item() == pytest.approx((4 + 2500) / 4)


def test_focus_on_all_tokens_is_the_visual_term() -> None:
    student, teacher, weights = normal(2, 5, 3), normal(2, 5, 3, seed=1), normal(2, 4, 2, 5, seed=2).softmax(-1)
    mask = torch.ones(2, 2, dtype=torch.bool)
    expected = visual.visual_mse(student, teacher).item()
    assert visual.focus_mse(student, teacher, weights, mask, 99).item() == pytest.approx(expected)
    assert visual.visual_mse(student, student).item() == 0
