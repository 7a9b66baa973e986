"""Fused rows against plain autograd: values, gradients, foretold and other weights, autocast, what cannot be fused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.align_kd.module import AlignKD
from distill.losses.divergences import DIVERGENCES, log_probabilities
from distill.losses.fused_rows import FusedRows, can_fuse, proportion, sum_of_chunks
from distill.models.mobilevlm import MobileVlm
from distill.settings.terms import PRESETS

Batch = dict[str, torch.Tensor]
ROWS, WIDTH, WORDS, CHUNK, PRODUCT = 19, 8, 40, 4, 8
NAMES = list(DIVERGENCES)


class Calls(nn.Module):
    """Counts how often a module ran."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.count = 0
        module.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


def parts(rows: int = ROWS) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    """Hidden states [S, D], lm_head, the teacher's log-probabilities [S, V]."""
    torch.manual_seed(3)
    lm_head = nn.Linear(WIDTH, WORDS, bias=False)
    return torch.randn(rows, WIDTH, requires_grad=True), lm_head, torch.randn(rows, WORDS).log_softmax(-1)


def make(lm_head: nn.Linear, teacher: torch.Tensor) -> FusedRows:
    def terms(logits: torch.Tensor, first: int, last: int) -> torch.Tensor:
        log_student = log_probabilities(logits, 1.0)
        return torch.stack([DIVERGENCES[name](log_student, teacher[first:last]).sum() for name in NAMES])

    return FusedRows(lm_head, terms, CHUNK, PRODUCT)


@pytest.mark.parametrize("rows", [0, 1, CHUNK, PRODUCT, PRODUCT + 1, ROWS])
@pytest.mark.parametrize("factor", [1.0, -0.25])
def test_every_divergence_has_the_values_and_gradients_of_plain_autograd(rows: int, factor: float) -> None:
    hidden, lm_head, teacher = parts(rows)
    weights = torch.linspace(0.5, 2.0, len(NAMES))
    fused, calls = make(lm_head, teacher), Calls(lm_head)
    sums = fused(hidden, weights)
    found = torch.autograd.grad((sums * weights * factor).sum(), [hidden, lm_head.weight])
    assert calls.count == max(1, -(-rows // PRODUCT)), "no rows are run again"
    plain = fused.terms(lm_head(hidden), 0, rows)
    expected = torch.autograd.grad((plain * weights * factor).sum(), [hidden, lm_head.weight])
    torch.testing.assert_close(sums, plain)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_other_weights_than_foretold_are_as_exact() -> None:
    hidden, lm_head, teacher = parts()
    fused = make(lm_head, teacher)
    sums, calls = fused(hidden, torch.ones(len(NAMES))), Calls(lm_head)
    plain = fused.terms(lm_head(hidden), 0, ROWS)
    for term in range(len(NAMES)):
        found = torch.autograd.grad(sums[term], [hidden, lm_head.weight], retain_graph=True)
        expected = torch.autograd.grad(plain[term], [hidden, lm_head.weight], retain_graph=True)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    calls.count = 0
    sums.sum().backward()
    assert calls.count == 0, "the foretold gradients are still there"


def test_a_second_backward_pass_adds_the_same_again() -> None:
    hidden, lm_head, teacher = parts()
    sums = make(lm_head, teacher)(hidden, torch.ones(len(NAMES))).sum()
    sums.backward(retain_graph=True)
    assert hidden.grad is not None and lm_head.weight.grad is not None
    once = [hidden.grad.clone(), lm_head.weight.grad.clone()]
    sums.backward()
    torch.testing.assert_close([hidden.grad, lm_head.weight.grad], [2 * value for value in once])


def test_a_frozen_lm_head_passes_the_gradient_on_and_gets_none() -> None:
    hidden, lm_head, teacher = parts()
    lm_head.requires_grad_(False)
    fused = make(lm_head, teacher)
    fused(hidden, torch.ones(len(NAMES))).sum().backward()
    expected = torch.autograd.grad(fused.terms(lm_head(hidden), 0, ROWS).sum(), hidden)
    torch.testing.assert_close(hidden.grad, expected[0], atol=1e-6, rtol=1e-5)
    assert lm_head.weight.grad is None


@pytest.mark.parametrize("foretold", [1.0, 7.0], ids=["foretold", "others"])
def test_autocast_is_that_of_the_forward_pass(foretold: float) -> None:
    hidden, lm_head, teacher = parts()
    fused = make(lm_head, teacher)
    told = torch.ones(len(NAMES))
    told[0] = foretold
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = fused(hidden, told).sum()
        theirs = sum_of_chunks(lm_head, fused.terms, CHUNK, hidden).sum()
    found, expected = (torch.autograd.grad(value, [hidden, lm_head.weight]) for value in (ours, theirs))
    assert found[1].dtype == torch.float32 and ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_what_is_proportional() -> None:
    told = torch.tensor([1.0, 0.5, 0.0])
    assert proportion(told, told) == 1.0 and proportion(told / 8, told) == 0.125
    assert proportion(torch.tensor([1.0, 0.0, 0.0]), told) is None
    assert proportion(torch.tensor([1.0, 0.5, 1e-3]), told) is None
    assert proportion(told, torch.zeros(3)) is None and proportion(told * float("nan"), told) is None


def test_only_a_plain_head_is_fused() -> None:
    class Wrapped(nn.Linear):
        pass

    gathered = nn.Linear(2, 3, bias=False)
    gathered.weight = nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it between uses
    assert can_fuse(nn.Linear(2, 3, bias=False))
    assert not any(map(can_fuse, (nn.Linear(2, 3), Wrapped(2, 3, bias=False), gathered)))


def test_a_wrapped_head_gives_the_same_step(student: MobileVlm, teacher: MobileVlm, mixed: Batch) -> None:
    class Wrapped(nn.Linear):
        pass

    module = AlignKD(student, teacher, PRESETS["paper"])
    results = []
    for kind in (nn.Linear, Wrapped):
        module.student.lm_head.__class__ = kind
        module.zero_grad()
        terms = module(**mixed)
        module.total(terms).backward()
        results.append(({name: value.item() for name, value in terms.items()}, student.lm_head.weight.grad.clone()))  # type: ignore[union-attr, operator]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-4)


def test_learned_balance_and_taught_share_are_foretold(student: MobileVlm, teacher: MobileVlm, mixed: Batch) -> None:
    module = AlignKD(student, teacher, {"cross_entropy": 2.0, "forward_kl": 3.0}, learned_balance=True)
    assert module.balance is not None
    with torch.no_grad():
        module.balance["forward_kl"].fill_(0.7)
    module.taught_share = 0.5
    calls = Calls(student.lm_head)
    module.total(module(**mixed), 0.5).backward()
    assert calls.count == 1
    module.total(module(**mixed), 0.4).backward()
    assert calls.count == 3, "a wrong guess runs the rows again"
