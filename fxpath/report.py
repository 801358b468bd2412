"""A store → a folder of tables and figures: everything that `fxpath analyze` writes. No computing of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import plotting
from .analysis import dead_share, overlap, summary
from .files import save_table
from .keys import PathwayKey
from .store import open_store

if TYPE_CHECKING:
    import pandas as pd

Stores = Mapping[str, str | os.PathLike[str]]


def analyse(stores: Stores, folder: str | os.PathLike[str], *, seed: int = 0, progress: bool = True) -> pd.DataFrame:
    """Tables and figures of one or several stores (by a name to show): written to `folder`; returns the summary.

    CSV: summary, dead_neurons, overlap, each with a column `store`. PNG: the paper's Fig. 1 (dead share), Fig. 2 (a:
    overlap of selectors, b: overlap over sites), dead share and density over sites, at each sparsity.
    """
    import pandas as pd

    folder = Path(folder)
    tables: dict[str, dict[str, pd.DataFrame]] = {"summary": {}, "dead_neurons": {}, "overlap": {}}
    for name, path in stores.items():
        with open_store(path) as store:
            tables["dead_neurons"][name] = dead_share(store, seed=seed, progress=progress)
            tables["summary"][name] = summary(store, tables["dead_neurons"][name])
            if comparable(store.keys):
                tables["overlap"][name] = overlap(store, seed=seed, progress=progress)
    joined = {
        kind: pd.concat(named, names=["store", "row"]).reset_index("store") for kind, named in tables.items() if named
    }
    for kind, table in joined.items():
        save_table(table, folder / f"{kind}.csv")
    _figures(tables["dead_neurons"], tables["overlap"], folder)
    return joined["summary"]


def comparable(keys: Sequence[str]) -> bool:
    """Whether two pathways of a store can be compared: of one sparsity, or one of them without any.

    >>> comparable(["neuron_mct@0.8", "neuron_mct@0.9"]), comparable(["neuron_mct@0.8", "active"])
    (False, True)
    """
    levels = [PathwayKey.parse(key).sparsity for key in keys]
    return len(levels) > 1 and (None in levels or len(set(levels)) < len(levels))


def _figures(dead: dict[str, pd.DataFrame], overlaps: dict[str, pd.DataFrame], folder: Path) -> None:
    levels = sorted({float(level) for table in dead.values() for level in table["sparsity"].dropna()})
    if levels:
        plotting.save(plotting.dead_figure(dead), folder / "fig1_dead_share.png")
    for level in levels:
        at = {name: table for name, table in dead.items() if (table["sparsity"] == level).any()}
        plotting.save(plotting.dead_by_site_figure(at, level), folder / f"dead_by_site_{level:g}.png")
        plotting.save(plotting.density_by_site_figure(at, level), folder / f"density_by_site_{level:g}.png")
        both = {name: table for name, table in overlaps.items() if (table["sparsity"] == level).any()}
        if both:
            plotting.save(plotting.overlap_matrix_figure(both, level), folder / f"fig2a_overlap_{level:g}.png")
            plotting.save(plotting.overlap_by_site_figure(both, level), folder / f"fig2b_overlap_by_site_{level:g}.png")
