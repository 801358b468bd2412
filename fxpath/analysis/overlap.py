"""How much two pathways of the same sample share.

Overlap is the Jaccard index |A ∧ B| / |A ∨ B|, per sample, network-wide and per site, then averaged over samples; empty
against empty is missing. Beside it stand the chance level of random neurons and the RandomActive null (`null.py`), and
the z-score of the mean against that null.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fxpath.errors import InputError

from .null import Moments, intersection_moments, jaccard_moments
from .reading import BLOCK_BYTES, Floats, Sums, blocks, chosen_keys, reached, share, site_columns, with_network
from .statistics import bootstrap_interval

if TYPE_CHECKING:
    import pandas as pd

    from fxpath.store import Store

Pair = tuple[str, str]


def chance_jaccard(first: npt.ArrayLike, second: npt.ArrayLike) -> Floats:
    """The Jaccard index of two independent random sets of these densities: d₁d₂ / (d₁ + d₂ − d₁d₂); NaN for 0 and 0.

    For equal densities this is d/(2 − d).

    >>> chance_jaccard([0.1, 0.5], [0.1, 1.0]).round(4)
    array([0.0526, 0.5   ])
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    return share(a * b, a + b - a * b)


def overlap(
    store: Store,
    keys: Sequence[str] | str | None = None,
    sparsity: float | str | None = None,
    *,
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
    progress: bool = True,
) -> pd.DataFrame:
    """Long table: for each unordered pair of keys a row for the network (site number −1) and one for each site.

    Without `keys`, the pairs of one sparsity, and those with a pathway that has none (`active`) with all; with `keys`,
    every pair of them. `sparsity` leaves the keys of this sparsity and those without one.

    Columns: first, second, sparsity (NaN where the two differ or have none), site, site_number, neurons; `samples`
    whose overlap is not missing; means over samples of `jaccard`, `density_first`, `density_second` and `chance`;
    `low` and `high`, the bootstrap 95 % interval of a network row's overlap. `null_mean` and `null_sd` are mean and
    standard deviation of the mean overlap of independent RandomActive draws, `z` = (mean J − null_mean) / null_sd over
    the same `null_samples` (those with an active neuron to draw), NaN where the null cannot vary, as against
    `active` itself; `short` is how many neurons both draws lacked, a sample, because too few were active.

    Raises `StoreError` for an unknown key or a store without a sample that is ok, `SparsityError` for a sparsity that
    is not there, `InputError` for fewer than two keys.
    """
    import pandas as pd

    pairs = _pairs(store, keys, sparsity)
    sums = {pair: Sums() for pair in pairs}
    values: dict[Pair, list[Floats]] = {pair: [] for pair in pairs}
    for pair, _, measured in _measured(store, pairs, block_bytes, progress):
        sums[pair].add(measured)
        values[pair].append(measured["jaccard"][:, 0].copy())  # a view would keep the block alive
    sites = site_columns(store)
    tables = []
    for pair in pairs:
        found = sums[pair]
        low, high = bootstrap_interval(np.concatenate(values[pair]), seed=seed)
        rows = len(sites["site"])
        null_samples = found.count("null_jaccard")
        null_sd = share(np.sqrt(found.total("null_variance")), null_samples.astype(np.float64))
        tables.append(
            pd.DataFrame(
                {
                    "first": pair[0],
                    "second": pair[1],
                    "sparsity": _shared(store, pair),
                    **sites,
                    "samples": found.count("jaccard"),
                    **{name: found.mean(name) for name in ("jaccard", "density_first", "density_second", "chance")},
                    "low": [low] + [np.nan] * (rows - 1),
                    "high": [high] + [np.nan] * (rows - 1),
                    "null_mean": found.mean("null_mean"),
                    "null_sd": null_sd,
                    "z": share(found.mean("null_jaccard") - found.mean("null_mean"), null_sd),
                    "null_samples": null_samples,
                    "short": found.mean("short"),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def overlap_by_sample(
    store: Store,
    keys: Sequence[str] | str | None = None,
    sparsity: float | str | None = None,
    *,
    by_site: bool = False,
    block_bytes: int = BLOCK_BYTES,
    progress: bool = True,
) -> pd.DataFrame:
    """One row for each pair and sample that is ok and has both pathways, and with `by_site` for each site too.

    Columns: first, second, sparsity, sample (its row in the store), id, site, site_number, neurons, `intersection`,
    `union`, `jaccard`, `chance`, `null_mean` and `null_sd` of one RandomActive overlap. Raises as `overlap`.
    """
    import pandas as pd

    pairs = _pairs(store, keys, sparsity)
    sites = site_columns(store)
    width = len(sites["site"]) if by_site else 1
    ids = np.asarray(store.ids)
    parts: dict[Pair, list[pd.DataFrame]] = {pair: [] for pair in pairs}
    for pair, samples, measured in _measured(store, pairs, block_bytes, progress):
        flat = {name: block[:, :width].reshape(-1) for name, block in measured.items()}
        parts[pair].append(
            pd.DataFrame(
                {
                    "first": pair[0],
                    "second": pair[1],
                    "sparsity": _shared(store, pair),
                    "sample": np.repeat(samples, width),
                    "id": np.repeat(ids[samples], width),
                    **{name: np.tile(np.asarray(column[:width]), len(samples)) for name, column in sites.items()},
                    "intersection": flat["intersection"].astype(np.int64),
                    "union": flat["union"].astype(np.int64),
                    **{name: flat[name] for name in ("jaccard", "chance", "null_mean")},
                    "null_sd": np.sqrt(flat["null_variance"]),
                }
            )
        )
    return pd.concat([part for pair in pairs for part in parts[pair]], ignore_index=True)


def _pairs(store: Store, keys: Sequence[str] | str | None, sparsity: float | str | None) -> list[Pair]:
    chosen = chosen_keys(store, keys, sparsity)
    pairs = list(combinations(chosen, 2))
    if keys is None:
        levels = {key: store.sparsity(key) for key in chosen}
        pairs = [(a, b) for a, b in pairs if levels[a] == levels[b] or None in (levels[a], levels[b])]
    if not pairs:
        raise InputError(
            f"overlap: expected at least two pathways of one sparsity to compare, "
            f"found {', '.join(chosen) or 'none'} in {store.path}; "
            f"it holds {', '.join(store.keys) or 'none'}"
        )
    return pairs


def _shared(store: Store, pair: Pair) -> float:
    levels = {level for key in pair if (level := store.sparsity(key)) is not None}
    return levels.pop() if len(levels) == 1 else float("nan")


def _measured(
    store: Store, pairs: Sequence[Pair], block_bytes: int, progress: bool
) -> Iterator[tuple[Pair, npt.NDArray[np.int64], dict[str, Floats]]]:
    """Pair, rows of its usable samples `(m,)` and arrays `(m, 1 + sites)`, block after block."""
    index = store.index
    keys = list(dict.fromkeys(key for pair in pairs for key in pair))
    each = max(block_bytes // len(keys), min(block_bytes, 1))  # one sample at least, and 0 is refused
    for rows, ok in blocks(store, "overlap", block_bytes=each, progress=progress):
        active, of_site = index.count_by_site(store.active(rows)), store.neurons(rows)
        masks = {key: store.packed(key, rows) for key in keys}
        counts = {key: index.count_by_site(mask) for key, mask in masks.items()}
        usable = {key: ok & reached(store, key, rows) for key in keys}
        for pair in pairs:
            one, two = pair
            use = usable[one] & usable[two]
            shared = with_network(index.count_by_site(masks[one] & masks[two])[use])
            a, b, neurons = (with_network(each[use]) for each in (counts[one], counts[two], of_site))
            jaccard = share(shared, a + b - shared)
            null, short = _null(counts[one][use], counts[two][use], active[use])
            both = ~np.isnan(jaccard) & ~np.isnan(null.mean)
            yield (
                pair,
                rows.start + np.flatnonzero(use),
                {
                    "intersection": shared,
                    "union": a + b - shared,
                    "jaccard": jaccard,
                    "density_first": share(a, neurons),
                    "density_second": share(b, neurons),
                    "chance": chance_jaccard(share(a, neurons), share(b, neurons)),
                    "null_jaccard": np.where(both, jaccard, np.nan),
                    "null_mean": np.where(both, null.mean, np.nan),
                    "null_variance": np.where(both, null.variance, np.nan),
                    "short": short,
                },
            )


def _null(
    first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], active: npt.NDArray[np.int64]
) -> tuple[Moments, Floats]:
    """Moments of the RandomActive overlap and the neurons short of a match, `(m, 1 + sites)`."""
    drawn = np.minimum(first, active), np.minimum(second, active)
    intersection = intersection_moments(*drawn, active)
    everywhere = Moments(with_network(intersection.mean), with_network(intersection.variance))
    total = drawn[0] + drawn[1]
    return jaccard_moments(with_network(total).astype(np.int64), everywhere), with_network(first + second - total)
