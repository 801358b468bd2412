"""Intervals and tests over samples, by scipy and statsmodels."""

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


def paired_test(first: npt.ArrayLike, second: npt.ArrayLike, *, resamples: int = 9999, seed: int = 0) -> float:
    """p of the two-sided permutation test that two numbers `(n,)` of the same samples have equal means.

    Under the null hypothesis the two numbers of a sample could be swapped. All 2ⁿ ways to do so are counted where that
    is at most `resamples`, else that many random ones. NaN for fewer than two samples. Raises `InputError` for other
    lengths, NaN, or fewer than one resample.

    >>> paired_test([3, 5, 4, 6], [1, 2, 2, 3])  # all four are larger: 2 of 16 swaps are as extreme
    0.125
    """
    from scipy import stats

    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.ndim != 1 or one.shape != two.shape or np.isnan(one).any() or np.isnan(two).any() or resamples < 1:
        raise InputError(
            "paired test: expected two numbers of each sample, none of them missing, and at least one resample, found "
            f"{one.shape} and {two.shape}, {int(np.isnan(one).sum() + np.isnan(two).sum())} missing, {resamples}"
        )
    if one.size < 2:
        return float("nan")
    found = stats.permutation_test(
        (one - two, two - one),  # what is swapped is the sign of the difference
        lambda differences, _, axis: differences.mean(axis=axis),
        permutation_type="samples",
        n_resamples=resamples,
        batch=max(_BATCH // one.size, 1),
        random_state=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(p: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Holm's correction of several p-values `(m,)`; NaN is missing, stays so and does not count.

    >>> holm([0.01, 0.04, float("nan")])
    array([0.02, 0.04,  nan])
    """
    corrected = np.array(p, dtype=np.float64)
    known = ~np.isnan(corrected)
    if known.sum() > 1:  # one needs no correction, and no statsmodels
        try:
            from statsmodels.stats.multitest import multipletests
        except ImportError as failure:
            raise InputError(f"Holm's correction: {failure}; pip install 'fxpath[eval]'") from failure
        corrected[known] = multipletests(corrected[known], method="holm")[1]
    return corrected


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
