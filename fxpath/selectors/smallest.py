"""The smallest of a sample's scores |a · ∂Φ/∂a|, found in blocks that fit into the cache.

One thread does it: a second would have to wait until those that ran the network stop spinning, and save nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = Sequence[npt.NDArray[np.floating[Any]]]
Numbers = npt.NDArray[np.int64]

_BLOCK = 131_072  # scores that are made at a time; they fit into the cache
_SAMPLE = 8_192
_MARGIN = 1.5  # from one removal to the next the largest score that goes grows by less, mostly


class Scan:
    """Reads the scores of one sample after the other, in sites of `sizes` neurons, which are numbered through.

    Scores are never stored: only those below a bound are kept and partitioned. `finite` tells whether all scores of
    the last sample were. `numbers`, where neurons lie in another order than they are numbered in, gives the numbers of
    places.
    """

    def __init__(
        self, sizes: Sequence[int], kind: npt.DTypeLike, numbers: Callable[[Numbers], Numbers] | None = None
    ) -> None:
        self.finite = True
        self._numbers = numbers
        self._scores, self._small = np.empty(_BLOCK, dtype=kind), np.empty((2, _BLOCK), dtype=np.bool_)
        self._blocks: list[list[tuple[int, slice, slice]]] = [[]]  # site, where in the site, where in the block
        used = 0
        for site, size in enumerate(sizes):
            first = 0
            while first < size:
                if used == _BLOCK:
                    self._blocks.append([])
                    used = 0
                step = min(size - first, _BLOCK - used)
                self._blocks[-1].append((site, slice(first, first + step), slice(used, used + step)))
                first, used = first + step, used + step

    def smallest(
        self, values: Rows, slopes: Rows, count: int, effective: npt.NDArray[np.bool_], before: float | None = None
    ) -> tuple[Numbers, float | None]:
        """Places of the `count` smallest scores that are not 0, in no order, and the largest of these scores.

        Of equal scores the larger number is taken first: what is left is what a threshold of contributions would keep.
        Where there are fewer, all of them, and None. `values` a and `slopes` ∂Φ/∂a are those of each site `(units,)`;
        `effective` `(N,)` is filled with a ≠ 0. `before`, the largest score that was taken from much the same scores,
        saves time.
        """
        with np.errstate(all="ignore"):
            bound = _bound(values, slopes, count) if before is None else before * _MARGIN
            numbers, scores = self._up_to(bound, values, slopes, effective)
            if numbers.size < count and bound < np.inf:
                numbers, scores = self._up_to(np.inf, values, slopes, effective)
        if numbers.size < count:
            return numbers, None
        threshold = np.partition(scores, count - 1)[count - 1]
        chosen: Numbers = numbers[scores <= threshold]
        if chosen.size > count:
            below, tied = numbers[scores < threshold], numbers[scores == threshold]
            if self._numbers is not None:
                tied = tied[np.argsort(self._numbers(tied))]
            chosen = np.concatenate([below, tied[tied.size - (count - below.size) :]])
        return chosen, float(threshold)

    def _up_to(
        self, bound: Any, values: Rows, slopes: Rows, effective: npt.NDArray[np.bool_]
    ) -> tuple[Numbers, npt.NDArray[Any]]:
        """Numbers, ascending, and values of the scores that are not 0 and not above `bound`."""
        numbers, found, start = [], [], 0
        self.finite = True
        for block in self._blocks:
            size = block[-1][2].stop if block else 0
            scores, small, above = self._scores[:size], self._small[0, :size], self._small[1, :size]
            alive = effective[start : start + size]
            for site, part, place in block:
                value = values[site][part]
                np.multiply(value, slopes[site][part], out=scores[place])
                np.not_equal(value, 0, out=alive[place])
            np.abs(scores, out=scores)
            self.finite &= math.isfinite(scores.max(initial=0))
            np.greater(scores, 0, out=above)
            np.less_equal(scores, bound, out=small)
            few = np.flatnonzero(np.logical_and(small, above, out=small))
            found.append(scores[few])
            numbers.append(np.add(few, start, out=few))
            start += size
        return np.concatenate(numbers), np.concatenate(found)


def _bound(values: Rows, slopes: Rows, count: int) -> Any:
    """A score that a few more than `count` should not exceed; infinity where a sample does not tell."""
    step = sum(value.size for value in values) // _SAMPLE
    if step < 8:
        return np.inf
    sample = np.concatenate([value[::step] * slope[::step] for value, slope in zip(values, slopes, strict=True)])
    sample = np.abs(sample[sample != 0])
    place = int(count / step + 3 * math.sqrt(count / step) + 3)
    return np.partition(sample, place)[place] if place < sample.size else np.inf


def prune_channels(scores: npt.NDArray[np.floating[Any]], count: int, weights: npt.NDArray[np.int64]) -> Numbers:
    """Numbers of the smallest `scores` `(N,)` that are not 0, smallest first, until they weigh `count` or more.

    Of equal scores the larger number is taken first.
    """
    live = np.flatnonzero(scores)[::-1]
    order = live[np.argsort(scores[live], kind="stable")]
    return order[: int(np.searchsorted(np.cumsum(weights[order]), count)) + 1]
