"""The share of a pathway's neurons that are dead in the original network.

Dead means: not in the stored activation pattern of the sample. A dead neuron of a pathway is *switched on* when it is
live in the masked network (the store's column `live`) and *still dead* otherwise. Every share is taken per sample and
then averaged; 0/0 is missing, not 0. Samples that failed, or for which the pathway was not reached, do not enter.
At channel granularity neurons are channels throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fxpath.errors import StoreError

from .reading import BLOCK_BYTES, Floats, Sums, blocks, chosen_keys, live, reached, share, site_columns, with_network
from .statistics import bootstrap_interval

if TYPE_CHECKING:
    import pandas as pd

    from fxpath.store import Store

_SHARES = ("density", "dead_share", "switched_on_share", "still_dead_share", "base_rate")


def dead_share(
    store: Store,
    keys: Sequence[str] | str | None = None,
    *,
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
    progress: bool = True,
) -> pd.DataFrame:
    """Long table: for each pathway key a row for the network (site number −1) and one for each site.

    Columns: key, selector, sparsity, site, site_number, neurons; `samples` whose share is not missing; means over
    samples of `kept` (neurons of the pathway), `density` (kept / neurons), `dead_share` (dead kept / kept),
    `switched_on_share` and `still_dead_share` (its two parts; NaN in a store without `live`) and `base_rate` (dead
    neurons / neurons); `low` and `high`, the bootstrap 95 % interval of a network row's dead share. `null_mean` and
    `null_sd` are mean and standard deviation of the mean dead share of random neurons, as many of each site as the
    pathway has, and `z` = (mean dead share − null_mean) / null_sd; of RandomActive neurons none is dead. Kept, density
    and base rate are over all samples with this pathway, empty ones too; where padding tokens are excluded they are
    shares of the sample's own neurons, while the column neurons counts all. Memory does not grow with samples.

    Raises `StoreError` for an unknown key, for a store without a sample that is ok, and where `live` counts more
    neurons than are dead.
    """
    import pandas as pd

    keys = chosen_keys(store, keys)
    sums = {key: Sums() for key in keys}
    shares: dict[str, list[Floats]] = {key: [] for key in keys}
    for key, _, measured in _measured(store, keys, block_bytes, progress):
        sums[key].add(measured)
        shares[key].append(measured["dead_share"][:, 0].copy())  # a view would keep the block alive
    sites = site_columns(store)
    tables = []
    for key in keys:
        found = sums[key]
        low, high = bootstrap_interval(np.concatenate(shares[key]), seed=seed)
        rows = len(sites["site"])
        null_sd = share(np.sqrt(found.total("null_variance")), found.count("dead_share").astype(np.float64))
        tables.append(
            pd.DataFrame(
                {
                    "key": key,
                    "selector": store.selector(key),
                    "sparsity": _number(store.sparsity(key)),
                    **sites,
                    "samples": found.count("dead_share"),
                    "kept": found.mean("kept"),
                    **{name: found.mean(name) for name in _SHARES},
                    "low": [low] + [np.nan] * (rows - 1),
                    "high": [high] + [np.nan] * (rows - 1),
                    "null_mean": found.mean("null_mean"),
                    "null_sd": null_sd,
                    "z": share(found.mean("dead_share") - found.mean("null_mean"), null_sd),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def dead_by_sample(
    store: Store,
    keys: Sequence[str] | str | None = None,
    *,
    by_site: bool = False,
    block_bytes: int = BLOCK_BYTES,
    progress: bool = True,
) -> pd.DataFrame:
    """One row for each pathway key and sample that is ok and reached, and with `by_site` for each site too.

    Columns: key, selector, sparsity, sample (its row in the store), id, site, site_number, neurons, `kept`, `dead`
    (kept neurons that are dead), `density`, `dead_share`, `switched_on_share`, `still_dead_share`, `base_rate`.
    Raises as `dead_share`.
    """
    import pandas as pd

    keys = chosen_keys(store, keys)
    sites = site_columns(store)
    width = len(sites["site"]) if by_site else 1
    ids = np.asarray(store.ids)
    parts: dict[str, list[pd.DataFrame]] = {key: [] for key in keys}
    for key, samples, measured in _measured(store, keys, block_bytes, progress):
        parts[key].append(
            pd.DataFrame(
                {
                    "key": key,
                    "selector": store.selector(key),
                    "sparsity": _number(store.sparsity(key)),
                    "sample": np.repeat(samples, width),
                    "id": np.repeat(ids[samples], width),
                    **{name: np.tile(np.asarray(values[:width]), len(samples)) for name, values in sites.items()},
                    **{
                        name: measured[name][:, :width]
                        .reshape(-1)
                        .astype(np.int64 if name in ("kept", "dead") else float)
                        for name in ("kept", "dead", *_SHARES)
                    },
                }
            )
        )
    return pd.concat([part for key in keys for part in parts[key]], ignore_index=True)


def _measured(
    store: Store, keys: Sequence[str], block_bytes: int, progress: bool
) -> Iterator[tuple[str, npt.NDArray[np.int64], dict[str, Floats]]]:
    """Key, rows of its usable samples `(m,)` and arrays `(m, 1 + sites)`, block after block."""
    index = store.index
    for rows, ok in blocks(store, "dead share", block_bytes=block_bytes, progress=progress):
        all_of_site = store.neurons(rows).astype(np.float64)
        active = store.active(rows)
        dead_at_all = with_network(all_of_site) - with_network(index.count_by_site(active))
        for key in keys:
            use = ok & reached(store, key, rows)
            of_site = all_of_site[use]
            neurons = with_network(of_site)
            mask = store.packed(key, rows)
            kept = with_network(index.count_by_site(mask)[use])
            dead = kept - with_network(index.count_by_site(mask & active)[use])
            measured = {
                "kept": kept,
                "dead": dead,
                "density": share(kept, neurons),
                "dead_share": share(dead, kept),
                "base_rate": share(dead_at_all[use], neurons),
            }
            rate, own = (dead_at_all[use] / neurons)[:, 1:], kept[:, 1:]
            spread = own * rate * (1 - rate) * share(of_site - own, np.maximum(of_site - 1, 1))
            measured["null_mean"] = share(with_network(own * rate), kept)
            measured["null_variance"] = share(with_network(spread), kept**2)
            switched = live(store, key, rows)
            on = np.full_like(kept, np.nan) if switched is None else with_network(switched[use])
            if bool(np.any(on > dead)):
                raise StoreError(
                    f"{store.path}: {key} counts more switched-on neurons (live) than it keeps dead ones at some site; "
                    "mask and live do not belong together: compute the store again"
                )
            measured["switched_on_share"] = share(on, kept)
            measured["still_dead_share"] = share(dead - on, kept)
            yield key, rows.start + np.flatnonzero(use), measured


def _number(sparsity: float | None) -> float:
    return float("nan") if sparsity is None else sparsity
