"""How many of a pathway's neurons are dead in the original network? (Fig. 1, 8 and 9 of the paper.)

python analyses/dead_neurons.py run.h5 [other.h5 …] -o FOLDER
"""

from __future__ import annotations

import argparse

from common import KEY, parser_of, start, tables_of

from fxpath.analysis import dead_share
from fxpath.files import save_table
from fxpath.plotting import dead_by_site_figure, dead_figure, density_by_site_figure, save

SHARES = ["dead_share", "low", "high", "switched_on_share", "still_dead_share", "base_rate", "null_mean", "z"]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--key", **KEY)
    start(parser, run)


def run(options: argparse.Namespace) -> None:
    tables, joined = tables_of(options.stores, lambda store: dead_share(store, options.key, seed=options.seed))
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
