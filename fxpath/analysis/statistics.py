"""Intervals over samples, by scipy."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from fxpath.errors import InputError

MOST_FOR_BCA = 2000  # BCa leaves out every sample once, n² steps; above this it equals the percentile interval anyway
_BATCH = 1 << 16  # resampled values held at once


def bootstrap_interval(
    values: npt.ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the mean of `values` `(n,)`, resampling samples; NaN is missing and left out.

    Bias-corrected and accelerated (BCa); percentile where BCa is degenerate or n is over 2 000. The same values and
    seed give the same interval. Equal values give an interval without width, fewer than two `(nan, nan)`. Raises
    `InputError` for a confidence outside (0, 1) or fewer than one resample.

    >>> low, high = bootstrap_interval([0.1, 0.2, 0.3, 0.4])
    >>> 0.1 < low < 0.25 < high < 0.4
    True
    """
    if not (0 < confidence < 1 and resamples >= 1):
        raise InputError(
            "bootstrap interval: expected a confidence in (0, 1) and at least one resample, "
            f"found {confidence} and {resamples}; for example 0.95 and 2000"
        )
    found = np.asarray(values, dtype=np.float64)
    found = found[~np.isnan(found)]
    if found.size < 2:
        return float("nan"), float("nan")
    if np.all(found == found[0]):
        return float(found[0]), float(found[0])
    if found.size <= MOST_FOR_BCA:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a degenerate distribution is told by NaN as well
            low, high = _bootstrap(found, "BCa", confidence, resamples, seed)
        if np.isfinite(low) and np.isfinite(high):
            return low, high
    return _bootstrap(found, "percentile", confidence, resamples, seed)


def _bootstrap(
    values: npt.NDArray[np.float64], method: Any, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    from scipy import stats

    interval = stats.bootstrap(
        (values,),
        np.mean,
        vectorized=True,
        axis=-1,
        n_resamples=resamples,
        confidence_level=confidence,
        method=method,
        batch=max(_BATCH // values.size, 1),
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
