"""Which picture does a pathway answer to most, and which channels does it stand on? (Fig. 3 of the paper.)

python analyses/pathway_decoding.py -o FOLDER [--photos 3] [--steps 256] [--site features.12.expand3x3_activation]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from common import start

from fxpath import trace
from fxpath.decodefolder import decode_photos
from fxpath.decoding import Decoding
from fxpath.images import load_images
from fxpath.inputspace import InputSpace
from fxpath.zoo import load_model

SELECTORS = ["neuron_mct", "neuron_intgrad", "dgr", "greedy_pruning", "magnitude", "random"]
SITES = ["features.7.expand3x3_activation", "features.12.expand3x3_activation"]  # of SqueezeNet 1.1
SHOWN = ["photo", "class", "row", "density", "photo_response", "response", "original_response", "missing"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="for pictures and tables")
    parser.add_argument("--model", default="zoo:squeezenet1_1")
    parser.add_argument("--photos", type=int, default=3, help="how many of foolbox's (default 3)")
    parser.add_argument("--selector", action="append", help="name[:param=value,…]; may be given several times")
    parser.add_argument("--site", action="append", help="where top neurons are looked for; may be given several times")
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    start(parser, run)


def run(options: argparse.Namespace) -> None:
    loaded = load_model(options.model)
    photos = load_images("foolbox:imagenet", loaded.preprocess, classes=loaded.classes, limit=options.photos)
    done = decode_photos(
        trace(loaded.model, loaded.example(2)), photos, options.output, selectors=options.selector or SELECTORS,
        sparsity=options.sparsity, decoding=Decoding(steps=options.steps, seed=options.seed),
        sites=options.site or (SITES if options.model == "zoo:squeezenet1_1" else ()),
        space=InputSpace.of_preprocessing(loaded.preprocess, loaded.input_shape), model=loaded.name,
        classes=loaded.classes,
    )  # fmt: skip
    table = pd.read_csv(done.table)
    print(table[SHOWN].to_string(index=False, na_rep="", float_format="{:.4g}".format))
    print(f"{done.decoded} photos decoded, {done.reused} were there, in {done.seconds:.0f} s; all is in {done.folder}")


if __name__ == "__main__":
    main()
