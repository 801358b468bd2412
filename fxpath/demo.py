"""The demonstration: pretrained networks, real photos, stores, figures, and one printed table."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .batch import compute
from .images import load_images
from .network import trace
from .report import analyse
from .store import open_store
from .zoo import load_model

if TYPE_CHECKING:
    import pandas as pd

NETWORKS = ("squeezenet1_1", "efficientnet_lite0")
SELECTORS = (
    "neuron_mct", "neuron_intgrad:steps=20", "greedy_pruning", "dgr:iterations=60", "magnitude", "random", "active",
)  # fmt: skip
SPARSITIES = (0.8, 0.9, 0.99)
PHOTOS = "foolbox:imagenet"


@dataclass(frozen=True)
class Accuracy:
    """How a network does on the labelled photos: how many of `samples` have the label first, and among five."""

    network: str
    samples: int
    top1: int
    top5: int


@dataclass(frozen=True)
class Demo:
    """What the demonstration made: a folder, a table with a row per network and pathway, and the accuracies."""

    folder: Path
    table: pd.DataFrame
    accuracies: tuple[Accuracy, ...]
    seconds: float


def accuracy(name: str, path: str | os.PathLike[str]) -> Accuracy:
    """Top-1 and top-5 of the original network, from a store of labelled samples."""
    with open_store(path) as store:
        samples = store.samples()
    rank = samples.loc[(samples["status"] == "ok") & (samples["label"] >= 0), "label_rank"]
    return Accuracy(name, len(rank), int((rank == 0).sum()), int(((rank >= 0) & (rank < 5)).sum()))


def run_demo(folder: str | os.PathLike[str] = "fxpath-demo", *, quick: bool = False, progress: bool = True) -> Demo:
    """Select pathways on 20 real photos with two pretrained networks (`quick`: 4 photos, one network), and analyse.

    A demonstration that was stopped goes on where it was. Raises `ModelError` where the extra `demo` is not installed.
    """
    started = time.perf_counter()
    folder = Path(folder)
    stores: dict[str, Path] = {}
    for name in NETWORKS[:1] if quick else NETWORKS:
        loaded = load_model(f"zoo:{name}")
        photos = load_images(PHOTOS, loaded.preprocess, classes=loaded.classes, limit=4 if quick else None)
        network = trace(loaded.model, loaded.example(2))
        stores[name] = folder / f"{name}{'-quick' if quick else ''}.h5"
        compute(
            network, photos, stores[name], selectors=SELECTORS, sparsities=SPARSITIES, micro_batch=4, thumbnails=96,
            model=loaded.name, preprocessing=loaded.preprocessing, classes=loaded.classes, progress=progress,
        )  # fmt: skip
    table = analyse(stores, folder, progress=progress)
    found = tuple(accuracy(name, path) for name, path in stores.items())
    return Demo(folder, table, found, time.perf_counter() - started)
