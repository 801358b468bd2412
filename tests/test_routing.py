"""DGR: the descent against finite differences and a naive one, what is kept of it, and what is selected."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision
from footprint import Watched, require_clean_failures, unchanged
from networks import BY_NAME, CASES, Case, traced
from small_jobs import inputs as pictures
from small_jobs import small
from test_leaks import Sighted, tensors, uncollected
from test_leaks import traced as watched
from torch import Tensor, nn

import fxpath
from fxpath import progress
from fxpath.errors import InputError, RestrictionError, SparsityError
from fxpath.gates import Restriction
from fxpath.items import Item
from fxpath.microbatch import Recipe, compute_rows
from fxpath.network import Network
from fxpath.ranks import rank_correlation
from fxpath.responses import OutputFunction
from fxpath.samples import Samples
from fxpath.selectors import baselines
from fxpath.selectors.ground import Ground
from fxpath.selectors.registry import family, parameters, parse
from fxpath.selectors.routing import DGR, PRESETS, Routing

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Small(nn.Module):
    """Three gated activations with a skip and a concatenation; logits far apart, so that the loss has a say."""

    sites = ("relu", "relu_1", "relu_2")

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.conv3, self.fc = nn.Conv2d(6, 4, 3), nn.Linear(36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(x, (None, None, None))

    def gated(self, x: Tensor, gates: Sequence[Tensor | None]) -> Tensor:
        """The same with a factor on each activation."""
        first, second, third = gates
        h = F.relu(self.conv1(x))
        h = h if first is None else h * first
        k = F.relu(self.conv2(h) + h)
        k = k if second is None else k * second
        k = F.relu(self.conv3(torch.cat([h, k], 1)))
        k = k if third is None else k * third
        return self.fc(k.flatten(1))


def model_of(kind: type[nn.Module], seed: int = 3, *, scale: float = 12.0) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = kind().to(torch.float64).eval()
        with torch.no_grad():
            model.fc.weight *= scale
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return model_of(Small)


@pytest.fixture(scope="module")
def network(model: nn.Module) -> Network:
    return fxpath.trace(model, torch.randn(2, 2, 5, 5, dtype=torch.float64))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@dataclass
class Naive:
    gates: Tensor
    touched: Tensor
    iterate: int
    ce: list[float]
    l1: list[float]
    gamma: float = 0.0
    restarts: int = 0


def naive_once(model: Any, x: Tensor, shapes: list[torch.Size], start: Tensor, setting: DGR, gamma: float) -> Naive:
    """Eq. 3 for one sample `(1, …)`, with torch's own optimiser and everything written out."""
    p = model(x).softmax(1).detach()
    sizes = [shape.numel() for shape in shapes]
    gates = [nn.Parameter(g.reshape(s).clone()) for g, s in zip(start.split(sizes), shapes, strict=True)]
    optimiser = torch.optim.SGD(gates, lr=setting.lr, momentum=setting.momentum)
    touched = torch.zeros_like(start, dtype=torch.bool)
    found = Naive(torch.full_like(start, torch.nan), touched.clone(), -1, [], [])
    lowest = float("inf")
    for number in range(setting.iterations + 1):
        output = model.gated(x, gates)
        ce = -(p * output.log_softmax(1)).sum()
        l1 = gamma * sum(gate.sum() for gate in gates)
        found.ce.append(ce.item())
        found.l1.append(l1.item())
        if output.argmax() == p.argmax() and (ce + l1).item() < lowest:
            lowest = (ce + l1).item()
            found.iterate, found.touched = number, touched.clone()
            found.gates = torch.cat([gate.detach().flatten() for gate in gates])
        slopes = torch.autograd.grad(ce, gates, retain_graph=True)
        touched |= torch.cat([slope.flatten() for slope in slopes]) != 0
        optimiser.zero_grad()
        (ce + l1).backward()
        optimiser.step()
        with torch.no_grad():
            for gate in gates:
                gate.clamp_(0, 100)
    return found


def naive(model: Any, x: Tensor, shapes: list[torch.Size], start: Tensor, setting: DGR) -> Naive:
    for restart in range(20):
        gamma = setting.gamma / 10**restart
        found = replace(naive_once(model, x, shapes, start, setting, gamma), gamma=gamma, restarts=restart)
        if found.iterate >= 0 or setting.init != "r" or setting.lr * gamma * setting.iterations < 0.05 * 0.1:
            break
    return found


def kept_of(network: Network, x: Tensor, found: Routing) -> Tensor:
    """The output of the network with the gates that a descent kept."""
    blocks = [found.gates[:, site.slice].reshape(-1, *site.gate_shape) for site in found.index.sites]
    with network.restricted(Restriction(blocks, [None] * len(blocks))):
        return network(x)


# --- the descent ----------------------------------------------------------------------------------------------------


def slope_of(network: Network, x: Any, start: Tensor, *, per_channel: bool = False) -> Tensor:
    """∂CE/∂λ at `start` as one small step of DGR shows it; NaN where the step was no descent."""
    lr = 1e-4
    found = DGR(iterations=1, lr=lr, momentum=0, gamma=0, per_channel=per_channel, tolerance=9).optimise(
        network, x, start
    )
    return torch.where((found.diagnostics["iterate"] == 1).unsqueeze(1), (start - found.gates) / lr, torch.nan)


@pytest.mark.parametrize("name", ["Functional", "ResidualOntoReLU", "Concat", "BatchFolded", "SqueezeExcitation",
                                  "Unused", "DictInput", "ViewSlice", "ScalarOutput"])  # fmt: skip
