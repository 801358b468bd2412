"""One line a pathway: what `fxpath analyze` prints first."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fxpath.keys import PathwayKey

from .dead import dead_share
from .reading import BLOCK_BYTES, Floats, chosen_keys, has, reached, share

if TYPE_CHECKING:
    import pandas as pd

    from fxpath.store import Store

_DIAGNOSED = "diagnostics/ablation_correlation"
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
    response without the pathway / the original's); and `ablation_correlation`, which is the selector's and the same at
    all its sparsities (see `ablation_correlations`). A column that the store lacks is NaN. Raises as `dead_share`.
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
                "ablation_correlation": _ablation_correlation(store, key, ok),
            }
        )
    return pd.DataFrame(rows)


def ablation_correlations(store: Store) -> dict[str, float]:
    """How well the scores of each family rank neurons: mean Spearman correlation with ablation over ok samples.

    That of |score| with |Φ(x) − Φ(x; a_j ← 0)|, network-wide over the neurons that a job with `diagnose` ablated.
    Samples for which it is not defined are left out, and so are families without it.
    """
    ok = store.ok
    first = {PathwayKey.parse(key).family: key for key in reversed(store.keys)}
    found = {name: _ablation_correlation(store, first[name], ok) for name in store.families}
    return {name: mean for name, mean in found.items() if not math.isnan(mean)}


def _ablation_correlation(store: Store, key: str, ok: npt.NDArray[np.bool_]) -> float:
    if not has(store, key, _DIAGNOSED):
        return float("nan")
    values = store.column(key, _DIAGNOSED)
    plain = values.ndim == 1 and values.dtype.kind == "f"  # diagnostics of that name may be a selector's own
    return _mean(values.astype(np.float64)[ok]) if plain else float("nan")


def _column(store: Store, key: str, name: str) -> Floats:
    if not has(store, key, name):
        return np.full(len(store), np.nan)
    return np.asarray(store.column(key, name), dtype=np.float64)


def _mean(values: npt.NDArray[np.float64]) -> float:
    found = values[~np.isnan(values)]
    return float(found.mean()) if found.size else float("nan")
