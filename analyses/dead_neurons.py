"""How many of a pathway's neurons are dead in the original network? (Fig. 1, 8 and 9 of the paper.)

python analyses/dead_neurons.py run.h5 [other.h5 …] -o FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from fxpath.analysis import dead_share
from fxpath.errors import FxpathError
from fxpath.files import save_table
from fxpath.labels import store_names
from fxpath.plotting import dead_by_site_figure, dead_figure, density_by_site_figure, save
from fxpath.store import open_store

SHARES = ["dead_share", "low", "high", "switched_on_share", "still_dead_share", "base_rate", "null_mean", "z"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path, metavar="STORE", help="what `fxpath compute` wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="for the CSV and figures")
    parser.add_argument("--key", action="append", metavar="KEY", help="only this pathway; may be given several times")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    options = parser.parse_args()
    try:
        run(options)
    except FxpathError as problem:
        parser.error(str(problem))


def run(options: argparse.Namespace) -> None:
    tables = {}
    for name, path in zip(store_names(options.stores), options.stores, strict=True):
        with open_store(path) as store:
            tables[name] = dead_share(store, options.key, seed=options.seed)
    joined = pd.concat(tables, names=["store", "row"]).reset_index("store")
    shown = joined[joined["site_number"] < 0][["store", "key", "samples", "density", *SHARES]]
    print(shown.to_string(index=False, float_format="{:.4f}".format))
    print("null_mean, z: against random neurons, as many of each site; of RandomActive neurons none is dead")
    levels = sorted(joined["sparsity"].dropna().unique())
    written = [save_table(joined, options.output / "dead_neurons.csv")]
    if levels:
        written.append(save(dead_figure(tables), options.output / "dead_neurons.png"))
    for level in levels:
        written.append(save(dead_by_site_figure(tables, level), options.output / f"dead_by_site_{level:g}.png"))
        written.append(save(density_by_site_figure(tables, level), options.output / f"density_by_site_{level:g}.png"))
    print("wrote", *written, sep="\n  ")


if __name__ == "__main__":
    main()
