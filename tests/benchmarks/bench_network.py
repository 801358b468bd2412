"""What gates and selection cost beside the plain model. `pytest tests/benchmarks/bench_*.py --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn

import fxpath
from fxpath.images import load_images
from fxpath.memory import kept_memory
from fxpath.zoo import load_model


@pytest.fixture(autouse=True)
def same_memory() -> Iterator[None]:
    """As in a job: else either side asks the system for its memory anew or does not, as the heap happens to lie."""
    with kept_memory():
        yield


def photos(count: int) -> tuple[nn.Module, Tensor]:
    """SqueezeNet 1.1 with its weights, and real photos for it."""
    loaded = load_model("zoo:squeezenet1_1")
    data = load_images("foolbox:imagenet", loaded.preprocess, classes=loaded.classes, limit=count)
    return loaded.model, torch.stack([data[row][0] for row in range(count)])


def test_open_gates_forward(ratio: Callable[..., float]) -> None:
    """ResNet-50, batch 4: a forward through open gates ÷ the model's own."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval()
    x = torch.rand(4, 3, 224, 224)
    network = fxpath.trace(model, x[:2])

    def plain() -> None:
        with torch.no_grad():
            model(x)

    def gated() -> None:
        with torch.no_grad():
            network(x)

    ratio(gated, plain, rounds=9, what="plain forward")


def _to_the_input(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        leaf = x.clone().requires_grad_()
        output = model(leaf)
        torch.autograd.grad(output.max(dim=1).values.sum(), leaf)

    return run


def test_neuron_mct_on_squeezenet(ratio: Callable[..., float]) -> None:
    """NeuronMCT of 8 photos ÷ forward and backward to the input."""
    model, x = photos(8)
    network = fxpath.trace(model, x[:2])
    ratio(lambda: fxpath.NeuronMCT().scores(network, x), _to_the_input(model, x), what="forward + backward to input")


def test_neuron_mct_on_resnet50(ratio: Callable[..., float]) -> None:
    """The same on ResNet-50, batch 4."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval()
    x = torch.rand(4, 3, 224, 224)
    network = fxpath.trace(model, x[:2])
    ratio(lambda: fxpath.NeuronMCT().scores(network, x), _to_the_input(model, x), what="forward + backward to input")


def test_neuron_mct_against_captum(ratio: Callable[..., float]) -> None:
    """NeuronMCT of 8 photos ÷ captum's LayerGradientXActivation of all 26 layers in one call."""
    model, x = photos(8)
    network = fxpath.trace(model, x[:2])
    layers = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    for layer in layers:
        layer.inplace = False  # captum's hooks would see overwritten activations otherwise
    target = model(x).argmax(dim=1)
    captum = LayerGradientXActivation(model, layers)
    ratio(
        lambda: fxpath.NeuronMCT().scores(network, x, target=target),
        lambda: captum.attribute(x, target=target),
        what="captum LayerGradientXActivation",
    )
