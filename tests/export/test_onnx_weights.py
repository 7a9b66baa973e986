"""Packing and unpacking of block-quantized matrices."""

from __future__ import annotations

import numpy as np
import pytest

from bundle.replay import relative_error
from export.weights.blocks import Packed, block_size_of, pack, unpack


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def test_known_answer_low_nibble_first_and_zero_point_half_the_range() -> None:
    weight = np.zeros((1, 16), np.float32)
    weight[0, :4] = (-8, 7, 1, -1)
    packed = pack(weight, 4, 16)
    assert packed.scales.tolist() == [[1.0]]
    assert packed.data[0, 0, :2].tolist() == [0x0 | 0xF << 4, 0x9 | 0x7 << 4]
    assert packed.data[0, 0, 2:].tolist() == [0x88] * 6
    np.testing.assert_array_equal(unpack(packed), weight)


@pytest.mark.parametrize("bits,worst", [(4, 0.085), (8, 0.006)])
def test_error_of_normal_weights(bits: int, worst: float) -> None:
    weight = normal(64, 256)
    assert worst / 3 < relative_error(unpack(pack(weight, bits, 32)), weight) < worst


def test_a_fitted_scale_beats_the_extreme_alone() -> None:
    weight = normal(64, 256)
    groups = weight.reshape(64, 8, 32)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1) / -8
    plain = (np.clip(np.rint(groups / extreme), -8, 7) * extreme).reshape(64, 256)
    assert relative_error(unpack(pack(weight, 4, 32)), weight) < 0.97 * relative_error(plain, weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_what_was_unpacked_changes_nothing(bits: int) -> None:
    once = unpack(pack(normal(8, 64), bits, 32))
    np.testing.assert_allclose(unpack(pack(once, bits, 32)), once, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("columns,block", [(80, 32), (20, 16), (33, 32)])
def test_a_padded_last_block_keeps_every_column(columns: int, block: int) -> None:
    weight = normal(4, columns)
    packed = pack(weight, 8, block)
    assert packed.data.shape == (4, -(-columns // block), block)
    assert unpack(packed).shape == weight.shape
    assert relative_error(unpack(packed), weight) < 1e-2


def test_rows_are_quantized_alone() -> None:
    weight = normal(6, 64)
    whole = pack(weight, 4, 32)
    for row in range(6):
        part = pack(weight[row : row + 1], 4, 32)
        np.testing.assert_array_equal(part.data[0], whole.data[row])


def test_zeros_stay_zeros() -> None:
    for bits in (4, 8):
        packed: Packed = pack(np.zeros((2, 32), np.float32), bits, 32)
        assert np.isfinite(packed.scales).all() and not unpack(packed).any()


def test_block_sizes_are_powers_of_two_that_onnxruntime_takes() -> None:
    assert [block_size_of(None, columns) for columns in (8, 16, 48, 64, 2048)] == [16, 16, 64, 64, 128]
    assert block_size_of(32, 2048) == 32
