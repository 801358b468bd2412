"""What every analysis needs of a store: which keys, which samples, block after block, and sums that do not grow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fxpath.errors import InputError, SparsityError, StoreError, unknown
from fxpath.keys import exact_sparsity

if TYPE_CHECKING:
    from fxpath.store import Store

Floats = npt.NDArray[np.float64]
BLOCK_BYTES = 16 << 20  # of one packed pathway; some five of them are held at once
NETWORK = "network"  # the row of a table that speaks of all sites; its site number is −1


def chosen_keys(store: Store, keys: Sequence[str] | str | None, sparsity: float | str | None = None) -> tuple[str, ...]:
    """The keys to look at, in the order given and each once: all of the store when None.

    With `sparsity` only those of this sparsity and those without one. Raises `StoreError` for a key that is not
    there and `SparsityError` for a sparsity that none of them has, with the nearest.
    """
    asked = store.keys if keys is None else (keys,) if isinstance(keys, str) else tuple(dict.fromkeys(keys))
    if not asked:
        raise StoreError(f"{store.path}: no pathway to analyse; the store holds {', '.join(store.keys) or 'none'}")
    for key in asked:
        if key not in store.keys:
            raise StoreError(f"{store.path}: {unknown('pathway', key, store.keys)}")
    if sparsity is None:
        return asked
    wanted = float(exact_sparsity(sparsity))
    held = sorted({found for key in asked if (found := store.sparsity(key)) is not None})
    if wanted not in held:
        near = f"; nearest: {min(held, key=lambda found: abs(found - wanted))}" if held else ""
        raise SparsityError(
            f"{store.path}: no pathway has sparsity {wanted}{near} (all: {', '.join(map(str, held)) or 'none'})"
        )
    return tuple(key for key in asked if store.sparsity(key) in (None, wanted))


def has(store: Store, key: str, name: str) -> bool:
    """Whether the store holds this column of a pathway; raises `StoreError` where the pathway's tables are damaged."""
    nothing = slice(0, 0)
    store.packed(key, nothing)  # checks all tables, so that what is left to go wrong is the name
    try:
        store.column(key, name, nothing)
    except StoreError:
        return False
    return True


def reached(store: Store, key: str, rows: slice) -> npt.NDArray[np.bool_]:
    """`(m,)`: the samples whose pathway `key` was reached; of one that was not the store says why it is missing."""
    if has(store, key, "missing"):
        return np.asarray(store.column(key, "missing", rows) == "")
    return np.ones(len(range(*rows.indices(len(store)))), dtype=np.bool_)


def live(store: Store, key: str, rows: slice) -> npt.NDArray[np.int64] | None:
    """`(m, sites)`: neurons switched on in the masked network though dead in the original; None if not stored."""
    if not has(store, key, "live"):
        return None
    counts: npt.NDArray[np.int64] = store.column(key, "live", rows).astype(np.int64)
    return counts


def blocks(
    store: Store, what: str, *, block_bytes: int = BLOCK_BYTES, progress: bool = True
) -> Iterator[tuple[slice, npt.NDArray[np.bool_]]]:
    """Slices of samples and which of them are ok `(m,)`; a bar on stderr once it takes over two seconds.

    Raises `StoreError` when no sample of the store is ok, with the reasons.
    """
    ok = store.ok
    if not ok.any():
        reasons = Counter(store.samples()["status"]).most_common(5)
        said = "; ".join(f"{count} × {reason}" for reason, count in reasons) or "it holds no sample"
        raise StoreError(f"{what}: no sample of {store.path} is ok ({said}); compute the store again")
    if block_bytes < 1:
        raise InputError(f"{what}: expected block_bytes of at least 1, found {block_bytes}")
    from tqdm.auto import tqdm

    with tqdm(total=len(ok), desc=what, unit=" samples", delay=2, disable=not progress) as bar:
        for rows in store.blocks(block_bytes):
            yield rows, ok[rows]
            bar.update(rows.stop - rows.start)


def with_network(counts: npt.NDArray[Any]) -> Floats:
    """Counts per site `(m, sites)` → `(m, 1 + sites)`: the sum over sites first."""
    found: Floats = np.concatenate([counts.sum(axis=1, keepdims=True), counts], axis=1, dtype=np.float64)
    return found


def share(part: Floats, whole: Floats) -> Floats:
    """part / whole, and NaN, missing, where the whole is 0."""
    part, whole = np.broadcast_arrays(part, whole)
    quotient: Floats = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)
    return quotient


def site_columns(store: Store) -> dict[str, list[Any]]:
    """The columns that say what a row speaks of: the network first, then each site in order."""
    sites = store.index.sites
    return {
        "site": [NETWORK, *(site.name for site in sites)],
        "site_number": list(range(-1, len(sites))),
        "neurons": [store.index.size, *(site.neurons for site in sites)],
    }


class Sums:
    """Sums and counts over samples of named arrays `(m, 1 + sites)`, NaN left out, block after block."""

    def __init__(self) -> None:
        self._totals: dict[str, Floats] = {}
        self._counts: dict[str, npt.NDArray[np.int64]] = {}

    def add(self, values: Mapping[str, Floats]) -> None:
        """Take in another block."""
        for name, block in values.items():
            self._totals[name] = self._totals.get(name, 0.0) + np.nansum(block, axis=0)
            self._counts[name] = self._counts.get(name, 0) + np.count_nonzero(~np.isnan(block), axis=0)

    def count(self, name: str) -> npt.NDArray[np.int64]:
        """How many samples entered, for each column."""
        return self._counts[name]

    def total(self, name: str) -> Floats:
        """The sum."""
        return self._totals[name]

    def mean(self, name: str) -> Floats:
        """The mean over samples; NaN where none entered."""
        return share(self._totals[name], self._counts[name].astype(np.float64))
