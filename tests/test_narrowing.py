"""Where the response is one logit, suffixes compute the wanted rows of the last layer and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpath
from fxpath.narrowing import narrow
from fxpath.responses import Probability
from fxpath.stacking import SiteRuns


class Net(nn.Module):
    """Two convolutions, and anything to make 5 classes of them."""

    def __init__(self, head: nn.Module | Callable[[Tensor], Tensor], channels: int = 5, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 10, 3)
        self.last = nn.Conv2d(10, channels, 1, groups=groups)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(F.relu(self.first(x))))


def pooled(h: Tensor) -> Tensor:
    return F.relu(h).mean([2, 3])


def flattened(h: Tensor) -> Tensor:
    return torch.flatten(F.adaptive_avg_pool2d(h, 1), 1)


def viewed(h: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(F.hardtanh(h, 0, 6), 1).view(h.size(0), -1)


def spread(h: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(h, (1, 5)).sum(1).flatten(1)


def softened(h: Tensor) -> Tensor:
    return h.softmax(1).mean([2, 3])


def reread(h: Tensor) -> Tensor:
    return h.mean([2, 3]) + h.amax([1, 2, 3]).unsqueeze(1)


def centred(h: Tensor) -> Tensor:
    return F.relu(h - h.mean(1, keepdim=True)).mean([2, 3])


def swapped(h: Tensor) -> Tensor:
    return h.transpose(1, 2).mean([2, 3])


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 5)

    def forward(self, h: Tensor) -> Tensor:
        return self.lin(F.relu(h).mean([2, 3]))


SECOND_GATE = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout())


def made(head: nn.Module | Callable[[Tensor], Tensor], **options: int) -> tuple[fxpath.Network, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(3, 2, 7, 7, dtype=torch.float64)
    return fxpath.trace(Net(head, **options).double().eval(), x), x


def plain_loop(network: fxpath.Network, x: Tensor, target: Tensor, steps: int) -> list[Tensor]:
    """Every site's scores by whole suffixes, one step at a time."""
    nodes, weights = fxpath.selectors.integrated.quadrature("midpoint", steps)
    found = []
    for number in range(len(network.sites)):
        suffix = network.suffix(number)
        activation, boundary = suffix.cache(x)
        total = torch.zeros_like(activation)
        for alpha, weight in zip(nodes, weights, strict=True):
            leaf = (activation * alpha).requires_grad_()
            logits = suffix(leaf, boundary)
            (slope,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), leaf)
            total += weight * slope
        found.append((total * activation).flatten(1))
    return found


@pytest.mark.parametrize("head", [pooled, flattened, viewed, SECOND_GATE, Mixed()])
def test_rows_of_the_last_layer_are_enough(head: nn.Module | Callable[[Tensor], Tensor]) -> None:
    network, x = made(head)
    found = narrow(network._module, 5)
    assert found is not None
    target = torch.tensor([4, 0, 4])
    torch.testing.assert_close(found[0](x, None, target)[:, :2], network(x)[:, [4, 0]], rtol=0, atol=1e-12)
    scores = fxpath.NeuronIntGrad(steps=5, rule="midpoint").scores(network, x, target=target)
    expected = torch.cat(plain_loop(network, x, target, 5), dim=1)
    torch.testing.assert_close(scores.signed, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    assert float(scores.signed.abs().max()) > 0


@pytest.mark.parametrize("head", [spread, softened, reread, centred, swapped])
def test_what_mixes_channels_is_left_whole(head: Callable[[Tensor], Tensor]) -> None:
    network, x = made(head)
    assert network(x).shape[0] == 3
    assert narrow(network._module, network(x).shape[1]) is None


def test_grouped_layers_hooks_and_subclasses_are_left_whole() -> None:
    assert narrow(made(pooled, groups=5)[0]._module, 5) is None
    network, _ = made(pooled)
    handle = network._module.get_submodule("last").register_forward_hook(lambda *_: None)
    assert narrow(network._module, 5) is None
    handle.remove()
    assert narrow(network._module, 5) is not None
    assert narrow(network._module, 7) is None  # the last layer does not make the classes


def test_only_a_logit_is_narrowed() -> None:
    """A probability needs every class."""
    x = torch.randn(3, 2, 7, 7, dtype=torch.float64)
    network = fxpath.trace(Net(pooled).double().eval(), x, response=Probability())
    target = torch.tensor([4, 0, 4])
    suffix = network.suffix(0)
    activation, boundary = suffix.cache(x)
    runs = SiteRuns(network, 0, network.samples(x), target, 2, 5)
    expected = suffix(activation, boundary).softmax(1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(runs.responses(activation)[0], expected)


def test_a_sample_does_not_depend_on_its_neighbours_classes() -> None:
    """float32: the same bits, whatever the other samples' classes are."""
    torch.manual_seed(0)
    x = torch.randn(4, 2, 9, 9)
    network = fxpath.trace(Net(pooled, channels=40).eval(), x)
    selector = fxpath.NeuronIntGrad(steps=8)
    first = selector.scores(network, x, target=[3, 9, 9, 30]).signed
    second = selector.scores(network, x, target=[3, 1, 39, 0]).signed
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_weights_that_change_are_seen() -> None:
    """Sub-graphs are kept, weights are not."""
    network, x = made(pooled)
    target = torch.tensor([1, 1, 2])
    before = fxpath.NeuronIntGrad(steps=3).scores(network, x, target=target).signed
    layer = network._module.get_submodule("last")
    layer.weight = nn.Parameter(layer.weight.detach() * 2)
    layer.bias = nn.Parameter(layer.bias.detach() * 2)
    after = fxpath.NeuronIntGrad(steps=3).scores(network, x, target=target).signed
    torch.testing.assert_close(after, 2 * before)


@pytest.mark.parametrize(
    "tail",
    [
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.AvgPool1d(3, 1, 1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.MaxPool1d(3, 1, 1)),
        nn.Sequential(nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0)), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Flatten())),
    ],
)
def test_pools_over_classes_are_no_pools_of_images(tail: nn.Module) -> None:
    network, x = made(tail)
    assert narrow(network._module, 5) is None
    target = torch.tensor([4, 0, 4])
    scores = fxpath.NeuronIntGrad(steps=5, rule="midpoint").scores(network, x, target=target)
    expected = torch.cat(plain_loop(network, x, target, 5), dim=1)
    torch.testing.assert_close(scores.signed, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("where", ["last", "first", "head.lin"])
@pytest.mark.parametrize("how", ["hook", "hook before", "patched"])
def test_what_is_changed_later_is_seen(how: str, where: str) -> None:
    """A hook, or a `forward` of the module's own, as those set that keep weights elsewhere."""
    network, x = made(Mixed())
    target = torch.tensor([1, 1, 2])
    selector = fxpath.NeuronIntGrad(steps=5, rule="midpoint")
    before = selector.scores(network, x, target=target).signed
    layer = network._module.get_submodule(where)
    if how == "patched":
        plain = layer.forward
        layer.forward = lambda value: plain(value).sin()  # type: ignore[method-assign]
    elif how == "hook":
        layer.register_forward_hook(lambda *given: given[2].sin())
    else:
        layer.register_forward_pre_hook(lambda _, given: (given[0].sin(),))
    expected = torch.cat(plain_loop(network, x, target, 5), dim=1)
    found = selector.scores(network, x, target=target).signed
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    assert not torch.allclose(found, before)
