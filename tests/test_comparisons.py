"""Gradients and perturbed inputs: each method against a loop that is written out, for any response."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import NoiseTunnel, Saliency
from footprint import unchanged
from networks import BY_NAME, CASES, Case, traced
from test_methods import NAMES, network, photos, quick
from torch import Tensor, nn

import fxpath
from fxpath.errors import BranchError, InputError
from fxpath.methods import parse_method
from fxpath.methods.comparisons import InputIntGrad, Occlusion, SmoothGrad
from fxpath.methods.explained import Explained
from fxpath.network import Network
from fxpath.responses import Margin, OutputFunction, margin, neuron, pixel, probability, region
from fxpath.samples import Samples
from fxpath.selectors.baselines import generator_of


def slope(network: Network, x: Tensor, target: Tensor | None) -> Tensor:
    given = x.detach().clone().requires_grad_()
    return torch.autograd.grad(network.respond(given, target).sum(), given)[0]


SINGLE = [case for case in CASES if isinstance(case.x(1), Tensor) and case.name not in ("Break", "Unused")]
singles = pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.name)


@singles
def test_gradients_of_inputs(case: Case) -> None:
    model = case.model()
    network, x = case.trace(model), case.x(3)
    target = network.original(x).target
    expected = slope(network, x, target)
    with unchanged(model):
        assert torch.equal(parse_method("gradient").attribute(network, x), expected)
        assert torch.equal(parse_method("input_mct").attribute(network, x), x * expected)
    assert bool(expected.any())


def variation(network: Network, x: Tensor, target: Tensor | None, points: int = 2000) -> Tensor:
    """The total variation of the slope along the path from 0 to x, `(B,)`, on a fine grid."""
    total, before = torch.zeros(len(x), dtype=x.dtype), None
    for alpha in torch.linspace(1e-6, 1, points, dtype=x.dtype):
        now = (slope(network, alpha * x, target) * x).flatten(1).sum(1)
        total += 0 if before is None else (now - before).abs()
        before = now
    return total


@pytest.mark.parametrize("name", ["Plain", "ResidualIadd", "Depthwise", "SqueezeExcitation", "MLP", "Functional"])
def test_input_intgrad_is_complete(name: str) -> None:
    """Σ = Φ(x) − Φ(0), up to the variation of the slope over 2·steps; on the way x is what it was predicted to be."""
    network, x = traced(name), BY_NAME[name].x(3)
    target = network.original(x).target
    with torch.no_grad():
        expected = network.respond(x, target) - network.respond(torch.zeros_like(x), target)
    bound = variation(network, x, target)
    errors = []
    for steps in (2, 4, 16, 64, 256):  # weights of 1/steps are exact in captum's float32
        maps = InputIntGrad(steps).attribute(network, x)
        error = (maps.flatten(1).sum(1) - expected).abs()
        assert bool((error <= 1.02 * bound / (2 * steps) + 1e-12).all()), (steps, error, bound)
        errors.append(float(error.max()))
    assert errors[-1] < errors[0] / 20
    assert float(expected.abs().max()) > 10 * errors[-1]


def test_input_intgrad_of_a_homogeneous_network_is_exact() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3, bias=False)
    ).double()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    network = fxpath.trace(model.eval(), x)
    product = parse_method("input_mct").attribute(network, x)
    for steps, tolerance in ((2, 1e-12), (8, 1e-12), (50, 1e-7)):
        found = InputIntGrad(steps).attribute(network, x)
        torch.testing.assert_close(found, product, rtol=tolerance, atol=1e-12)
        torch.testing.assert_close(found.flatten(1).sum(1), network.original(x).response, rtol=tolerance, atol=1e-12)


@singles
def test_input_intgrad_is_a_mean_of_gradients(case: Case) -> None:
    network, x = case.trace(), case.x(2)
    target = network.original(x).target
    total = torch.zeros_like(x)
    for step in range(8):
        total += slope(network, (step + 0.5) / 8 * x, target) / 8
    torch.testing.assert_close(InputIntGrad(8).attribute(network, x), x * total, rtol=1e-10, atol=1e-13)


def noises(name: Any, shape: tuple[int, ...], samples: int, seed: int = 0) -> Tensor:
    generator = generator_of(seed, f"smooth_grad\0{name}")
    return torch.from_numpy(generator.standard_normal((samples, *shape), dtype="float32")).double()


def test_smooth_grad_is_a_mean_of_gradients() -> None:
    samples = photos()
    x = samples.inputs * torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64).view(3, 1, 1, 1)  # of different ranges
    samples = dataclasses.replace(samples, inputs=x)
    target = network().original(x).target
    maps = SmoothGrad(6, 0.2, 5).attribute(network(), samples)
    for row in range(3):
        drawn = noises(f"photo {row}", (3, 32, 32), 6, seed=5)
        assert abs(float(drawn.std()) - 1) < 0.02
        noisy = x[row] + 0.2 * (x[row].max() - x[row].min()) * drawn
        expected = slope(network(), noisy, target[row].expand(6)).mean(0)
        torch.testing.assert_close(maps[row], expected, rtol=1e-9, atol=1e-12)
    none = SmoothGrad(2, 0.0).attribute(network(), samples)
    torch.testing.assert_close(none, parse_method("gradient").attribute(network(), samples), rtol=1e-9, atol=1e-12)


def test_smooth_grad_is_captums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same noise, and one deviation as captum has it."""
    x, samples = photos(1).inputs, photos(1)
    target = int(network().original(x).target)
    drawn = noises("photo 0", (3, 32, 32), 5)
    monkeypatch.setattr(torch, "normal", lambda mean, deviation: deviation * drawn)
    expected = NoiseTunnel(Saliency(lambda x: network().respond(x, target))).attribute(
        x.clone().requires_grad_(), nt_samples=5, stdevs=float(0.15 * (x.max() - x.min())), abs=False
    )
    torch.testing.assert_close(SmoothGrad(5).attribute(network(), samples), expected, rtol=1e-9, atol=1e-12)


