"""GPTQ against the slow algorithm that it is a fast form of, and what it is for."""

from __future__ import annotations

import pytest
import torch

from export.quantize import gptq as module
from export.quantize.gptq import DAMPING, gptq
from export.weights.grid import HIGHEST, LOWEST, fitted_scales, levels, nearest


def case(rows: int = 8, columns: int = 64, samples: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and inputs [samples, columns] that go together, as a layer's do."""
    random = torch.Generator().manual_seed(5)
    mixing = torch.randn(columns // 4, columns, generator=random)
    inputs = torch.randn(samples, columns // 4, generator=random) @ mixing
    inputs += 0.3 * torch.randn(samples, columns, generator=random)
    return torch.randn(rows, columns, generator=random) * 0.1, inputs


def one_by_one(weight: torch.Tensor, hessian: torch.Tensor, group_size: int) -> torch.Tensor:
    """Optimal brain quantization (section 3.1 of the GPTQ paper) in GPTQ's order, the inverse made anew each time."""
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    scales = fitted_scales(weight, group_size, hessian.diagonal() / hessian.diagonal().mean() + DAMPING, False)
    spread = scales.repeat_interleave(group_size, 1).double()
    left, codes = weight.double().clone(), torch.empty_like(weight)
    remaining = hessian.diagonal().argsort(descending=True).tolist()
    while remaining:
        column = remaining[0]
        inverse = torch.linalg.inv(damped[remaining][:, remaining])
        codes[:, column] = levels(left[:, column], spread[:, column]).float()
        error = (left[:, column] - codes[:, column] * spread[:, column]) / inverse[0, 0]
        left[:, remaining] -= error[:, None] * inverse[0]
        remaining = remaining[1:]
    return codes


@pytest.mark.parametrize("together", [128, 24])
def test_it_is_the_slow_algorithm(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(module, "COLUMNS_TOGETHER", together)
    weight, inputs = case()
    hessian = inputs.T @ inputs
    same = gptq(weight, hessian, 32).codes == one_by_one(weight, hessian, 32)
    assert same.float().mean() > 0.99, "float32 against float64: a value half way between two levels may differ"


def test_outputs_are_nearer_than_by_rounding_at_the_same_scales() -> None:
    weight, inputs = case()
    coded = gptq(weight, inputs.T @ inputs, 32)
    rounded = nearest(weight, coded.scales)

    def error(values: torch.Tensor) -> float:
        return float((inputs @ (values - weight).T).norm())

    assert error(coded.values()) < 0.7 * error(rounded.values())
    assert int(coded.codes.min()) >= LOWEST and int(coded.codes.max()) <= HIGHEST


def test_inputs_that_have_nothing_to_do_with_each_other_leave_rounding_to_nearest() -> None:
    weight, _ = case()
    coded = gptq(weight, torch.eye(64), 32)
    assert torch.equal(coded.codes, nearest(weight, coded.scales).codes)


def test_a_row_that_rounding_serves_better_is_rounded() -> None:
    weight, _ = case(rows=256)
    random = torch.Generator().manual_seed(1)
    inputs = torch.randn(128, 64, generator=random)  # hardly related: there is little to make up for
    hessian = inputs.T @ inputs
    coded = gptq(weight, hessian, 32)
    rounded = nearest(weight, coded.scales)

    def errors(values: torch.Tensor) -> torch.Tensor:
        return ((values - weight) @ hessian * (values - weight)).sum(1)

    assert bool((errors(coded.values()) <= errors(rounded.values())).all())
    assert 0 < int((coded.codes == rounded.codes).all(1).sum()) < 256


def test_inputs_that_are_never_seen_are_rounded() -> None:
    weight, inputs = case()
    inputs[:, 10:20] = 0
    coded = gptq(weight, inputs.T @ inputs, 32)
    assert torch.equal(coded.codes[:, 10:20], nearest(weight, coded.scales).codes[:, 10:20])
    assert torch.equal(gptq(weight, torch.zeros(64, 64), 32).codes, gptq(weight, torch.eye(64), 32).codes)
