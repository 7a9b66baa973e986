"""k-means in one dimension against coremltools' exact one, and its corner cases."""

from __future__ import annotations

import numpy as np
import pytest
from coremltools._deps import _kmeans1d

from export.weights.palette import ENTRIES, cluster

RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "normal": (RANDOM.normal(size=8192) * 0.02, 1.01),
    "laplace": (RANDOM.laplace(size=8192) * 0.02, 1.02),
    "heavy tails": (RANDOM.standard_t(3, size=8192) * 0.02, 1.1),
    "even": (RANDOM.uniform(-1, 1, 8192), 1.01),
    "one outlier": (np.append(RANDOM.normal(size=8191) * 0.02, 3.0), 1.02),
}


def squared_error(values: np.ndarray, entries: np.ndarray, numbers: np.ndarray) -> float:
    return float(np.square(entries.astype(np.float64)[numbers] - values.astype(np.float64)).sum())


@pytest.mark.parametrize("name", WEIGHTS)
def test_nearly_the_least_error(name: str) -> None:
    weights, limit = WEIGHTS[name]
    values = weights.astype(np.float16)
    points, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    exact = _kmeans1d.cluster(points, ENTRIES, weights=counts)
    least = squared_error(values, np.array(exact.centroids), np.array(exact.clusters)[places])
    assert least <= squared_error(values, *cluster(values)) * 1.001 <= limit * least * 1.001


def test_entries_rise_and_each_value_has_its_nearest() -> None:
    values = (RANDOM.normal(size=(16, 64))).astype(np.float16)
    entries, numbers = cluster(values)
    assert entries.dtype == np.float16 and numbers.dtype == np.uint8 and numbers.shape == (1024,)
    assert (np.diff(entries) > 0).all()
    distance = np.abs(entries.astype(np.float32) - values.reshape(-1, 1).astype(np.float32))  # [1024, 16]
    assert (distance[np.arange(1024), numbers] <= distance.min(1) + 1e-3).all()


@pytest.mark.parametrize("few", [[0.0], [0.0, -0.0], [1.0, 2.0, 2.0, -3.0], list(range(-8, 8))])
def test_few_values_are_kept_exactly(few: list[float]) -> None:
    values = np.array(few, np.float16)
    entries, numbers = cluster(values)
    assert len(entries) == ENTRIES
    np.testing.assert_array_equal(entries[numbers], values)
