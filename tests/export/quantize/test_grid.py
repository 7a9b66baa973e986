"""Codes and scales: what is kept, and that every target can hold it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.quantize.hqq import hqq
from export.weights.chosen import ChosenWeights
from export.weights.grid import HIGHEST, LOWEST, SMALLEST_SCALE, Coded, fitted_scales, nearest, storable
from export.weights.lazy import Layered


def weight(rows: int = 24, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.05


def test_scales_are_exact_in_bfloat16_and_in_float16() -> None:
    scales = storable(torch.logspace(-9, 2, 300))
    assert torch.equal(scales.bfloat16().float(), scales) and torch.equal(scales.half().float(), scales)
    assert float(scales.min()) == SMALLEST_SCALE


def test_a_known_answer() -> None:
    coded = nearest(torch.tensor([[7.0, -8.0, 9.0, 0.4]]), torch.tensor([[1.0, 2.0]]))
    assert coded.codes.tolist() == [[7, -8, 4, 0]]  # 9 / 2 = 4.5 rounds to even
    assert coded.values().tolist() == [[7.0, -8.0, 8.0, 0.0]]
    assert nearest(torch.tensor([[100.0, -100.0]]), torch.ones(1, 1)).codes.tolist() == [[HIGHEST, LOWEST]]


def test_values_of_codes_round_to_the_same_codes() -> None:
    coded = nearest(weight(), fitted_scales(weight(), 32, torch.ones(96), False))
    again = nearest(coded.values(), coded.scales)
    assert torch.equal(again.codes, coded.codes)


def test_fitted_scales_lose_less_than_the_widest_and_look_at_importance() -> None:
    matrix, plain = weight(), torch.ones(96)
    widest = storable(matrix.reshape(24, 3, 32).abs().amax(-1) / HIGHEST)
    important = plain.clone()
    important[:4] = 1000

    def error(scales: torch.Tensor, of: torch.Tensor) -> float:
        return float(((nearest(matrix, scales).values() - matrix).square() * of).sum())

    fitted, weighted = fitted_scales(matrix, 32, plain, False), fitted_scales(matrix, 32, important, False)
    assert error(fitted, plain) < 0.95 * error(widest, plain)
    assert error(weighted, important) < error(fitted, important)


@pytest.mark.parametrize("signed", [False, True])
def test_a_group_of_zeros_has_a_scale(signed: bool) -> None:
    assert fitted_scales(torch.zeros(1, 32), 32, torch.ones(32), signed).tolist() == [[SMALLEST_SCALE]]


def test_scales_below_zero_are_used_where_a_target_takes_them() -> None:
    matrix, plain = weight(), torch.ones(96)
    one_sided, signed = (nearest(matrix, fitted_scales(matrix, 32, plain, of)) for of in (False, True))
    assert float(one_sided.scales.min()) > 0 > float(signed.scales.min())
    assert torch.equal(storable(signed.scales), signed.scales)
    assert (signed.values() - matrix).norm() < 0.97 * (one_sided.values() - matrix).norm()


def test_hqq_is_nearer_than_the_widest_scales() -> None:
    matrix = weight()
    coded = hqq(matrix, 32)
    widest = nearest(matrix, storable(matrix.reshape(24, 3, 32).abs().amax(-1) / HIGHEST))
    assert coded.codes.dtype == torch.int8 and coded.scales.shape == (24, 3)
    assert torch.equal(storable(coded.scales), coded.scales)
    assert (coded.values() - matrix).norm() < (widest.values() - matrix).norm()


def test_chosen_weights_come_back_from_disk(tmp_path: Path) -> None:
    coded = nearest(weight(), fitted_scales(weight(), 32, torch.ones(96), False))
    ChosenWeights(tmp_path).keep("a.weight", coded)
    chosen = ChosenWeights(tmp_path)
    assert list(chosen) == ["a.weight"] and "a.weight" in chosen and "b.weight" not in chosen and len(chosen) == 1
    assert torch.equal(chosen["a.weight"], coded.values())
    found: Coded = chosen.coded("a.weight")
    assert torch.equal(found.codes, coded.codes) and torch.equal(found.scales, coded.scales)
    with pytest.raises(FileNotFoundError):
        chosen["b.weight"]


def test_the_first_layer_wins() -> None:
    first, second = {"a": torch.ones(2)}, {"a": torch.zeros(2), "b": torch.full((2,), 5.0)}
    both = Layered(first, second)
    out = torch.empty(2)
    both.read_into("a", out)
    assert sorted(both) == ["a", "b"] and len(both) == 2 and "c" not in both
    assert out.tolist() == [1, 1] and both["b"].tolist() == [5, 5]
