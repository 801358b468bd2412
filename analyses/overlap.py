"""How much do pathways of different selectors overlap, beyond chance? (Fig. 2, 10 and 11 of the paper.)

python analyses/overlap.py run.h5 [other.h5 …] -o FOLDER [--pair neuron_mct dgr:init=1]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from fxpath.analysis import overlap
from fxpath.errors import FxpathError
from fxpath.files import save_table
from fxpath.labels import store_names
from fxpath.plotting import overlap_by_site_figure, overlap_matrix_figure, save
from fxpath.store import open_store

SHOWN = ["store", "first", "second", "samples", "jaccard", "low", "high", "chance", "null_mean", "z"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path, metavar="STORE", help="what `fxpath compute` wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="for the CSV and figures")
    parser.add_argument("--sparsity", help="only pathways of this sparsity (default: all)")
    pair_help = "selectors of a line over sites; may be given several times (default: the pairs that overlap most)"
    parser.add_argument("--pair", nargs=2, action="append", metavar=("ONE", "TWO"), help=pair_help)
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
            tables[name] = overlap(store, sparsity=options.sparsity, seed=options.seed)
    joined = pd.concat(tables, names=["store", "row"]).reset_index("store")
    print(joined[joined["site_number"] < 0][SHOWN].to_string(index=False, float_format="{:.4f}".format))
    figures = {}
    for level in sorted(joined["sparsity"].dropna().unique()):
        figures[f"overlap_matrix_{level:g}.png"] = overlap_matrix_figure(tables, level)
        figures[f"overlap_by_site_{level:g}.png"] = overlap_by_site_figure(tables, level, options.pair)
    written = [save_table(joined, options.output / "overlap.csv")]
    written += [save(figure, options.output / name) for name, figure in figures.items()]
    print("wrote", *written, sep="\n  ")


if __name__ == "__main__":
    main()
