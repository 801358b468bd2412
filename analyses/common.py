"""What the scripts here share: which stores, which folder, one table of all of them, and one line for bad input."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from fxpath.errors import FxpathError
from fxpath.labels import store_names
from fxpath.store import Store, open_store

KEY = {"action": "append", "metavar": "KEY", "help": "only this pathway; may be given several times"}


def parser_of(said: str | None) -> argparse.ArgumentParser:
    """Options that every script has: stores, a folder, the bootstrap's seed."""
    parser = argparse.ArgumentParser(description=said, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path, metavar="STORE", help="what `fxpath compute` wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="for tables and figures")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    return parser


def start(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> None:
    """Run a script; errors that the user can mend are one line and exit code 2."""
    options = parser.parse_args()
    try:
        run(options)
    except FxpathError as problem:
        parser.error(str(problem))


def tables_of(
    stores: list[Path], analysis: Callable[[Store], pd.DataFrame]
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """An analysis of each store, by the store's name, and all of them as one table with the column `store`."""
    tables = {}
    for name, path in zip(store_names(stores), stores, strict=True):
        with open_store(path) as store:
            tables[name] = analysis(store)
    return tables, pd.concat(tables, names=["store", "row"]).reset_index("store")
