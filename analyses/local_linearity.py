"""How far is the frozen network linear, and how stable is its gradient? (Propositions 4 and 5 of the paper, measured.)

python analyses/local_linearity.py zoo:squeezenet1_1 foolbox:imagenet run.h5 -o FOLDER [--limit 10] [--key KEY …]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import KEY, start

from fxpath.analysis import linearity_summary
from fxpath.files import save_table
from fxpath.images import load_images
from fxpath.linear_study import linear_study
from fxpath.linearfigures import linearity_figure
from fxpath.network import trace
from fxpath.plotting import save
from fxpath.store import open_store
from fxpath.zoo import load_model

SHOWN = ["key", "share", "photos", "radius", "tied_photos", "inside", "change", "largest_change", "deviation"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as `fxpath compute` took it")
    parser.add_argument("images", help="the same images")
    parser.add_argument("store", type=Path, help="what `fxpath compute` wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="for tables and figures")
    parser.add_argument("--key", **KEY)
    parser.add_argument("--limit", type=int, help="only the first so many photos")
    parser.add_argument("--rays", type=int, default=8, help="for each photo and pathway (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    start(parser, run)


def run(options: argparse.Namespace) -> None:
    loaded = load_model(options.model)
    images = load_images(options.images, loaded.preprocess, classes=loaded.classes)
    with open_store(options.store) as store:
        network = trace(loaded.model, loaded.example(2))
        found = linear_study(
            network, images, store, options.key, limit=options.limit, rays=options.rays, seed=options.seed
        )
    table = linearity_summary(found.rays, found.deviations, found.stability, seed=options.seed)
    print(table[SHOWN].to_string(index=False, na_rep="–", float_format="{:.3g}".format))
    if found.uncovered:
        print("no radius: the propositions do not cover", *found.uncovered[:5], sep="\n  ")
    tables = {"": table, "_rays": found.rays, "_deviations": found.deviations, "_stability": found.stability}
    written = [save_table(each, options.output / f"local_linearity{name}.csv") for name, each in tables.items()]
    figure = save(linearity_figure({loaded.name: table}, 0.01), options.output / "local_linearity.png")
    print("wrote", *written, figure, sep="\n  ")


if __name__ == "__main__":
    main()
