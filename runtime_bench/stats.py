"""Raw samples -> median with a seeded bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from bundle.errors import missing_extra
from runtime_bench.result import Measurement, Summary

CONFIDENCE = 0.95
RESAMPLES = 2000  # the interval's ends move by about 1 % of its width between seeds at this number
SEED = 0


def summarize(samples: Sequence[float]) -> Summary:
    """Median and percentile bootstrap interval of the median.

    One sample gives no interval; equal samples give an interval of width zero.
    """
    assert len(samples) > 0 and np.isfinite(samples).all(), "samples must be finite and at least one"
    middle = float(median(samples))
    if len(samples) == 1:
        return Summary(median=middle, low=None, high=None, confidence=CONFIDENCE, n=1)
    low, high = (middle, middle) if len(set(samples)) == 1 else _bootstrap(samples)
    return Summary(median=middle, low=low, high=high, confidence=CONFIDENCE, n=len(samples))


def measurement(samples: Sequence[float]) -> Measurement:
    """Keep the samples beside their summary."""
    return Measurement(samples=tuple(samples), summary=summarize(samples))


def _bootstrap(samples: Sequence[float]) -> tuple[float, float]:
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise missing_extra("scipy", "bench") from error
    # percentile, not BCa: BCa's correction is undefined for the median of few tied samples
    interval = bootstrap(
        (np.asarray(samples),),
        np.median,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)
