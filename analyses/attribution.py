"""What do attribution maps show, and how concentrated are they? (Fig. 4, 5, 12, 13 and 14 of the paper.)

python analyses/attribution.py run.h5 [other.h5 …] -o FOLDER [--images photos/] [--key gradient --key neuron_mct@0.9]
"""

from __future__ import annotations

import argparse

import numpy as np
from common import parser_of, start

from fxpath.analysis import map_differences, map_statistics, map_statistics_by_sample
from fxpath.analysis.maps import chosen_maps
from fxpath.files import save_table
from fxpath.labels import store_names
from fxpath.mapfigures import gini_figure, overview_figure, sample_figure
from fxpath.plotting import save
from fxpath.store import open_store


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--key", action="append", metavar="KEY", help="only this map; the first is compared with all")
    parser.add_argument("--images", metavar="IMAGES", help="the pictures of the stores, to lay maps over")
    parser.add_argument("--samples", type=int, default=4, help="how many to show: the first (default 4)")
    start(parser, run)


def run(options: argparse.Namespace) -> None:
    dots, statistics, written = {}, {}, []
    for name, path in zip(store_names(options.stores), options.stores, strict=True):
        folder, seen = options.output / name, {}
        with open_store(path) as store:
            keys = chosen_maps(store, options.key)
            shown = [str(store.ids[row]) for row in np.flatnonzero(store.ok)[: options.samples]]
            if options.images:
                from fxpath.images import input_pictures, load_images
                from fxpath.zoo import load_model

                loaded = load_model(store.header.model, weights="random")  # for its preprocessing
                seen = input_pictures(load_images(options.images, loaded.preprocess), shown, loaded.preprocessing)
            dots[name] = map_statistics_by_sample(store, keys)
            statistics[name] = map_statistics(store, keys, dots[name], seed=options.seed)
            tables = {"statistics": statistics[name], "by_sample": dots[name]}
            if len(keys) > 1:
                tables["differences"] = map_differences(store, keys[0], keys, seed=options.seed)
            figures = {"overview": overview_figure(store, shown, keys, pictures=seen)}
            figures |= {f"sample_{n}": sample_figure(store, i, keys, picture=seen.get(i)) for n, i in enumerate(shown)}
        for table in (table for what, table in tables.items() if what != "by_sample"):
            print(name, table.to_string(index=False, float_format="{:.4f}".format), sep="\n")
        written += [save_table(table, folder / f"{what}.csv") for what, table in tables.items()]
        written += [save(figure, folder / f"{what}.png") for what, figure in figures.items()]
    print("wrote", *written, save(gini_figure(statistics, dots), options.output / "gini.png"), sep="\n  ")


if __name__ == "__main__":
    main()
