"""What selectors report beside their pathways, as means over samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .reading import Floats, chosen_keys
from .statistics import bootstrap_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from fxpath.store import Store

_GROUP = "diagnostics/"
_BY_SITE = "diagnostics/completeness"


def diagnostics(store: Store, keys: Sequence[str] | str | None = None, *, seed: int = 0) -> pd.DataFrame:
    """Long table: one row for each pathway key and each diagnostic of one value a sample, or of one a sample and site.

    The latter are completeness errors and what is called …_by_site.
    Columns: key, selector, sparsity, diagnostic; `samples` that are ok and have a value; `mean`, `smallest` and
    `largest` of these (of yes and no the mean is the share of yes; of one value a site a sample's is the mean over its
    sites), and the bootstrap 95 % interval of the mean, `low` and `high`. NaN and negative whole numbers are missing.
    Longer series, such as loss curves, are left to `Store.column`. Raises `StoreError` for an unknown key.
    """
    import pandas as pd

    rows = []
    for key in chosen_keys(store, keys):
        for name in sorted(name for name in store.columns(key) if name.startswith(_GROUP)):
            values = _by_sample(store.column(key, name), name.startswith(_BY_SITE) or name.endswith("_by_site"))
            if values is None:
                continue
            found = values[store.ok & ~np.isnan(values)]
            low, high = bootstrap_interval(found, seed=seed)
            rows.append(
                {
                    "key": key,
                    "selector": store.selector(key),
                    "sparsity": store.sparsity(key),
                    "diagnostic": name.removeprefix(_GROUP),
                    "samples": found.size,
                    "mean": found.mean() if found.size else np.nan,
                    "smallest": found.min(initial=np.inf) if found.size else np.nan,
                    "largest": found.max(initial=-np.inf) if found.size else np.nan,
                    "low": low,
                    "high": high,
                }
            )
    columns = ["key", "selector", "sparsity", "diagnostic", "samples", "mean", "smallest", "largest", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _by_sample(column: npt.NDArray[np.generic], by_site: bool) -> Floats | None:
    """One number a sample, NaN where it is missing; None for what is no such column."""
    if column.dtype.kind not in "fiub" or column.ndim != (2 if by_site else 1):
        return None
    values = column.astype(np.float64)
    if column.dtype.kind == "i":
        values[values < 0] = np.nan
    if values.ndim == 2:
        known = (~np.isnan(values)).sum(axis=1)
        values = np.divide(np.nansum(values, axis=1), known, out=np.full(len(values), np.nan), where=known > 0)
    return values
