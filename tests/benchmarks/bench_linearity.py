"""What local linearity costs. `pytest -n 0 tests/benchmarks/bench_linearity.py --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxpath
from fxpath.images import load_images
from fxpath.linearity import linear_radius, ray_radius
from fxpath.zoo import load_model


@pytest.fixture(scope="module")
def photo() -> tuple[fxpath.Network, Tensor, fxpath.Pathways]:
    """SqueezeNet 1.1, a real photo, and its NeuronMCT pathway at κ = 0.9."""
    loaded = load_model("zoo:squeezenet1_1")
    x = load_images("foolbox:imagenet", loaded.preprocess, classes=loaded.classes, limit=1)[0][0][None]
    network = fxpath.trace(loaded.model, loaded.example(2))
    return network, x, fxpath.NeuronMCT().scores(network, x).pathways(0.9)


def test_estimated_radius(benchmark: Any, photo: tuple[fxpath.Network, Tensor, fxpath.Pathways]) -> None:
    """The estimate of ε̂ for one photo: 48 Jacobian–vector products and 64 exact gradients (aim: under 15 s)."""
    network, x, pathways = photo
    found = benchmark.pedantic(lambda: linear_radius(network, x, pathways), rounds=3, warmup_rounds=1)
    assert not found.exact
    assert float(found.value) > 0
    benchmark.extra_info["radius"] = float(found.value)


def test_one_ray(ratio: Any, photo: tuple[fxpath.Network, Tensor, fxpath.Pathways]) -> None:
    """The exact radius along one direction ÷ a forward of the network."""
    network, x, pathways = photo

    def forward() -> None:
        with torch.no_grad():
            network(x)

    ratio(lambda: ray_radius(network, x, pathways, 1), forward, what="forward pass")
