"""What did the selectors report: iterations, untouched gates, completeness, rank correlation with ablation?

python analyses/diagnostics.py run.h5 [other.h5 …] -o FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from fxpath.analysis import diagnostics
from fxpath.errors import FxpathError
from fxpath.files import save_table
from fxpath.labels import store_names
from fxpath.store import open_store

SHOWN = ["store", "key", "diagnostic", "samples", "mean", "smallest", "largest", "low", "high"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path, metavar="STORE", help="what `fxpath compute` wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="for the CSV")
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
            tables[name] = diagnostics(store, options.key, seed=options.seed)
    joined = pd.concat(tables, names=["store", "row"]).reset_index("store")
    print(joined[SHOWN].to_string(index=False, na_rep="–", float_format="{:.4g}".format))
    print("wrote", save_table(joined, options.output / "diagnostics.csv"), sep="\n  ")


if __name__ == "__main__":
    main()
