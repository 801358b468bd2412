"""Local linearity over photos: what `fxpath.linear_study` measured, as means with intervals for every pathway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .statistics import bootstrap_interval

if TYPE_CHECKING:
    import pandas as pd


def linearity_summary(
    rays: pd.DataFrame, deviations: pd.DataFrame, stability: pd.DataFrame, *, seed: int = 0
) -> pd.DataFrame:
    """One row for each key and share of ‖x‖₂, from the tables of `LinearStudy`; intervals are 95 % bootstrap.

    `radius`: over photos the mean of a photo's median radius over rays, as a share of ‖x‖₂, with `radius_low` and
    `radius_high`; `tied` on-path windows without a strict winner a photo, `tied_photos` the share of photos that have
    one; `with_gradient` photos of which the gradient is not 0. `inside`: the largest relative deviation within the
    radius. `change` (`change_low`, `change_high`): the mean of ‖∇Φ̂(x + δ) − ∇Φ̂(x)‖ / ‖∇Φ̂(x)‖ at ‖δ‖ = share · ‖x‖,
    and `largest_change` that of the largest over δ; `deviation` (`deviation_low`, `deviation_high`) of Φ̂ there.
    Columns about radii are missing where the network is not covered.
    """
    import pandas as pd

    by_key: dict[str, dict[str, float]] = {}
    inside: dict[str, float] = {}
    if len(rays):
        by_key = {str(key): _radii(part, seed) for key, part in rays.groupby("key", sort=False)}
        within = deviations[deviations["inside"]]
        inside = {str(key): float(part["relative"].max()) for key, part in within.groupby("key")}
    rows = []
    for named, part in stability.groupby(["key", "share"], sort=False):
        key, share = str(named[0]), float(part["share"].iloc[0])
        row: dict[str, Any] = {"key": key, "sparsity": part["sparsity"].iloc[0], "share": share, "photos": len(part)}
        row["with_gradient"] = int(part["mean"].notna().sum())
        row |= by_key.get(key, dict.fromkeys(_RADII, np.nan)) | {"inside": inside.get(key, np.nan)}
        row |= _mean("change", part["mean"], seed) | {"largest_change": float(part["maximum"].mean())}
        row |= _mean("deviation", part["deviation"], seed)
        rows.append(row)
    return pd.DataFrame(rows)


_RADII = ("radius", "radius_low", "radius_high", "tied", "tied_photos")


def _radii(part: pd.DataFrame, seed: int) -> dict[str, float]:
    samples = part.groupby("sample")
    tied = samples["tied"].first()
    return _mean("radius", samples["relative"].median(), seed) | {
        "tied": float(tied.mean()), "tied_photos": float((tied > 0).mean()),
    }  # fmt: skip


def _mean(name: str, values: pd.Series[Any], seed: int) -> dict[str, float]:
    found = values.to_numpy(dtype=np.float64)
    finite = found[np.isfinite(found)]
    low, high = bootstrap_interval(finite, seed=seed)
    return {name: float(finite.mean()) if finite.size else float("nan"), f"{name}_low": low, f"{name}_high": high}
