"""What did the selectors report: iterations, untouched gates, completeness, rank correlation with ablation?

python analyses/diagnostics.py run.h5 [other.h5 …] -o FOLDER
"""

from __future__ import annotations

import argparse

from common import KEY, parser_of, start, tables_of

from fxpath.analysis import diagnostics
from fxpath.files import save_table

SHOWN = ["store", "key", "diagnostic", "samples", "mean", "smallest", "largest", "low", "high"]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--key", **KEY)
    start(parser, run)


def run(options: argparse.Namespace) -> None:
    _, joined = tables_of(options.stores, lambda store: diagnostics(store, options.key, seed=options.seed))
    print(joined[SHOWN].to_string(index=False, na_rep="–", float_format="{:.4g}".format))
    print("wrote", save_table(joined, options.output / "diagnostics.csv"), sep="\n  ")


if __name__ == "__main__":
    main()
