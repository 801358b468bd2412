"""What greedy pruning costs beside its passes. `pytest tests/benchmarks/bench_*.py --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from bench_network import photos

import fxpath
from fxpath.memory import kept_memory


@pytest.fixture(autouse=True)
def same_memory() -> Iterator[None]:
    """As in a job."""
    with kept_memory():
        yield


def test_greedy_pruning_on_squeezenet(ratio: Callable[..., float]) -> None:
    """GreedyPruning of 2 photos to 0.9 ÷ as many forwards and backwards of the whole network as it runs states."""
    model, x = photos(2)
    network = fxpath.trace(model, x)
    selection = fxpath.GreedyPruning().select(network, x, (0.9,))
    states = int(selection.diagnostics["iterations"].max()) + 1
    samples = replace(network.samples(x), target=network.original(x).target)

    def passes() -> None:
        for _ in range(states):
            network.gradients(samples)

    ratio(lambda: fxpath.GreedyPruning().select(network, x, (0.9,)), passes, rounds=3, what=f"{states} × gradients")