@pytest.mark.parametrize("granularity", ["unit", "channel"])
def test_the_gradient_is_that_of_finite_differences(name: str, granularity: str) -> None:
    case, net = BY_NAME[name], traced(name, granularity)
    inputs, draw = case.x(2, seed=4), np.random.default_rng(0)
    start = torch.from_numpy(draw.uniform(0.8, 1.3, (2, net.index.size)))
    original = net(inputs)
    logits = net.response.logits(original)

    def loss(gates: Tensor) -> Tensor:
        scale = [gates[:, site.slice].reshape(-1, *site.gate_shape) for site in net.sites]
        with torch.no_grad(), net.restricted(Restriction(scale, [None] * len(scale))):
            output = net(inputs)
        if logits is None:
            return ((original - output) / original).square()
        return F.cross_entropy(net.response.logits(output), logits.softmax(1), reduction="none")

    found = slope_of(net, inputs, start)
    good = ~found.isnan().any(dim=1)
    assert bool(good.any())
    for gate in draw.choice(net.index.size, 12):
        shift = torch.zeros_like(start)
        shift[:, gate] = 1e-5
        expected = (loss(start + shift) - loss(start - shift)) / 2e-5
        torch.testing.assert_close(found[good, gate], expected[good], rtol=1e-5, atol=1e-8)
    assert bool((found[good] != 0).any())


