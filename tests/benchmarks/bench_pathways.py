"""Thresholding, storing, reading. `pytest tests/benchmarks/bench_*.py --benchmark-only`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fxpath
from fxpath.images import load_images
from fxpath.items import collate, read_item
from fxpath.memory import kept_memory
from fxpath.neurons import NeuronIndex
from fxpath.placement import SIZES
from fxpath.schema import Header, PathwayRows, Rows
from fxpath.selectors import parse
from fxpath.store import open_store, write_store
from fxpath.zoo import load_model

VGG16 = [(64, 224)] * 2 + [(128, 112)] * 2 + [(256, 56)] * 3 + [(512, 28)] * 3 + [(512, 14)] * 3
SELECTORS = ("neuron_mct", "magnitude", "random", "active")
SPARSITIES = (0.8, 0.9, 0.99)


def vgg16_index() -> NeuronIndex:
    """VGG-16's index at 224²: 13 555 712 neurons in 15 sites."""
    blocks = [(f"features.{n}", "relu", (channels, side, side)) for n, (channels, side) in enumerate(VGG16)]
    return NeuronIndex.build([*blocks, ("classifier.1", "relu", (4096,)), ("classifier.4", "relu", (4096,))])


def test_threshold_and_pack(ratio: Callable[..., float]) -> None:
    """Three sparsities of 13.5 million scores, packing included ÷ one full torch.sort."""
    index = vgg16_index()
    generator = torch.Generator().manual_seed(0)
    signed = torch.randn(1, index.size, generator=generator)
    signed[torch.rand(1, index.size, generator=generator) < 0.6] = 0  # the dead
    scores = fxpath.Scores(signed, index)
    values = scores.values

    def ours() -> None:
        for pathways in scores.threshold(SPARSITIES):
            pathways.packed()

    ratio(ours, lambda: torch.sort(values), rounds=5, what="torch.sort")


class Mirrored:
    """Photos, then their mirror images."""

    def __init__(self, photos: Any) -> None:
        self.photos = photos
        self.ids = [*photos.ids, *(f"{name}, mirrored" for name in photos.ids)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        photo, label = self.photos[row % len(self.photos)]
        return (photo if row < len(self.photos) else photo.flip(-1)), label


def test_compute_end_to_end(ratio: Callable[..., float], tmp_path: Path) -> None:
    """`compute` on 40 photos, four selectors, three sparsities ÷ the sum of all the model passes that it makes.

    These are, a micro-batch: the original network (twice: Active looks for itself), forward and backward of NeuronMCT,
    the activations of Magnitude, and two masked networks a pathway (kept and dropped); and once a job the forward and
    backward that try whether places in the micro-batch are alike.
    """
    size = SIZES[0]
    loaded = load_model("zoo:squeezenet1_1")
    photos = Mirrored(load_images("foolbox:imagenet", loaded.preprocess, classes=loaded.classes))
    network = fxpath.trace(loaded.model, loaded.example(2))
    selectors = [parse(name) for name in SELECTORS]
    prepared = []
    for first in range(0, len(photos), size):
        samples = collate([read_item(photos, row, str(row)) for row in range(first, first + size)], network)
        found = [selector.select(network, samples, SPARSITIES) for selector in selectors]
        pathways = [each for selection in found for each in selection.pathways.values()]
        prepared.append((samples, [*pathways, *(~each for each in pathways)]))
    runs = 0

    def ours() -> None:
        nonlocal runs
        runs += 1
        path = tmp_path / f"run{runs}.h5"
        fxpath.compute(network, photos, path, selectors=SELECTORS, sparsities=SPARSITIES, progress=False)
        with fxpath.open_store(path) as store:
            assert store.header.micro_batch == size

    def passes() -> None:
        with kept_memory():  # as a job does: what is compared is all the rest
            network.gradients(prepared[0][0])
            for samples, pathways in prepared:
                network.gradients(samples)
                with torch.no_grad():
                    for _ in range(3):
                        network(samples)
                    for each in pathways:
                        with network.masked(each):
                            network(samples)

    ratio(ours, passes, rounds=3, what="the sum of its model passes")


def test_open_and_read_one_site(benchmark: Any, tmp_path: Path) -> None:
    """Opening a store of VGG-16 pathways and reading one site of one sample, in seconds."""
    index = vgg16_index()
    generator = np.random.default_rng(0)
    active = generator.random((4, index.size)) < 0.4
    mask = active & (generator.random((4, index.size)) < 0.25)
    packed, alive = index.pack(mask), index.pack(active)
    columns = {"mask": packed, "kept": index.count_by_site(packed).astype(np.uint32)}
    rows = Rows(
        samples={
            "id": [f"sample {n}" for n in range(4)],
            "label": np.zeros(4, dtype=np.int64),
            "target": np.zeros(4, dtype=np.int64),
            "response": np.ones(4, dtype=np.float32),
            "probability": np.ones(4, dtype=np.float32),
            "status": ["ok"] * 4,
        },
        active=alive,
        pathways={"neuron_mct@0.9": PathwayRows("neuron_mct", {}, 0.9, columns)},
    )
    edges = np.array([(n - 1, n) for n in range(len(index) + 1)], dtype=np.int32)
    path = tmp_path / "vgg16.h5"
    write_store(path, Header("vgg16", "0" * 64, index, edges, micro_batch=4, threads=2), rows)

    def read() -> int:
        with open_store(path) as store:
            return int(store.mask("neuron_mct@0.9", sample=2, site="features.5").sum())

    assert benchmark(read) == int(mask[2, index.site("features.5").slice].sum())


def test_import_of_the_store(benchmark: Any) -> None:
    """`import fxpath.store` in a new process, without torch."""
    code = "import fxpath.store, sys; sys.exit('torch' in sys.modules)"
    benchmark.pedantic(lambda: subprocess.run([sys.executable, "-c", code], check=True), rounds=5)