def test_what_decides_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = photos()
    maps = SmoothGrad(3).attribute(network(), samples)
    before = torch.get_rng_state(), np.random.get_state(legacy=False)  # noqa: NPY002
    assert torch.equal(SmoothGrad(3).attribute(network(), samples), maps)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state(legacy=False)) == str(before[1])  # noqa: NPY002
    torch.manual_seed(99)
    assert torch.equal(SmoothGrad(3).attribute(network(), samples), maps)
    assert torch.equal(SmoothGrad(3).attribute(network(), samples.take([1])), maps[1:2])  # bit for bit
    assert not torch.allclose(SmoothGrad(3, seed=1).attribute(network(), samples), maps)
    renamed = dataclasses.replace(samples, ids=["photo 0", "other", "photo 2"])
    assert [torch.equal(a, b) for a, b in zip(SmoothGrad(3).attribute(network(), renamed), maps, strict=True)] == [
        True, False, True,
    ]  # fmt: skip
    monkeypatch.setattr(Explained, "rows", 2)  # more runs, the same noise
    torch.testing.assert_close(SmoothGrad(3).attribute(network(), samples), maps, rtol=1e-9, atol=1e-12)


def brute_force(network: Network, x: Tensor, size: int, stride: int, target: Tensor | None) -> Tensor:
    """Occlusion by a loop over windows, `(B, 1, H, W)`."""
    height, width = x.shape[2:]
    total, windows = torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, :1])
    with torch.no_grad():
        whole = network.respond(x, target)
        for top in range(0, height - size + stride, stride):
            for left in range(0, width - size + stride, stride):
                window = (..., slice(top, top + size), slice(left, left + size))
                occluded = x.clone()
                occluded[window] = 0
                total[window] += (whole - network.respond(occluded, target)).view(-1, 1, 1, 1)
                windows[window] += 1
    return total / windows


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (2, 2), (3, 2), (3, 1), (4, 3), (5, 5)])
def test_occlusion_is_a_loop_over_windows(size: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Plain", "ReusedInPlaceReLU", "BatchNormless", "SqueezeExcitation"):
        if name == "BatchNormless":  # a rectangle, and more of them at once than fit in a run
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 6, 4)).double().eval()
            x = torch.randn(2, 1, 6, 8, dtype=torch.float64)
            network = fxpath.trace(model, x)
            monkeypatch.setattr(Explained, "rows", 7)
        else:
            network, x = traced(name), BY_NAME[name].x(2)
        target = network.original(x).target
        found = Occlusion(size, stride).attribute(network, x)
        expected = brute_force(network, x, size, stride, target)
        assert found.shape == (2, 1, *x.shape[2:])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # captum's last step is in float32
        assert bool(found.any())


