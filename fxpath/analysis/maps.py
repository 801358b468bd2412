"""What attribution maps are like: how concentrated, how many pixels are zero or tied, and how two methods differ.

A pixel's score is |value| throughout, the size of what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from fxpath.errors import InputError, StoreError, unknown

from .reading import Floats, share
from .statistics import bootstrap_interval, holm, paired_test

if TYPE_CHECKING:
    import pandas as pd

BLOCK_BYTES = 64 << 20
_HELD = 40  # bytes a pixel and key, at most: the map, its size, its ranks, and what sorting them takes


class MapStore(Protocol):
    """What is read of a store here: n samples and, for each map key, a signed map `(H, W)` of each."""

    @property
    def path(self) -> str: ...
    @property
    def map_keys(self) -> tuple[str, ...]: ...
    @property
    def ids(self) -> npt.NDArray[np.str_]: ...
    @property
    def ok(self) -> npt.NDArray[np.bool_]: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    def row(self, sample: int | str) -> int: ...
    def samples(self) -> pd.DataFrame: ...
    def thumbnail(self, sample: int | str) -> npt.NDArray[np.uint8] | None: ...
    def maps(self, key: str, rows: slice | None = None) -> npt.NDArray[np.float32]: ...
    def map_missing(self, key: str) -> npt.NDArray[np.str_]: ...


def gini(values: npt.ArrayLike) -> Floats:
    """Gini index of |values| `(…, n)` along the last axis `(…)`: 0 where all are equal, (n − 1)/n where one has it all.

    G = Σᵢ (2i − n − 1)·vᵢ / (n·Σᵢ vᵢ) for v₁ ≤ … ≤ vₙ: the mean difference of two pixels (drawn with replacement) over
    twice the mean. A factor changes nothing. NaN where all values are 0 and where one is not finite.
    Raises `InputError` where there is no value.

    >>> gini([[1, 1, 1, 1], [0, 0, -3, 0], [0, 0, 1, 1]])
    array([0.  , 0.75, 0.5 ])
    """
    found = np.abs(np.asarray(values, dtype=np.float64))
    if found.ndim == 0 or not found.shape[-1]:
        raise InputError(f"gini: expected values (…, n) with n of at least 1, found the shape {found.shape}")
    return _gini(np.sort(found, axis=-1))


def _gini(ascending: Floats) -> Floats:
    count = ascending.shape[-1]
    largest = ascending[..., -1:]  # NaN, too, is sorted to the end
    scaled = share(ascending, np.where(np.isfinite(largest), largest, 0.0))  # so that sums neither overflow nor vanish
    weighted = scaled * (2.0 * np.arange(1, count + 1) - count - 1)  # no product of matrices: its bits depend on m
    return np.asarray(weighted.sum(axis=-1) / (count * scaled.sum(axis=-1)))


def map_statistics(
    store: MapStore,
    keys: Sequence[str] | str | None = None,
    by_sample: pd.DataFrame | None = None,
    *,
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
    progress: bool = True,
) -> pd.DataFrame:
    """One row for each map key, in the order given or that of the store: how concentrated its maps are.

    Columns: key; `samples` that are ok and have the map, `missing` those that are ok and do not; means over samples of
    the index `gini`, with its bootstrap 95 % interval `low`, `high`, of the share of pixels that are exactly 0,
    `zero_share`, and of those whose |value| another pixel has, too, `tied_share` (zeros among them); `all_zero`, how
    many maps are 0 everywhere, which have no Gini index. `by_sample`, the table of `map_statistics_by_sample`, is
    computed where not given. Raises `StoreError` for an unknown key and for a store without maps or samples.
    """
    import pandas as pd

    chosen = chosen_maps(store, keys)
    if by_sample is None:
        by_sample = map_statistics_by_sample(store, chosen, block_bytes=block_bytes, progress=progress)
    rows = []
    for key in chosen:
        found = by_sample[by_sample["key"] == key]
        low, high = bootstrap_interval(found["gini"], seed=seed)
        rows.append(
            {
                "key": key,
                "samples": len(found),
                "missing": int(store.ok.sum()) - len(found),
                "gini": found["gini"].mean(),
                "low": low,
                "high": high,
                "zero_share": found["zero_share"].mean(),
                "tied_share": found["tied_share"].mean(),
                "all_zero": int((found["zero_share"] == 1).sum()),
            }
        )
    return pd.DataFrame(rows)


def map_statistics_by_sample(
    store: MapStore,
    keys: Sequence[str] | str | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
    progress: bool = True,
) -> pd.DataFrame:
    """One row for each map key and each sample that is ok and has the map.

    Columns: key, sample (its row in the store), id, gini, zero_share, tied_share. Raises as `map_statistics`.
    """
    import pandas as pd

    tables = []
    for key in chosen_maps(store, keys):
        for samples, (sizes,) in _sizes(store, (key,), block_bytes, progress):
            sizes.sort(axis=-1)
            equal = np.zeros((len(sizes), sizes.shape[1] + 1), dtype=np.bool_)  # each with the one before it
            equal[:, 1:-1] = sizes[:, 1:] == sizes[:, :-1]
            tables.append(
                pd.DataFrame(
                    {
                        "key": key,
                        "sample": samples,
                        "id": store.ids[samples],
                        "gini": _gini(sizes),
                        "zero_share": (sizes == 0).mean(axis=1),
                        "tied_share": (equal[:, 1:] | equal[:, :-1]).mean(axis=1),
                    }
                )
            )
    return pd.concat(tables, ignore_index=True)


def map_differences(
    store: MapStore,
    first: str,
    second: Sequence[str] | str | None = None,
    *,
    seed: int = 0,
    resamples: int = 9999,
    block_bytes: int = BLOCK_BYTES,
    progress: bool = True,
) -> pd.DataFrame:
    """How the maps of `first` differ from those of `second` (all other keys when None) on the samples that have both.

    One row for each second key: first, second; `samples` that have both maps and a Gini index of both, the means
    `gini_first`, `gini_second` and their `difference` (first − second) with its bootstrap 95 % interval `low`, `high`,
    `p` of the paired permutation test of it (`resamples` random permutations, all of them when there are no more than
    that) and `p_holm`, corrected for the number of rows; `correlated` samples of which neither map is constant, their
    mean Spearman correlation over pixels `spearman`, and its interval `spearman_low`, `spearman_high`. Raises as
    `map_statistics`, and `InputError` where maps of the two have different shapes.
    """
    import pandas as pd

    chosen_maps(store, first)
    others = [key for key in chosen_maps(store, second) if key != first]
    if not others:
        raise InputError(f"map differences: expected another map than {first} to compare it with, found none")
    rows: list[dict[str, Any]] = []
    for other in others:
        parts = [_compared(*sizes) for _, sizes in _sizes(store, (first, other), block_bytes, progress)]
        one, two, correlation = np.concatenate(parts, axis=1)
        both = ~np.isnan(one) & ~np.isnan(two)
        one, two, correlation = one[both], two[both], correlation[~np.isnan(correlation)]
        rows.append(
            {
                "first": first,
                "second": other,
                "samples": one.size,
                "gini_first": _mean(one),
                "gini_second": _mean(two),
                "difference": _mean(one - two),
                **dict(zip(("low", "high"), bootstrap_interval(one - two, seed=seed), strict=True)),
                "p": paired_test(one, two, resamples=resamples, seed=seed),
                "p_holm": np.nan,
                "correlated": correlation.size,
                "spearman": _mean(correlation),
                **dict(zip(("spearman_low", "spearman_high"), bootstrap_interval(correlation, seed=seed), strict=True)),
            }
        )
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"])
    return table


def chosen_maps(store: MapStore, keys: Sequence[str] | str | None) -> tuple[str, ...]:
    """The map keys to look at, each once, all when None; raises `StoreError` for one that is not there."""
    asked = store.map_keys if keys is None else (keys,) if isinstance(keys, str) else tuple(dict.fromkeys(keys))
    if not asked:
        raise StoreError(f"{store.path}: no attribution map to look at; the store holds {len(store.map_keys)}")
    for key in asked:
        if key not in store.map_keys:
            raise StoreError(f"{store.path}: {unknown('map', key, store.map_keys)}")
    if not store.ok.any():
        raise StoreError(f"{store.path}: no sample is ok, so there is no attribution map; compute the store again")
    return asked


def _sizes(
    store: MapStore, keys: tuple[str, ...], block_bytes: int, progress: bool
) -> Iterator[tuple[npt.NDArray[np.int64], list[Floats]]]:
    """Rows of the samples that are ok and have all maps `(m,)`, and |maps| `(m, pixels)` of each key, in blocks."""
    if block_bytes < 1:
        raise InputError(f"maps: expected block_bytes of at least 1, found {block_bytes}")
    from tqdm.auto import tqdm

    shapes = [store.maps(key, slice(0, 1)).shape[1:] for key in keys]
    if len(set(shapes)) > 1:
        said = ", ".join(f"{key}: {shape}" for key, shape in zip(keys, shapes, strict=True))
        raise InputError(f"{store.path}: expected maps of one shape to compare them, found {said}")
    ok = store.ok
    step = max(1, block_bytes // (_HELD * len(keys) * int(np.prod(shapes[0]))))
    with tqdm(total=len(ok), desc=" – ".join(keys), unit=" samples", delay=2, disable=not progress) as bar:
        for start in range(0, len(ok), step):
            rows = slice(start, min(start + step, len(ok)))
            maps = [store.maps(key, rows).reshape(rows.stop - start, -1) for key in keys]
            use = ok[rows] & np.all([np.isfinite(each).all(axis=1) for each in maps], axis=0)
            yield start + np.flatnonzero(use), [np.abs(each[use]).astype(np.float64) for each in maps]
            bar.update(rows.stop - start)


def _compared(first: Floats, second: Floats) -> Floats:
    """Gini index of the first, of the second, and their Spearman correlation, `(3, m)`."""
    from scipy import stats

    ranks = [stats.rankdata(each, axis=-1) if len(each) else each for each in (first, second)]
    one, two = (each - each.mean(axis=-1, keepdims=True) for each in ranks)
    scale = np.sqrt(np.square(one).sum(axis=-1) * np.square(two).sum(axis=-1))
    return np.stack([gini(first), gini(second), share((one * two).sum(axis=-1), scale)])


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else float("nan")
