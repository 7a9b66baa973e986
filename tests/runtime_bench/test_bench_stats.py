"""Median and bootstrap interval: known answers, degenerate samples, missing scipy."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from bundle.errors import UsageError
from runtime_bench.stats import measurement, summarize


def test_median_and_interval_of_a_known_sample() -> None:
    summary = summarize([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (summary.median, summary.n, summary.confidence) == (3.0, 5, 0.95)
    # by enumeration of all 5**5 resamples the 2.5 % and 97.5 % points of the median are 1 and 100
    assert (summary.low, summary.high) == (1.0, 100.0)


def test_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    summaries = [summarize(random.normal(10.0, 2.0, 25).tolist()) for _ in range(120)]
    hits = [s.low is not None and s.high is not None and s.low <= 10.0 <= s.high for s in summaries]
    assert 0.88 <= np.mean(hits) <= 1.0


def test_interval_narrows_with_more_samples() -> None:
    random = np.random.default_rng(4)
    few, many = summarize(random.normal(size=8).tolist()), summarize(random.normal(size=400).tolist())
    assert few.low is not None and few.high is not None and many.low is not None and many.high is not None
    assert many.high - many.low < (few.high - few.low) / 2


def test_the_same_samples_give_the_same_interval() -> None:
    samples = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    assert summarize(samples) == summarize(samples)


def test_one_sample_has_no_interval_and_equal_ones_have_a_point() -> None:
    one, equal = summarize([2.5]), summarize([2.5, 2.5, 2.5])
    assert (one.median, one.low, one.high) == (2.5, None, None)
    assert (equal.median, equal.low, equal.high) == (2.5, 2.5, 2.5)


def test_every_sample_is_kept_in_order() -> None:
    assert measurement([3.0, 1.0, 2.0]).samples == (3.0, 1.0, 2.0)


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")]])
def test_nothing_and_nonsense_are_refused(samples: list[float]) -> None:
    with pytest.raises(AssertionError, match="finite"):
        summarize(samples)


def test_missing_scipy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UsageError, match=r"scipy.*pip install 'alignkd\[bench\]'"):
        summarize([1.0, 2.0])