def test_occlusion_of_other_shapes() -> None:
    network, x = traced("Conv1d"), BY_NAME["Conv1d"].x(2)
    found = Occlusion(2, 2).attribute(network, x)
    assert found.shape == (2, 1, 6)
    target = network.original(x).target
    whole = network.respond(x, target)
    for left in (0, 2, 4):
        occluded = x.clone()
        occluded[..., left : left + 2] = 0
        expected = (whole - network.respond(occluded, target)).detach()
        for place in (left, left + 1):
            torch.testing.assert_close(found[:, 0, place], expected, rtol=1e-6, atol=1e-9)
    with pytest.raises(InputError, match=r"occlusion: expected inputs \(B, C, H, W\).*found \(2, 4\)"):
        Occlusion().attribute(traced("MLP"), BY_NAME["MLP"].x(2))
    with pytest.raises(InputError, match=r"occlusion: expected a size of at most 5, the image's, found 6"):
        Occlusion(6).attribute(traced("Plain"), BY_NAME["Plain"].x(2))


def test_classes_are_those_of_x_at_perturbed_inputs_too() -> None:
    """Without its one bright pixel the sample is of another class."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)).double().eval()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.zero_()
        model[3].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]))
        model[3].bias.copy_(torch.tensor([0.0, 2.0]))
    x = torch.tensor([[[[3.0, 1.0], [1.0, 1.0]]]], dtype=torch.float64)
    network = fxpath.trace(model, x)
    assert Occlusion().attribute(network, x).flatten().tolist() == [3, 0, 0, 0]
    assert InputIntGrad(4).attribute(network, x).flatten().tolist() == [3, 0, 0, 0]
    assert SmoothGrad(4, 1.0).attribute(network, x)[0, 0, 0, 0] == 1  # the noise reaches below 2 as well


# --- responses ------------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """A map of class scores `(B, 4, H, W)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x)))


RESPONSES: dict[str, tuple[Any, Callable[[], nn.Module]]] = {
    "margin": (margin, BY_NAME["Plain"].build),
    "margin against": (Margin(against=1), BY_NAME["Plain"].build),
    "probability": (probability, BY_NAME["Plain"].build),
    "function": (OutputFunction(lambda output: output[:, 2] - output.abs().mean(1)), BY_NAME["Plain"].build),
    "pixel": (pixel(1, 2), Dense),
    "region": (region(0, 0, 3, 3), Dense),
    "hidden": (neuron("2.relu", (0, 0, 3)), lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), Dense())),
    "hidden channel": (neuron("2.conv1", channel=1), lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), Dense())),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_responses(name: str) -> None:
    response, build = RESPONSES[name]
    torch.manual_seed(5)
    model, x = build().double().eval(), torch.randn(2, 2, 5, 5, dtype=torch.float64)
    network = fxpath.trace(model, x, response=response)
    target = network.original(x).target
    assert (target is None) == name.startswith(("function", "hidden"))
    expected = slope(network, x, target)
    assert bool(expected.flatten(1).any(1).all())
    with unchanged(model):
        found = {text: quick(text, 3).attribute(network, x) for text in NAMES}
    assert torch.equal(found["gradient"], expected)
    assert torch.equal(found["input_mct"], x * expected)
    total = sum(slope(network, (step + 0.5) / 4 * x, target) / 4 for step in range(4))
    torch.testing.assert_close(found["input_intgrad"], x * total, rtol=1e-9, atol=1e-12)
    one = Occlusion(2, 1).attribute(network, x)
    torch.testing.assert_close(one, brute_force(network, x, 2, 1, target), rtol=1e-6, atol=1e-9)
    assert bool(found["grad_cam"].isfinite().all())


def test_responses_that_hold_a_number_for_every_sample() -> None:
    """They can be asked of this batch alone, and not of other ones."""
    weights = torch.rand(3, 4, dtype=torch.float64)
    case = BY_NAME["Plain"]
    network, x = case.trace(response=lambda output: (output * weights).sum(1)), case.x(3)
    for text in ("gradient", "input_mct", "guided_backprop", "grad_cam", "neuron_mct@0.97"):
        assert parse_method(text).attribute(network, x).shape[0] == 3
    for text in ("input_intgrad:steps=5", "smooth_grad:samples=5", "occlusion"):
        with pytest.raises(InputError, match=r"it cannot read the network's output|one real number"):
            parse_method(text).attribute(network, x)


class Cut(nn.Module):
    """No gradient comes back to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 3, 3), nn.Linear(27, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x.detach())).flatten(1))


def test_responses_that_do_not_depend_on_the_input_have_maps_of_zeros() -> None:
    x = BY_NAME["Break"].x(2)
    frozen = Cut().double().eval().requires_grad_(False)
    for each in (traced("Break"), fxpath.trace(Cut().double().eval(), x), fxpath.trace(frozen, x)):
        for text in ("gradient", "input_mct", "input_intgrad", "smooth_grad", "guided_backprop"):
            assert not bool(quick(text).attribute(each, x).any())
        assert bool(Occlusion().attribute(each, x).any())
        assert bool(parse_method("grad_cam:rectify=False").attribute(each, x).any())


def test_other_branches_of_perturbed_inputs_are_said() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.fc1(x))
            return self.fc2(h * 2 if x.amax(1).min() > 1 else h)

    x = torch.tensor([[2.0, 0.1, 0.2, 0.3]])
    with pytest.warns(fxpath.errors.TraceWarning):
        network = fxpath.trace(Branching().eval(), x, fix_branches=True)
    parse_method("input_mct").attribute(network, x)
    with pytest.raises(BranchError, match="the graph holds the branch of the example"):
        InputIntGrad(2).attribute(network, x)  # at x/4


def test_memory_is_bounded() -> None:
    """However many steps there are, no more rows run at once than fit."""
    network, x = traced("Plain"), BY_NAME["Plain"].x(2)
    assert Explained.of("test", network, x, None).rows == 512
    seen: list[int] = []
    run = network._run

    counted = copy.copy(network)
    counted._run = lambda samples, gates: seen.append(samples.batch) or run(samples, gates)  # type: ignore[method-assign,func-returns-value]
    for method in (InputIntGrad(1100), SmoothGrad(1100)):
        seen.clear()
        method.attribute(counted, x)
        assert seen == [2, *[512, 512, 76] * 2]
    torch.manual_seed(0)
    for channels, side, rows in ((15, 2**11, 1), (7, 2**10, 4), (1, 2**10, 16)):
        model = nn.Sequential(nn.Conv2d(1, channels, 1), nn.ReLU(), nn.AvgPool2d(side), nn.Flatten()).eval()
        x = torch.zeros(1, 1, side, side)
        assert Explained(fxpath.trace(model, x, check=False), Samples(x), None).rows == rows
