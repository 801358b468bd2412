"""The pathway gradient's time. `pytest tests/benchmarks/bench_*.py --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from small_jobs import inputs, module
from torch import Tensor, nn

import fxpath
from fxpath.attribution import masked_gradient
from fxpath.images import load_images
from fxpath.memory import kept_memory
from fxpath.zoo import load_model

THREADS = 2


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with kept_memory():  # as in a job: else either side asks the system for its memory anew, as the heap happens to lie
        yield
    torch.set_num_threads(before)


def photos(count: int) -> tuple[nn.Module, Tensor]:
    """SqueezeNet 1.1 with its weights, and real photos for it, 227²."""
    loaded = load_model("zoo:squeezenet1_1")
    data = load_images("foolbox:imagenet", loaded.preprocess, classes=loaded.classes, limit=count)
    return loaded.model, torch.stack([data[row][0] for row in range(count)])


def plain(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """The input's gradient of the untraced model."""

    def gradient() -> Tensor:
        given = x.detach().clone().requires_grad_()
        return torch.autograd.grad(model(given).gather(1, target[:, None]).sum(), given)[0]

    return gradient


def compared(
    model: nn.Module, x: Tensor, gradient: Callable[..., Tensor], ratio: Callable[..., float], rounds: int
) -> None:
    """`gradient` of NeuronMCT's pathways at 0.9, which are there already, ÷ the plain one."""
    network = fxpath.trace(model, x)
    target = model(x).argmax(dim=1)
    pathways = fxpath.NeuronMCT().scores(network, x, target).pathways(0.9)
    ours = lambda: gradient(network, x, pathways, target)  # noqa: E731
    ratio(ours, plain(model, x, target), rounds=rounds, what="the plain gradient of the untraced model")


def test_pathway_gradient_of_photos(ratio: Callable[..., float]) -> None:
    """SqueezeNet, batch 4, 2 threads."""
    compared(*photos(4), fxpath.pathway_gradient, ratio, 15)


def test_masked_gradient_of_photos(ratio: Callable[..., float]) -> None:
    """The same for the masked network."""
    compared(*photos(4), masked_gradient, ratio, 15)


def test_pathway_gradient_of_small_pictures(ratio: Callable[..., float]) -> None:
    """A network of 12 899 neurons for CIFAR's pictures, batch 8: what it costs besides the arithmetic."""
    compared(module(), inputs()[:8], fxpath.pathway_gradient, ratio, 100)
