"""RandomActive, the null of every overlap: random *active* neurons, matched per site in size.

For a stored pathway e of a sample, RandomActive keeps at every site min(|e| there, active neurons there) neurons, drawn
without replacement from the sample's stored activation pattern. It is not a selector: it needs no network. Two such
draws A and B at a site with M active neurons, of which they keep a and b, share I ~ hypergeometric(M, a, b) neurons, so
what is expected of their overlap needs no draws at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fxpath.errors import InputError, StoreError
from fxpath.matching import draw_active

from .reading import chosen_keys, reached

if TYPE_CHECKING:
    from fxpath.store import Store

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.integer[Any]]


class Moments(NamedTuple):
    """Mean and variance of a random number, arrays of one shape."""

    mean: Floats
    variance: Floats


def intersection_moments(first: Counts, second: Counts, active: Counts) -> Moments:
    """Exact moments of |A ∧ B| for independent draws of `first` and `second` out of `active` neurons, elementwise.

    Hypergeometric: mean a·b/M, variance a·b·(M−a)·(M−b) / (M²·(M−1)). Sites are independent, so both are summed over
    sites for the whole network. Raises `InputError` where more are drawn than are active.

    >>> moments = intersection_moments(np.array([3]), np.array([4]), np.array([6]))
    >>> moments.mean, moments.variance
    (array([2.]), array([0.4]))
    """
    a, b, m = (np.asarray(count, dtype=np.float64) for count in (first, second, active))
    if bool(np.any((a > m) | (b > m) | (a < 0) | (b < 0))):
        raise InputError(
            "intersection moments: more neurons are drawn than are active; draw min(kept, active) of each site"
        )
    mean = np.divide(a * b, m, out=np.zeros_like(m + a + b), where=m > 0)
    variance = np.divide(
        mean * (m - a) * (m - b), m * (m - 1), out=np.zeros_like(mean), where=np.broadcast_to(m > 1, mean.shape)
    )
    return Moments(mean, variance)


def jaccard_moments(total: Counts, intersection: Moments) -> Moments:
    """Moments of the Jaccard index J = I / (S − I), given S = |A| + |B| and the moments of I = |A ∧ B|, elementwise.

    Delta method of second order about μ = E I: E J ≈ f(μ) + f''(μ)·σ²/2 and Var J ≈ f'(μ)²·σ² + f''(μ)²·σ⁴/2, with
    f' = S/(S − μ)² and f'' = 2S/(S − μ)³; exact where the intersection cannot vary. NaN where S = 0 (empty against
    empty). Where draws share dozens of neurons it is within a few per cent of the exact law; where they share less than
    one, the deviation is too small (two of ten each: 18 %) and a z-score of that site too large by as much.

    >>> float(jaccard_moments(np.array([4]), Moments(np.array([1.0]), np.array([0.0]))).mean[0])
    0.3333333333333333
    """
    mu, spread = intersection.mean, intersection.variance
    s = np.asarray(total, dtype=np.float64)
    union = np.where(s > 0, s - mu, np.nan)  # at least S/2
    slope, bend = s / union**2, 2 * s / union**3
    return Moments(mu / union + bend * spread / 2, slope**2 * spread + (bend * spread) ** 2 / 2)


def random_active(store: Store, key: str, sample: int | str, seed: int = 0) -> npt.NDArray[np.uint8]:
    """One RandomActive draw for the pathway `key` of a sample: packed bits `(nbytes,)`.

    Where the pathway keeps more neurons of a site than are active, all active ones are taken; `shortfall` says how
    many are missing. The draw depends on `seed`, the sample's id, the key and the site alone, so order and neighbours
    change nothing, and draws for two keys are independent of each other. Raises `StoreError` for a key or sample that
    is not there, was not reached or failed, `InputError` for a negative seed.
    """
    mask, active, row = _pair(store, key, sample)
    return draw_active(store.index, mask, active, key, str(store.ids[row]), seed)


def shortfall(store: Store, key: str, sample: int | str) -> npt.NDArray[np.int64]:
    """How many neurons a RandomActive draw lacks at each site `(sites,)`: max(kept − active, 0). Raises as the draw."""
    mask, active, _ = _pair(store, key, sample)
    short: npt.NDArray[np.int64] = np.maximum(store.index.count_by_site(mask[None])[0] - _count(store, active), 0)
    return short


def _count(store: Store, packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    counts: npt.NDArray[np.int64] = store.index.count_by_site(packed[None])[0]
    return counts


def _pair(store: Store, key: str, sample: int | str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], int]:
    """The packed pathway and activation pattern of one sample that can be used, and its row."""
    (key,) = chosen_keys(store, key)
    row = store.row(sample)
    name = str(store.ids[row])
    rows = slice(row, row + 1)
    if not store.ok[row]:
        raise StoreError(f"{store.path}: sample {name!r} failed and has no activation pattern to draw from")
    if not reached(store, key, rows)[0]:
        raise StoreError(f"{store.path}: {key} was not reached for sample {name!r}; there is no size to match")
    return store.packed(key, rows)[0], store.active(rows)[0], row
