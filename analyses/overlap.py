"""How much do pathways of different selectors overlap, beyond chance? (Fig. 2, 10 and 11 of the paper.)

python analyses/overlap.py run.h5 [other.h5 …] -o FOLDER [--pair neuron_mct dgr:init=1]
"""

from __future__ import annotations

import argparse

from common import parser_of, start, tables_of

from fxpath.analysis import overlap
from fxpath.files import save_table
from fxpath.plotting import overlap_by_site_figure, overlap_matrix_figure, save

SHOWN = ["store", "first", "second", "samples", "jaccard", "low", "high", "chance", "null_mean", "z"]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sparsity", help="only pathways of this sparsity (default: all)")
    pair_help = "selectors of a line over sites; may be given several times (default: the pairs that overlap most)"
    parser.add_argument("--pair", nargs=2, action="append", metavar=("ONE", "TWO"), help=pair_help)
    start(parser, run)


def run(options: argparse.Namespace) -> None:
    tables, joined = tables_of(
        options.stores, lambda store: overlap(store, sparsity=options.sparsity, seed=options.seed)
    )
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
