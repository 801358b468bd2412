"""One line a pathway: what `fxpath analyze` prints first."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .dead import dead_share
from .reading import BLOCK_BYTES, Floats, chosen_keys, has, reached, share

if TYPE_CHECKING:
    import pandas as pd

    from fxpath.store import Store

_DEAD = ("density", "kept", "dead_share", "switched_on_share", "still_dead_share", "base_rate", "low", "high")


def summary(
    store: Store,
    dead: pd.DataFrame | None = None,
    *,
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
    progress: bool = True,
) -> pd.DataFrame:
    """One row for each pathway key, in file order. `dead`, the table of `dead_share`, is computed where not given.

    Columns: key, selector, parameters (JSON), sparsity; `samples` that are ok and have the pathway, `missing` those
    that are ok and do not; from `dead_share` the means of density and kept neurons, the dead share, its two parts, the
    base rate and the interval `low`, `high`; and of the masked network `response_share` (mean over samples of its
    response / the original's), `class_kept` (share of samples with the original's class) and `dropped_share` (mean
    response without the pathway / the original's). A column that the store lacks is NaN. Raises as `dead_share`.
    """
    import pandas as pd

    if dead is None:
        dead = dead_share(store, seed=seed, block_bytes=block_bytes, progress=progress)
    network = dead[dead["site_number"] < 0].set_index("key")
    ok = store.ok
    original = np.asarray(store.samples()["response"], dtype=np.float64)
    rows: list[dict[str, Any]] = []
    for key in chosen_keys(store, None):
        use = ok & reached(store, key, slice(0, len(store)))
        rows.append(
            {
                "key": key,
                "selector": store.selector(key),
                "parameters": json.dumps(store.parameters(key), sort_keys=True),
                "sparsity": network.loc[key, "sparsity"],
                "samples": int(use.sum()),
                "missing": int(ok.sum() - use.sum()),
                **{name: network.loc[key, name] for name in _DEAD},
                "response_share": _mean(share(_column(store, key, "response"), original)[use]),
                "class_kept": _mean(_column(store, key, "same_class")[use]),
                "dropped_share": _mean(share(_column(store, key, "dropped_response"), original)[use]),
            }
        )
    return pd.DataFrame(rows)


def _column(store: Store, key: str, name: str) -> Floats:
    if not has(store, key, name):
        return np.full(len(store), np.nan)
    return np.asarray(store.column(key, name), dtype=np.float64)


def _mean(values: npt.NDArray[np.float64]) -> float:
    found = values[~np.isnan(values)]
    return float(found.mean()) if found.size else float("nan")