SETTINGS = {
    "as in the paper": DGR(lr=0.08, gamma=0.02, iterations=60),
    "wang2018": DGR(preset="wang2018"),
    "from random gates": DGR(init="r", seed=2, lr=0.05, gamma=0.05, iterations=60),
    "channels, random": DGR(init="r", lr=0.1, gamma=0.5, iterations=30, per_channel=True),
    "a fifth": DGR(init=0.2, lr=0.2, gamma=0.02, momentum=0.5, iterations=40),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_descent_is_the_naive_one(setting: DGR, model: nn.Module, network: Network, x: Tensor) -> None:
    ids = ["p", "q", "r", "s"]
    found = setting.optimise(network, Samples(x, ids=ids))
    shapes = [torch.Size((site.shape[0], 1, 1) if setting.per_channel else site.shape) for site in network.sites]
    assert found.index.size == sum(shape.numel() for shape in shapes)
    for row, name in enumerate(ids):
        start = torch.full((found.index.size,), 0.0 if setting.init == "r" else setting.init, dtype=torch.float64)
        if setting.init == "r":
            start = torch.from_numpy(baselines.generator_of(setting.seed, name).random(found.index.size))
        expected = naive(model, x[row : row + 1], shapes, start, setting)
        diagnostics = {key: value[row] for key, value in found.diagnostics.items()}
        assert int(diagnostics["iterate"]) == expected.iterate
        assert int(diagnostics["restarts"]) == expected.restarts
        assert float(diagnostics["gamma"]) == expected.gamma
        assert bool(diagnostics["keeps_class"]) == (expected.iterate >= 0)
        torch.testing.assert_close(found.start[row], start, rtol=0, atol=0)
        torch.testing.assert_close(found.gates[row], expected.gates, rtol=0, atol=1e-10, equal_nan=True)
        assert torch.equal(found.touched[row], expected.touched)
        np.testing.assert_allclose(diagnostics["ce"], expected.ce, rtol=1e-6)
        np.testing.assert_allclose(diagnostics["l1"], expected.l1, rtol=1e-6)
        assert float(diagnostics["untouched"]) == 1 - expected.touched.double().mean()


def test_the_settings_above_reach_every_corner(network: Network, x: Tensor) -> None:
    """Else the comparison with the naive descent would say little: clamps, gates above 1, lost classes, restarts."""
    samples = Samples(x, ids=["p", "q", "r", "s"])
    found = {name: setting.optimise(network, samples) for name, setting in SETTINGS.items()}
    paper = found["as in the paper"]
    assert bool((paper.gates == 0).any())
    assert bool((paper.gates > 1).any())
    assert 0 < paper.touched.double().mean() < 1
    iterates = torch.cat([each.diagnostics["iterate"] for each in found.values()])
    lengths = torch.cat([torch.full((4,), setting.iterations) for setting in SETTINGS.values()])
    assert bool(((iterates > 0) & (iterates < lengths)).any())
    assert bool((iterates == -1).any())
    restarts = found["from random gates"].diagnostics
    assert restarts["restarts"].tolist() == [0, 0, 2, 1]
    assert restarts["keeps_class"].tolist() == [True, True, False, True]


def test_channel_granularity_has_the_same_gates_as_per_channel(model: nn.Module, network: Network, x: Tensor) -> None:
    coarse = fxpath.trace(model, x[:2], granularity="channel")
    setting = DGR(preset="wang2018", init="r")
    one, other = setting.optimise(network, x), setting.optimise(coarse, x)
    assert torch.equal(one.gates, other.gates)
    assert torch.equal(one.touched, other.touched)
    plain = DGR(init="r", lr=0.1, gamma=0.05, iterations=30).optimise(coarse, x)
    assert torch.equal(plain.gates, other.gates)


def test_untouched_gates_follow_their_closed_form() -> None:
    """Dead neurons, and a site that the output does not depend on."""
    for name in ("Plain", "Unused", "Concat"):
        net, inputs = traced(name), BY_NAME[name].x(3)
        for lr, mu, gamma, n in ((0.01, 0.9, 0.01, 40), (0.02, 0.5, 0.3, 17), (0.1, 0, 0.1, 9)):
            found = DGR(lr=lr, momentum=mu, gamma=gamma, iterations=n).optimise(net, inputs)
            assert bool((~found.touched).any(dim=1).all())
            for row, kept in enumerate(found.diagnostics["iterate"].tolist()):
                expected = 1 - lr * gamma / (1 - mu) * (kept - mu * (1 - mu**kept) / (1 - mu))
                own = found.gates[row][~found.touched[row]]
                torch.testing.assert_close(own, torch.full_like(own, expected), rtol=0, atol=1e-13)
    paper = 1 - 0.01 * 0.01 / 0.1 * (999 - 0.9 * (1 - 0.9**999) / 0.1)
    assert round(paper, 3) == 0.01


def test_the_iterate_that_is_kept(network: Network, x: Tensor) -> None:
    """It answers as its loss says, keeps the class, and no other that does had a lower loss."""
    original = network(x)
    for setting in SETTINGS.values():
        found = setting.optimise(network, x)
        good = found.diagnostics["keeps_class"]
        output = kept_of(network, x, found)[good]
        assert bool(good.any())
        assert torch.equal(output.argmax(1), original.argmax(1)[good])
        kept = found.diagnostics["iterate"][good].long().unsqueeze(1)
        ce = F.cross_entropy(output, original[good].softmax(1), reduction="none").float()
        torch.testing.assert_close(found.diagnostics["ce"][good].gather(1, kept)[:, 0], ce)
        l1 = (found.diagnostics["gamma"] * found.gates.sum(1))[good].float()
        torch.testing.assert_close(found.diagnostics["l1"][good].gather(1, kept)[:, 0], l1)
        assert bool(found.gates[~good].isnan().all())


def test_the_last_iterate_is_evaluated_and_the_first(network: Network, x: Tensor) -> None:
    found = DGR(iterations=1, lr=1e-4).optimise(network, x)
    assert found.diagnostics["ce"].shape == found.diagnostics["l1"].shape == (4, 2)
    assert found.diagnostics["iterate"].tolist() == [1] * 4
    assert found.diagnostics["keeps_class"].all()
    worse = DGR(iterations=1, lr=1e4).optimise(network, x)  # one step closes every gate
    shut = [torch.zeros(1, *site.shape, dtype=torch.float64) for site in network.sites]
    with network.restricted(Restriction(shut, [None] * 3)):
        closed = network(x).argmax(1)
    gone = network(x).argmax(1) != closed
    assert set(gone.tolist()) == {True, False}
    assert worse.diagnostics["iterate"].tolist() == [0 if lost else 1 for lost in gone]
    assert bool((worse.gates[gone] == 1).all())
    assert not worse.touched[gone].any()


# --- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [SETTINGS["from random gates"], SETTINGS["wang2018"]], ids=["units", "channels"])
def test_a_sample_does_not_depend_on_its_neighbours(setting: DGR, network: Network, x: Tensor) -> None:
    ids = ["p", "q", "r", "s"]
    whole = setting.optimise(network, Samples(x, ids=ids))
    turned = setting.optimise(network, Samples(x.flip(0), ids=ids[::-1]))
    alone = [setting.optimise(network, Samples(x[row : row + 1], ids=[name])) for row, name in enumerate(ids)]
    torch.testing.assert_close(turned.gates.flip(0), whole.gates, rtol=0, atol=1e-12, equal_nan=True)
    assert torch.equal(turned.touched.flip(0), whole.touched)
    single = torch.cat([each.gates for each in alone])
    torch.testing.assert_close(single, whole.gates, rtol=0, atol=1e-12, equal_nan=True)
    for name, values in whole.diagnostics.items():
        torch.testing.assert_close(turned.diagnostics[name].flip(0), values, rtol=1e-6, atol=0, equal_nan=True)
        together = torch.cat([each.diagnostics[name] for each in alone])
        torch.testing.assert_close(together, values, rtol=1e-6, atol=0, equal_nan=True)
    repeated = setting.optimise(network, Samples(x[[1, 1, 1, 1]], ids=["q"] * 4))
    torch.testing.assert_close(repeated.gates[3], whole.gates[1], rtol=0, atol=1e-12)


def test_random_gates_are_of_seed_and_id(network: Network, x: Tensor) -> None:
    def start(seed: int, ids: Sequence[int | str] | None) -> Tensor:
        return DGR(init="r", seed=seed, iterations=1).optimise(network, Samples(x, ids=ids)).start

    first = start(0, ["p", "q", "r", "s"])
    assert torch.equal(start(0, ["p", "q", "r", "s"]), first)
    assert torch.equal(start(0, ["s", "r", "q", "p"]), first.flip(0))
    assert not torch.equal(start(1, ["p", "q", "r", "s"]), first)
    assert torch.equal(start(0, None), start(0, [0, 1, 2, 3]))
    assert len({tuple(row.tolist()) for row in first}) == 4
    assert 0 <= first.min() < 0.05
    assert 0.95 < first.max() < 1


class Biased(nn.Module):
    """With all gates closed it answers class 1; the single neuron h = relu(x) speaks for class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 2)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[1.0], [-1.0]]))
            self.fc.bias.copy_(torch.tensor([0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(x))


@pytest.fixture(scope="module")
def biased() -> Network:
    return fxpath.trace(Biased().double().eval(), torch.ones(2, 1, dtype=torch.float64))


def test_without_an_iterate_that_keeps_the_class(biased: Network) -> None:
    x = torch.tensor([[2.0], [-1.0], [0.3]], dtype=torch.float64)  # classes 0, 1 (h is dead) and 1
    selection = DGR(init=0.2, gamma=10, iterations=20).select(biased, x, (0, 0.5))
    first, second, third = selection.missing[0]
    assert first == "no iterate kept the class"
    assert second == "the loss had no gradient at any gate, so that no gate has evidence for it"
    assert third == "every gate that has evidence is 0"
    assert selection.diagnostics["iterate"].tolist()[0] == -1
    assert selection.diagnostics["keeps_class"].tolist() == [False, True, True]
    assert selection.diagnostics["restarts"].tolist() == [0, 0, 0]
    assert selection.pathways[0].mask.tolist() == [[False], [False], [False]]  # the third closes its gate
    assert selection.by_sparsity[0]["chance_jaccard"].isnan().tolist() == [True, True, True]
    with pytest.raises(SparsityError, match="sample 0, 1, 2 of the batch: no iterate kept the class"):
        selection[0]
    stays = DGR(lr=1000, iterations=3).select(biased, x[:1], (0,))
    assert "no iterate was better than the initial gates" in stays.missing[0][0]


def test_gates_stay_within_their_bounds(biased: Network) -> None:
    x = torch.tensor([[2.0], [0.3]], dtype=torch.float64)  # the loss wants the first gate open, the second closed
    found = DGR(init=1, lr=1e6, gamma=1e-9, iterations=2).optimise(biased, x, torch.tensor([[0.2], [5.0]]))
    assert found.gates.tolist() == [[100], [0]]
    assert found.diagnostics["iterate"].tolist() == [1, 1]


def test_gamma_is_divided_until_an_iterate_keeps_the_class(biased: Network) -> None:
    x = torch.tensor([[2.0], [2.0], [-1.0]], dtype=torch.float64)
    init = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64).unsqueeze(1)
    setting = DGR(init="r", lr=0.1, momentum=0.5, gamma=10, iterations=30)
    found = setting.optimise(biased, x, init)
    restarts = found.diagnostics["restarts"].tolist()
    assert restarts[0] > 0
    assert restarts[1:] == [0, 0]
    assert found.diagnostics["gamma"].tolist() == [10 / 10 ** restarts[0], 10, 10]
    lone = replace_numbers(setting, gamma=10 / 10 ** restarts[0]).optimise(biased, x[:1], init[:1])
    assert torch.equal(lone.gates[0], found.gates[0])
    assert torch.equal(lone.diagnostics["ce"][0], found.diagnostics["ce"][0])
    higher = replace_numbers(setting, gamma=10 / 10 ** (restarts[0] - 1), init=0.2).optimise(biased, x[:1])
    assert higher.diagnostics["iterate"].tolist() == [-1]
    never = replace_numbers(setting, lr=1e-4).optimise(biased, x[:1], init[:1])
    assert never.diagnostics["restarts"].tolist() == [1]  # 10 moves a gate by 0.06 at most, 1 by 0.006
    assert never.diagnostics["gamma"].tolist() == [1]
    assert never.reasons == ("no iterate kept the class",)
    assert DGR(init="r", gamma=0, lr=1e-4, iterations=2).optimise(biased, x[:1], init[:1]).diagnostics[
        "restarts"
    ].tolist() == [0]


def replace_numbers(setting: DGR, **changes: Any) -> DGR:
    return DGR(**{**parameters(setting), "preset": None, **changes})


def test_samples_whose_loss_is_no_number() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            with torch.no_grad():
                self.fc.weight.copy_(torch.eye(2))
                self.fc.bias.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(x).exp())

    net = fxpath.trace(Steep().double().eval(), torch.ones(2, 2, dtype=torch.float64))
    x = torch.tensor([[20.0, 9.0], [1.0, 2.0]], dtype=torch.float64)
    init = torch.tensor([[100.0, 100.0], [1.0, 1.0]])  # e²⁰⁰⁰ is no float64
    found = DGR(init="r", iterations=5).optimise(net, x, init)
    assert found.reasons == ("the loss of the initial gates is NaN or infinite", "")
    assert found.diagnostics["ce"].isnan().tolist() == [[True] * 6, [False] * 6]
    assert found.diagnostics["restarts"].tolist() == [0, 0]
    alone = DGR(iterations=5).optimise(net, x[1:])
    assert torch.equal(alone.gates[0], found.gates[1])
    near = torch.tensor([[0.1, 0.9], [0.9, 0.9]])
    leaps = DGR(iterations=4, lr=1, gamma=1e-9, momentum=0).optimise(net, x, near)
    assert leaps.diagnostics["ce"][0, 0].isfinite()  # the class is lost, and the first step goes to gates of 100
    assert leaps.diagnostics["ce"][0, 1:].isnan().all()
    assert leaps.diagnostics["l1"][0, 1:].isnan().all()
    assert leaps.diagnostics["keeps_class"].tolist() == [False, True]
    assert leaps.diagnostics["ce"][1].isfinite().all()


def test_classes_that_cannot_be_are_left_out_of_the_loss() -> None:
    class Barred(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.tensor([0, 0, -torch.inf, 0], dtype=x.dtype)

    net, x = fxpath.trace(model_of(Barred), torch.ones(2, 2, 5, 5, dtype=torch.float64)), BY_NAME["Plain"].x(2)
    found = DGR(iterations=4).optimise(net, x)
    assert found.diagnostics["ce"].isfinite().all()
    assert found.touched.any()


# --- responses ------------------------------------------------------------------------------------------------------


def total(output: Tensor) -> Tensor:
    return output.square().sum(1) - 3


def test_a_response_without_classes(model: nn.Module, x: Tensor) -> None:
    net = fxpath.trace(model, x[:2], response=total)
    setting = DGR(lr=0.05, gamma=0.05, iterations=40, tolerance=0.05)
    found = setting.optimise(net, x)
    original = total(model(x)).detach()
    for row in range(4):
        gates = nn.Parameter(torch.ones(net.index.size, dtype=torch.float64))
        optimiser = torch.optim.SGD([gates], lr=0.05, momentum=0.9)
        lowest, kept, best = float("inf"), -1, None
        for number in range(41):
            blocks = [gates[site.slice].reshape(site.shape) for site in net.sites]
            error = (total(model.gated(x[row : row + 1], blocks)) / original[row] - 1)[0]  # type: ignore[operator]
            loss = error.square() + 0.05 * gates.sum()
            assert float(found.diagnostics["ce"][row, number]) == pytest.approx(error.item() ** 2, abs=1e-7)
            if abs(error.item()) <= 0.05 and loss.item() < lowest:
                lowest, kept, best = loss.item(), number, gates.detach().clone()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            gates.data.clamp_(0, 100)
        assert int(found.diagnostics["iterate"][row]) == kept
        assert best is not None
        torch.testing.assert_close(found.gates[row], best, rtol=0, atol=1e-10)
    error = total(kept_of(net, x, found)) / original - 1
    assert bool((error.abs() <= 0.05).all())
    assert bool((found.diagnostics["iterate"] < 40).any())  # the tolerance had a say


def test_a_response_of_zero_has_no_loss(model: nn.Module, x: Tensor) -> None:
    def first(output: Tensor) -> Tensor:
        return output[:, 0] * (output[:, 1].detach() > zero)

    zero = model(x)[:, 1].median().item()
    net = fxpath.trace(model, x[:2], response=first)
    gone = (net.respond(x) == 0).tolist()
    assert sorted(set(gone)) == [False, True]
    selection = DGR(iterations=5, tolerance=1).select(net, x, (0.5,))
    reasons = selection.reasons(0.5, 4)
    assert [reason.startswith("the response of the original network is 0") for reason in reasons] == gone
    assert [not reason for reason in reasons] == [not each for each in gone]
    strict = DGR(init=0.1, iterations=2, tolerance=1e-9).optimise(net, x)
    assert {reason for reason, each in zip(strict.reasons, gone, strict=True) if not each} == {
        "no iterate kept the response within 0%"
    }


def test_targets_and_responses_with_classes_change_nothing(model: nn.Module, network: Network, x: Tensor) -> None:
    setting = DGR(iterations=5)
    expected = setting.optimise(network, x)
    for response in ("probability", "margin"):
        other = setting.optimise(fxpath.trace(model, x[:2], response=response), Samples(x, target=2))
        assert torch.equal(other.gates, expected.gates)
    with pytest.raises(InputError, match="expected a class in 0 … 3, found 7"):
        setting.optimise(network, Samples(x, target=7))


# --- selection ------------------------------------------------------------------------------------------------------


def test_untouched_gates_are_never_selected(network: Network, x: Tensor) -> None:
    for setting in (SETTINGS["as in the paper"], DGR(init="r", seed=1, gamma=1e-4, lr=0.05, iterations=40)):
        found, selection = setting.optimise(network, x), setting.select(network, x, (0.0, 0.6, 0.9))
        worth = found.touched & (found.gates > 0)
        assert torch.equal(selection.pathways[0.0].mask, worth)
        assert bool((found.gates[~found.touched] > 0).any())
        assert bool((worth.sum(1) < network.index.size).all())
        for sparsity in (0.6, 0.9):
            mask = selection.pathways[sparsity].mask
            assert not bool((mask & ~worth).any())
            for row in range(4):
                count = min(int(worth[row].sum()), network.index.kept(sparsity))
                order = sorted(torch.nonzero(worth[row]).flatten().tolist(), key=lambda n: (-found.gates[row, n], n))
                assert sorted(order[:count]) == torch.nonzero(mask[row]).flatten().tolist()
        assert selection.scores is not None
        assert torch.equal(selection.scores.signed, found.gates.masked_fill(~found.touched, 0).nan_to_num())
        for sparsity, pathways in selection.pathways.items():
            d = pathways.density
            torch.testing.assert_close(selection.by_sparsity[sparsity]["chance_jaccard"], d / (2 - d), equal_nan=True)


def test_ties_go_to_the_smaller_index() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 2, bias=False)
            with torch.no_grad():
                self.fc.weight.copy_(torch.tensor([[1.0, 2, 1, 2, 0, 2], [0.0] * 6]))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(x))

    net = fxpath.trace(Twins().double().eval(), torch.ones(2, 6, dtype=torch.float64))
    x = torch.ones(1, 6, dtype=torch.float64)
    found = DGR(init=0.5, lr=0.1, gamma=0.01, iterations=5).optimise(net, x)
    gates = found.gates[0].tolist()
    assert gates[1] == gates[3] == gates[5] > gates[0] == gates[2] > gates[4]
    assert found.touched[0].tolist() == [True, True, True, True, False, True]  # the fifth has no say
    selection = DGR(init=0.5, lr=0.1, gamma=0.01, iterations=5).select(net, x, (0.0, 0.3, 0.6))
    assert selection[0.6].mask[0].int().tolist() == [0, 1, 0, 1, 0, 0]
    assert selection[0.3].mask[0].int().tolist() == [1, 1, 0, 1, 0, 1]
    assert selection[0.0].mask[0].int().tolist() == [1, 1, 1, 1, 0, 1]


@every
def test_channels_are_never_split(case: Case) -> None:
    fine, coarse = traced(case.name), traced(case.name, "channel")
    x, levels = case.x(3, seed=2), (0.0, 0.5, 0.8)
    setting = DGR(per_channel=True, lr=0.1, gamma=0.01, iterations=4, tolerance=1)
    units, channels = setting.select(fine, x, levels), setting.select(coarse, x, levels)
    found = setting.optimise(fine, x)
    assert units.missing == channels.missing
    for level in levels:
        own, other = units.pathways[level], channels.pathways[level]
        assert bool((own.count <= fine.index.kept(level)).all())
        assert torch.equal(own.count, other.count)
        for small_site, site in zip(fine.sites, coarse.sites, strict=True):
            block = own.mask[:, small_site.slice].reshape(3, *small_site.shape)
            whole = other.mask[:, site.slice].reshape(3, *site.gate_shape)
            assert torch.equal(block, whole.expand_as(block))
    for row in range(3):  # the next channel would not have fitted
        worth = torch.where(found.touched[row], found.gates[row], 0)
        order = [n for n in worth.argsort(descending=True, stable=True).tolist() if worth[n] > 0]
        spent = 0
        for number in order:
            if spent + found.index.weights[number] > fine.index.kept(0.5):
                break
            spent += found.index.weights[number]
        assert int(units.pathways[0.5].count[row]) == spent


@every
def test_whatever_the_network(case: Case) -> None:
    x = case.x(2, seed=1)
    for granularity in ("unit", "channel"):
        net = traced(case.name, granularity)
        for setting in (DGR(iterations=3, tolerance=1), DGR(init="r", iterations=2, gamma=0.001, tolerance=1)):
            selection = setting.select(net, x, (0.5, 0.9))
            found = selection.diagnostics
            assert found["ce"].shape == (2, setting.iterations + 1)
            assert {name: tuple(values.shape[1:]) for name, values in found.items() if name not in ("ce", "l1")} == (
                dict.fromkeys(("iterate", "keeps_class", "gamma", "restarts", "untouched", "spearman"), ())
            )
            assert found["ce"].isfinite().all()
            assert found["l1"].isfinite().all()
            losses = (found["ce"] + found["l1"]).double()
            for row, kept in enumerate(found["iterate"].tolist()):
                assert bool(found["keeps_class"][row]) == (kept >= 0)
                if setting.init == 1:
                    assert kept >= 0  # the original network keeps its own class
                    assert float(losses[row, kept]) <= float(losses[row, 0]) * (1 + 1e-6)
            for level, pathways in selection.pathways.items():
                assert level is not None
                assert bool((pathways.count <= net.index.kept(level)).all())
                reasons = selection.reasons(level, 2)
                assert all(not mask.any() for mask, why in zip(pathways.mask, reasons, strict=True) if why)


def test_rank_correlation_is_scipys() -> None:
    draw = np.random.default_rng(0)
    first = np.round(draw.random((6, 300)), 1)
    second = np.round(first + draw.random((6, 300)), 1)
    first[1], second[2, 7] = 0.5, np.nan
    second[3], second[4] = first[3], -first[4]
    found = rank_correlation(torch.from_numpy(first), torch.from_numpy(second)).numpy()
    assert np.isnan(found[[1, 2]]).all()
    for row in (0, 3, 4, 5):
        assert found[row] == pytest.approx(scipy.stats.spearmanr(first[row], second[row]).statistic, abs=1e-12)
    found = rank_correlation(torch.from_numpy(first).float(), torch.from_numpy(second).float()).numpy()
    assert found[3] == pytest.approx(1)


def test_spearman_of_gates_with_their_initial_values(network: Network, x: Tensor) -> None:
    setting = DGR(init="r", seed=2, lr=0.01, gamma=0.001, iterations=10)
    found = setting.optimise(network, x)
    kept = found.diagnostics["keeps_class"].tolist()
    assert any(kept)
    for row in range(4):
        value = float(found.diagnostics["spearman"][row])
        if kept[row]:
            assert value == pytest.approx(scipy.stats.spearmanr(found.start[row], found.gates[row]).statistic)
            assert value > 0.99
        else:
            assert np.isnan(value)
    assert DGR(iterations=2).optimise(network, x).diagnostics["spearman"].isnan().all()


# --- how it runs ----------------------------------------------------------------------------------------------------


class Viewed(Small):
    """A view that only the usual memory format allows."""

    def gated(self, x: Tensor, gates: Sequence[Tensor | None]) -> Tensor:
        return super().gated(x.view(-1, 50).view(-1, 2, 5, 5), gates)


class Strided(Small):
    """It reads its input as it lies in memory: another memory format would give other numbers."""

    def gated(self, x: Tensor, gates: Sequence[Tensor | None]) -> Tensor:
        return super().gated(torch.as_strided(x, (x.shape[0], 2, 5, 5), (50, 25, 5, 1)), gates)


@pytest.mark.parametrize(("kind", "last"), [(Small, True), (Viewed, False), (Strided, False)])
def test_images_run_channels_last_where_they_can(kind: type[Small], last: bool, x: Tensor) -> None:
    model = model_of(kind)
    net = fxpath.trace(model, x[:2])
    ground = Ground.of(net, net.samples(x))
    assert ground.samples.tensors[0].is_contiguous(memory_format=torch.channels_last) == last
    torch.testing.assert_close(ground.output, model(x), rtol=1e-12, atol=1e-12)
    setting = SETTINGS["as in the paper"]
    found = setting.optimise(net, x)
    start = torch.ones(net.index.size, dtype=torch.float64)
    expected = naive(model, x[:1], [torch.Size(site.shape) for site in net.sites], start, setting)
    torch.testing.assert_close(found.gates[0], expected.gates, rtol=0, atol=1e-10)


def test_an_error_of_the_network_is_not_taken_for_one_of_the_memory_format(x: Tensor) -> None:
    model = Sighted().double().eval()
    net = watched(model, x[:2])
    DGR(iterations=1).optimise(net, x)  # a trial may fail in any way
    model.relu.record.start(fails_at=4)  # the original takes three
    with pytest.raises(RuntimeError, match="this activation fails"):
        DGR(iterations=1).optimise(net, x)


def test_half_precision_has_gates_of_float32() -> None:
    model = BY_NAME["Plain"].model().to(torch.bfloat16)
    x = BY_NAME["Plain"].x(2).to(torch.bfloat16)
    found = DGR(iterations=20, lr=1e-4, gamma=1e-3).optimise(fxpath.trace(model, x), x)
    assert found.gates.dtype == torch.float32
    assert found.diagnostics["ce"].dtype == torch.float32
    own = found.gates[~found.touched]
    assert bool(((own < 1) & (own > 0.9999)).all())  # a step that bfloat16 does not know


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18"])
def test_on_real_architectures(name: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    x = torch.randn(2, 3, 40, 40)
    net = fxpath.trace(model, x)
    setting = DGR(iterations=4)
    found, selection = setting.optimise(net, x), setting.select(net, x, (0.9,))
    assert torch.equal(kept_of(net, x, found).argmax(1), model(x).argmax(1))
    assert 0 < float(found.diagnostics["untouched"].min()) < 1
    assert found.diagnostics["iterate"].tolist() == [4, 4]
    values = net.rows(net.activations(x))
    assert not bool((found.touched & (values == 0) & (found.start == found.gates)).any())
    assert bool((selection[0.9].count <= net.index.kept(0.9)).all())
    alone = setting.optimise(net, Samples(x[1:], ids=[1]))
    torch.testing.assert_close(alone.gates[0], found.gates[1], rtol=0, atol=1e-5)
    turned = setting.optimise(net, x.flip(0))
    assert torch.equal(turned.gates.flip(0), found.gates)  # to the bit: so are convolutions of this kind
    channels = DGR(preset="wang2018")
    assert torch.equal(channels.optimise(net, x.flip(0)).gates.flip(0), channels.optimise(net, x).gates)


def test_a_job_stores_it() -> None:
    net = small()
    shown = parse("dgr:iterations=3")
    recipe = Recipe(selectors=(shown, parse("dgr:init=r,iterations=2")), sparsities=(0.8,), micro_batch=2)
    rows = compute_rows(net, recipe, [Item(str(n), one) for n, one in enumerate(pictures()[:2])])
    stored = rows.pathways["dgr:iterations=3@0.8"]
    assert json.loads(json.dumps(stored.parameters)) == parameters(shown)
    selection = shown.select(net, Samples(pictures()[:2], ids=["0", "1"]), (0.8,))
    np.testing.assert_array_equal(stored.columns["mask"], selection[0.8].packed().numpy())
    assert stored.columns["diagnostics/ce"].shape == (2, 4)
    assert stored.columns["diagnostics/iterate"].dtype == np.int32
    density = stored.columns["density"]
    np.testing.assert_allclose(stored.columns["diagnostics/chance_jaccard"], density / (2 - density))
    assert set(rows.pathways) == {"dgr:iterations=3@0.8", "dgr:init=r,iterations=2@0.8"}


@pytest.mark.parametrize("setting", [DGR(iterations=3), DGR(init="r", iterations=2, per_channel=True)], ids=str)
def test_nothing_is_left_behind(setting: DGR) -> None:
    torch.manual_seed(0)
    model = Sighted().eval()
    x = torch.randn(3, 2, 6, 6)
    net, record = watched(model, x), model.relu.record
    setting.select(net, x, (0.5,))
    before = x.clone()
    with uncollected():
        count = tensors()
        record.start()
        with unchanged(model, net._module):
            setting.select(net, x, (0.5,))
        runs = record.calls
        assert runs >= 3 * (2 + setting.iterations + 1)
        assert record.alive() == 0
        call = partial(setting.select, net, x, (0.5,))
        require_clean_failures(net, model, record, range(1, runs + 1, 5), call)
        assert tensors() == count
    assert torch.equal(x, before)
    assert isinstance(model.relu, Watched)


def test_inference_mode_and_no_grad_change_nothing(network: Network, x: Tensor) -> None:
    setting = DGR(iterations=4)
    expected = setting.optimise(network, x)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            found = setting.optimise(network, x.clone())
            assert torch.equal(found.gates, expected.gates)
            assert len(setting.select(network, x.clone(), (0.5,))) == 1


def test_a_bar_shows_once_it_takes_long_and_not_within_a_job(
    network: Network, x: Tensor, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    DGR(iterations=2).optimise(network, x)
    assert capsys.readouterr().err == ""  # under two seconds
    made = progress.tqdm
    monkeypatch.setattr(progress, "tqdm", lambda *args, **named: made(*args, **{**named, "delay": 0}))
    DGR(iterations=2).optimise(network, x)
    assert "dgr" in capsys.readouterr().err
    with progress.no_bars():
        DGR(iterations=2).optimise(network, x)
    assert capsys.readouterr().err == ""


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "preset"),
    [
        ("dgr", "dgr", "paper"),
        ("dgr:preset=paper,init=1", "dgr", "paper"),
        ("dgr:init=r,seed=3", "dgr:init=r,seed=3", "paper"),
        ("dgr:init=0.5", "dgr:init=0.5", "paper"),
        ("dgr:preset=wang2018", "dgr:preset=wang2018", "wang2018"),
        ("dgr:preset=wang2018,init=r", "dgr:init=r,preset=wang2018", "wang2018"),
        ("dgr:per_channel=true,iterations=30,lr=0.1,gamma=0.05", "dgr:preset=wang2018", "wang2018"),
        ("dgr:preset=wang2018,iterations=30", "dgr:preset=wang2018", "wang2018"),
        ("dgr:iterations=100", "dgr:iterations=100", "custom"),
        ("dgr:preset=custom,iterations=100", "dgr:iterations=100", "custom"),
        ("dgr:preset=custom", "dgr", "paper"),
        ("dgr:gamma=1,per_channel=true", "dgr:gamma=1.0,per_channel=True", "custom"),
        ("dgr:tolerance=0.5", "dgr:tolerance=0.5", "paper"),
    ],
)
def test_names(text: str, name: str, preset: str) -> None:
    setting = parse(text)
    assert isinstance(setting, DGR)
    assert str(family(setting)) == name
    assert setting.preset == preset
    assert parse(name) == setting
    assert hash(parse(name)) == hash(setting)
    assert DGR(**parameters(setting)) == setting
    stored = json.loads(json.dumps(parameters(setting)))
    assert stored["preset"] == preset
    if preset in PRESETS:
        assert {key: stored[key] for key in PRESETS[preset]} == PRESETS[preset]


def test_the_presets() -> None:
    one = DGR()
    assert (one.lr, one.momentum, one.gamma, one.iterations, one.per_channel, one.init) == (
        0.01,
        0.9,
        0.01,
        1000,
        False,
        1,
    )
    two = DGR(preset="wang2018")
    assert (two.lr, two.momentum, two.gamma, two.iterations, two.per_channel) == (0.1, 0.9, 0.05, 30, True)
    assert DGR(init=np.float32(0.5), iterations=np.int64(7)) == DGR(init=0.5, iterations=7)
    json.dumps(parameters(DGR(init=np.float32(0.5), iterations=np.int64(7), seed=np.int64(1))))
    assert one.keeps_scores
    assert not two.keeps_scores  # cut offline, channels would be split


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gamma": -1}, "expected gamma to be a number of at least 0, found -1"),
        ({"gamma": float("inf")}, "expected gamma to be"),
        ({"iterations": 0}, "expected iterations to be a whole number of at least 1, found 0"),
        ({"iterations": 2.0}, "expected iterations to be a whole number"),
        ({"iterations": True}, "expected iterations to be a whole number"),
        ({"lr": 0}, "expected lr to be a number above 0, found 0"),
        ({"lr": float("nan")}, "expected lr to be"),
        ({"lr": "x"}, "expected lr to be"),
        ({"momentum": 1}, r"expected momentum to be a number in \[0, 1\), found 1"),
        ({"momentum": -0.1}, "expected momentum to be"),
        ({"per_channel": 1}, "expected per_channel to be True or False, found 1"),
        ({"seed": 0.5}, "expected seed to be a whole number"),
        ({"tolerance": -1}, "expected tolerance to be"),
        ({"init": -0.1}, r"expected init to be a number in \[0, 100\], or 'r' for U\(0, 1\), found -0.1"),
        ({"init": 101}, "expected init to be"),
        ({"init": float("nan")}, "expected init to be"),
        ({"init": "s"}, "or 'r' for U"),
        ({"init": True}, "expected init to be"),
        ({"preset": "wang"}, r"there is no preset 'wang'; nearest: wang2018 \(all: paper, wang2018, custom\)"),
        (
            {"preset": "wang2018", "iterations": 10},
            r"the preset 'wang2018' has iterations=30, found iterations=10; .* Leave the preset out: "
            r"dgr:gamma=0\.05,iterations=10,lr=0\.1,per_channel=True",
        ),
        ({"preset": "paper", "gamma": 0.5}, r"Leave the preset out: dgr:gamma=0\.5$"),
    ],
)
def test_wrong_parameters(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DGR(**given)


def test_the_text_form_takes_numbers_and_r() -> None:
    assert parse("dgr:init=r").init == "r"  # type: ignore[attr-defined]
    assert type(parse("dgr:init=2").init) is float  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="expected init to be float or str, found 'true'"):
        parse("dgr:init=true")
    with pytest.raises(InputError, match="expected lr to be float, found 'r'"):
        parse("dgr:lr=r")
    with pytest.raises(InputError, match="or 'r' for U"):
        parse("dgr:init=random")


def test_wrong_initial_gates_and_restrictions(network: Network, x: Tensor) -> None:
    size = network.index.size
    one = DGR(iterations=1)
    for wrong in (torch.ones(size + 1), torch.ones(3, size), torch.ones(4, size, 1), np.ones(size), torch.ones(())):
        with pytest.raises(InputError, match=rf"expected init to be a tensor \(4, {size}\) or \({size},\), one number"):
            one.optimise(network, x, wrong)  # type: ignore[arg-type]
    for number in (-1.0, 101.0, float("nan")):
        bad = torch.ones(4, size)
        bad[2, 5] = number
        with pytest.raises(InputError, match=r"initial gates in \[0, 100\], found .* at \(2, 5\)"):
            one.optimise(network, x, bad)
    row = torch.rand(size)
    assert torch.equal(one.optimise(network, x, row).start, row.double().expand(4, -1))
    assert row.requires_grad is False
    pathways = fxpath.Random().select(network, x, (0.5,))[0.5]
    with network.masked(pathways), pytest.raises(RestrictionError, match="dgr: the network is restricted; leave"):
        one.select(network, x, (0.5,))
    for wrong_level in ((1.0,), ("x",)):
        with pytest.raises(SparsityError, match=r"in \[0, 1\)"):
            one.select(network, x, wrong_level)  # type: ignore[arg-type]
    assert len(one.select(network, x, ())) == 0
    assert isinstance(network.response, OutputFunction) is False
