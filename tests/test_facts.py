"""What can be said of contributions for sure, each statement where its condition holds, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import BY_NAME, CASES, Case, Head, traced
from torch import Tensor, nn

import fxpath
from fxpath.ablation import marginal_contributions
from fxpath.network import Network
from fxpath.responses import respond
from fxpath.selectors import NeuronIntGrad, NeuronMCT

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
quiet = pytest.mark.filterwarnings("ignore::fxpath.errors.NoContributionWarning")
RULES = ("gauss-legendre", "midpoint", "right")


def with_random_weights(name: str) -> nn.Module:
    """A torchvision network in float64, its ten classes behind a narrow classifier where that is most of it."""
    with torch.random.fork_rng([]):
        torch.manual_seed(11)
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None, num_classes=10)
            if name == "vgg11":
                model.avgpool = nn.AdaptiveAvgPool2d(1)
                model.classifier[0], model.classifier[3] = nn.Linear(512, 32), nn.Linear(32, 24)
                model.classifier[6] = nn.Linear(24, 10)
        model = model.to_empty(device="cpu").double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.running_mean.normal_(0, 0.1)
                nn.init.uniform_(module.weight, 0.5, 1)
                nn.init.normal_(module.bias, 0, 0.1)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.normal_(module.bias, 0, 0.1)
    return model


@cache
def large(name: str) -> tuple[Network, Tensor]:
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return fxpath.trace(with_random_weights(name), x), x


LARGE = pytest.mark.parametrize("name", ["vgg11", "resnet18"])


def answer(network: Network, number: int, x: Any, target: Any = None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Φ as a function of one site's value, and the value that it has at x."""
    samples = network.samples(x, target)
    with torch.no_grad():
        wanted = network._resolve(network(samples), samples)
    suffix = network.suffix(number)
    activation, boundary = suffix.cache(samples)
    return lambda a: respond(network.response, suffix(a, boundary), wanted, samples.batch), activation


# --- 1: what is 0 contributes 0 -------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("granularity", ["unit", "channel"])
@every
def test_a_dead_neuron_contributes_nothing(case: Case, granularity: str) -> None:
    network, x = traced(case.name, granularity), case.x(4, seed=9)
    dead = network.rows([(a != 0).double() for a in network.activations(x)]) == 0
    classes = network.response.logits(network(x))
    targets = [None] if classes is None else [None, 0, 1, 2, 3, [3, 0, 1, 0]]
    for target in targets:
        for selector in (NeuronMCT(), NeuronIntGrad(steps=2)):
            signed = selector.scores(network, x, target).signed
            assert bool((signed[dead] == 0).all()), (selector.key, target)
            assert bool((signed != 0).any()), (selector.key, target)


@LARGE
def test_a_dead_neuron_of_a_large_network_contributes_nothing(name: str) -> None:
    network, x = large(name)
    values = network.rows(network.activations(x))
    assert 0.1 < float((values == 0).double().mean()) < 0.9
    for selector, target in ((NeuronMCT(), None), (NeuronMCT(), [7, 0]), (NeuronIntGrad(steps=1), [7, 0])):
        signed = selector.scores(network, x, target).signed
        assert bool((signed[values == 0] == 0).all())
        assert float((signed != 0).double().mean()) > 0.05


TINY_LAYERS = (("MLP", "1"), ("MLP", "3"), ("TiedWeights", "relu"), ("TwinNames", "act.one_two"), ("Dropouts", "relu"))


def shapley(value: Callable[[tuple[int, ...]], Tensor], players: int, weight: Callable[[int], float]) -> Tensor:
    """Σ over coalitions C without j of weight(|C|)·(v(C ∪ j) − v(C)), `(B, players)`."""
    known = {
        coalition: value(coalition)
        for size in range(players + 1)
        for coalition in itertools.combinations(range(players), size)
    }
    columns = []
    for j in range(players):
        without = [coalition for coalition in known if j not in coalition]
        gains = [weight(len(c)) * (known[tuple(sorted((*c, j)))] - known[c]) for c in without]
        columns.append(torch.stack(gains).sum(0))
    return torch.stack(columns, 1)


@pytest.mark.parametrize(("name", "site"), TINY_LAYERS)
def test_exact_shapley_values_of_dead_neurons_are_zero(name: str, site: str) -> None:
    network, x = traced(name), BY_NAME[name].x(4, seed=2)
    phi, a = answer(network, network.index.number(site), x)
    players = a.shape[1]
    assert players <= 8

    def value(coalition: tuple[int, ...]) -> Tensor:
        kept = torch.zeros_like(a)
        kept[:, list(coalition)] = a[:, list(coalition)]
        return phi(kept).detach()

    def exact(size: int) -> float:
        return math.factorial(size) * math.factorial(players - size - 1) / math.factorial(players)

    found = shapley(value, players, exact)
    assert bool((a == 0).any())
    assert bool((a != 0).any())
    assert bool((found[a == 0] == 0).all())
    whole = (phi(a) - phi(torch.zeros_like(a))).detach()
    torch.testing.assert_close(found.sum(1), whole, rtol=1e-12, atol=1e-14)
    as_printed = shapley(value, players, lambda size: exact(size) * math.factorial(players - 1))  # …/n, not …/n!
    assert float(((as_printed.sum(1) - whole) / whole).abs().min()) > 1


# --- 2: completeness ------------------------------------------------------------------------------------------------

CURVED = ("Plain", "Functional", "OperatorForms", "Depthwise", "SqueezeExcitation", "OverlappingPool", "MLP", "Smooth",
          "Transformer", "ResidualOntoReLU", "BatchFolded")  # fmt: skip
COUNTS = (1, 2, 3, 4, 5, 7, 10, 16, 25, 40, 64, 100)


def slopes(phi: Callable[[Tensor], Tensor], a: Tensor, alphas: Tensor) -> Tensor:
    """∂_αΦ(α·a) at each α, `(len(alphas), B)`."""
    found = []
    for alpha in alphas.tolist():
        leaf = (alpha * a).requires_grad_()
        value = phi(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        found.append((slope * a).reshape(value.shape[0], -1).sum(1))
    return torch.stack(found)


@pytest.mark.parametrize("name", CURVED)
def test_completeness_errors_lie_within_the_envelope(name: str) -> None:
    """n·|error| ≤ TV(∂_αΦ)/2 for every number n of midpoint steps; so the error goes to 0."""
    network, x = traced(name), BY_NAME[name].x(3, seed=1)
    errors = {n: NeuronIntGrad(steps=n, rule="midpoint").scores(network, x).completeness for n in COUNTS}
    worst = torch.stack([n * error for n, error in errors.items() if error is not None]).amax(0)
    for number, site in enumerate(network.sites):
        phi, a = answer(network, number, x)
        grid = slopes(phi, a, torch.linspace(0, 1, 301, dtype=torch.float64)[1:])
        variation = grid.diff(dim=0).abs().sum(0)
        assert bool((worst[:, number] <= 0.5 * 1.01 * variation + 1e-12).all()), site.name
    assert float(worst.max()) > 1e-7  # there was something to converge


def test_errors_of_smooth_suffixes_fall_with_the_square() -> None:
    """|error| ≤ max |∂³_αΦ| / (24·n²) for the midpoint rule."""
    network, x = traced("Smooth"), BY_NAME["Smooth"].x(4, seed=1)
    number = network.index.number("acts.1")  # a tanh and a sigmoid follow
    phi, a = answer(network, number, x)
    step = 1 / 200
    grid = slopes(phi, a, torch.arange(0, 201, dtype=torch.float64) * step)
    third = (grid.diff(n=2, dim=0) / step**2).abs().amax(0)
    for n in COUNTS:
        error = NeuronIntGrad(steps=n, rule="midpoint", sites="acts.1").scores(network, x).completeness
        assert error is not None
        assert bool((error[:, number] <= 1.01 * third / (24 * n**2) + 1e-14).all())
        assert n > 2 or bool((error[:, number] > 1e-8).all())


@LARGE
def test_completeness_of_large_networks(name: str) -> None:
    network, x = large(name)
    chosen = {"vgg11": ("features.17", "classifier.1"), "resnet18": ("layer3.1.relu_1", "layer4.0.relu")}[name]
    counts = (1, 3, 8, 20)
    errors = [
        NeuronIntGrad(steps=n, rule="midpoint", sites="+".join(chosen)).scores(network, x).completeness for n in counts
    ]
    for site in chosen:
        number = network.index.number(site)
        phi, a = answer(network, number, x)
        variation = slopes(phi, a, torch.linspace(0, 1, 61, dtype=torch.float64)[1:]).diff(dim=0).abs().sum(0)
        worst = torch.stack([n * e[:, number] for n, e in zip(counts, errors, strict=True) if e is not None]).amax(0)
        assert bool((worst <= 0.5 * 1.05 * variation + 1e-10).all())


# --- 3: the last hidden site ----------------------------------------------------------------------------------------

NOT_AFFINE = ("Transformer",)  # a LayerNorm follows its last site


@quiet
@pytest.mark.parametrize("case", [c for c in CASES if c.name not in NOT_AFFINE], ids=lambda case: case.name)
def test_all_agree_where_what_follows_is_affine(case: Case) -> None:
    """|signed IntGrad| = MCT = |ablation| at the last site, for any rule, one step or many, units and channels."""
    for granularity in ("unit", "channel"):
        network, x = traced(case.name, granularity), case.x(4, seed=3)
        x = 6 * x if case.name == "ShapeBranch" else x  # else its last site is dead
        site = network.sites[-1]
        mct = NeuronMCT().scores(network, x).signed[:, site.slice]
        ablation = marginal_contributions(network, x, site, progress=False)
        torch.testing.assert_close(ablation, mct, rtol=1e-9, atol=1e-13)
        for rule, steps in itertools.product(RULES, (1, 4)):
            found = NeuronIntGrad(steps=steps, rule=rule, sites=site.name).scores(network, x)
            torch.testing.assert_close(found.signed[:, site.slice], mct, rtol=1e-9, atol=1e-14)
            assert found.completeness is not None
            assert float(found.completeness[:, -1].max()) < 1e-13
        assert bool((mct != 0).any())


def test_where_it_is_not_affine_they_differ() -> None:
    network, x = traced("Transformer"), BY_NAME["Transformer"].x(4, seed=3)
    mct = NeuronMCT().scores(network, x).signed
    ablation = marginal_contributions(network, x, "encoder.relu", progress=False)
    integrated = NeuronIntGrad().scores(network, x).signed
    for one, other in itertools.combinations((mct, ablation, integrated), 2):
        assert float((one - other).abs().max()) > 1e-3 * float(one.abs().max())


@LARGE
def test_all_agree_at_the_last_site_of_large_networks(name: str) -> None:
    network, x = large(name)
    site = network.sites[-1]
    mct = NeuronMCT().scores(network, x, [3, 0]).signed[:, site.slice]
    found = NeuronIntGrad(steps=2, sites=site.name).scores(network, x, [3, 0]).signed[:, site.slice]
    some = torch.arange(site.start, site.start + site.neurons, max(site.neurons // 16, 1))
    ablation = marginal_contributions(network, x, some, [3, 0], progress=False)
    torch.testing.assert_close(found, mct, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(ablation, mct[:, some - site.start], rtol=1e-8, atol=1e-12)
    assert float((ablation != 0).double().mean()) > 0.1


# --- 4: positively 1-homogeneous suffixes ---------------------------------------------------------------------------


def without_biases(model: nn.Module, kept: Sequence[str]) -> nn.Module:
    """Every bias is 0 but those of the modules `kept`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and name.rpartition(".")[0] not in kept:
                parameter.zero_()
    return model


class Branches(nn.Module):
    """LeakyReLU, max and average pooling, and branches that start at the first site; the prefix has biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(4, 3, 1, bias=False), nn.LeakyReLU(0.2), nn.MaxPool2d(2, 1))
        self.right = nn.Sequential(nn.AvgPool2d(2, 1), nn.Conv2d(4, 2, 3, padding=1, bias=False), nn.ReLU())
        self.fc = nn.Linear(5 * 16 + 4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        joined = torch.cat([self.left(h), self.right(h)], 1).flatten(1)
        return self.fc(torch.cat([joined, h.amax((2, 3))], 1))


HOMOGENEOUS = (  # case, site, modules that keep their biases
    ("Plain", "relu1", ("conv1",)),
    ("Plain", "relu2", ("conv1", "conv2")),
    ("NeverCalled", "relu1", ("conv1",)),
    ("OverlappingPool", "relu", ("conv1",)),
    ("Concat", "relu", ("squeeze",)),
    ("InPlaceReadAgain", "relu", ("conv1",)),
    ("ResidualOntoReLU", "relu", ("conv1",)),
    ("AliasThroughDropout", "relu", ("conv",)),
    ("CustomLeaf", "act", ("conv1",)),
    ("MLP", "1", ("0",)),
    ("MLP", "3", ("0", "2")),
    ("Conv1d", "body.2", ("body.0", "body.1")),
    ("DictOutput", "relu", ("conv",)),
    ("BatchFolded", "relu", ("fc1",)),
    ("TiedWeights", "relu", ()),
)


def agree(network: Network, site: str, x: Any) -> None:
    """Σ a·∂Φ/∂a = Φ(x), and signed IntGrad is signed MCT for every rule."""
    block = network.index.site(site).slice
    mct = NeuronMCT().scores(network, x).signed[:, block]
    response = network.respond(x).detach()
    assert float(response.abs().max()) > 1e-4
    torch.testing.assert_close(mct.sum(1), response, rtol=1e-10, atol=1e-13)
    for rule, steps in itertools.product(RULES, (1, 3)):
        found = NeuronIntGrad(steps=steps, rule=rule, sites=site).scores(network, x).signed[:, block]
        torch.testing.assert_close(found, mct, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("name", "site", "kept"), HOMOGENEOUS, ids=[f"{n}-{s}" for n, s, _ in HOMOGENEOUS])
def test_homogeneous_suffixes(name: str, site: str, kept: Sequence[str]) -> None:
    case = BY_NAME[name]
    agree(case.trace(without_biases(case.model(), kept)), site, case.x(4, seed=2))


def test_homogeneous_branches() -> None:
    torch.manual_seed(0)
    model, x = Branches().double().eval(), torch.randn(4, 2, 5, 5, dtype=torch.float64)
    agree(fxpath.trace(model, x), "first.2", x)


@LARGE
def test_homogeneous_suffixes_of_large_networks(name: str) -> None:
    model = with_random_weights(name)
    first, site = {"vgg11": ("features.0", "features.1"), "resnet18": ("bn1", "relu")}[name]
    without_biases(model, [first])
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and path != first:
            module.running_mean.zero_()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    network = fxpath.trace(model, x)
    block = network.index.site(site).slice
    mct = NeuronMCT().scores(network, x).signed
    for number, rule in enumerate(RULES):
        found = NeuronIntGrad(steps=1 + number, rule=rule, sites=site).scores(network, x).signed
        torch.testing.assert_close(found[:, block], mct[:, block], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(mct[:, block].sum(1), network.respond(x).detach(), rtol=1e-10, atol=1e-12)


class Saturated(Head):
    """No bias, but a ReLU6 that is driven beyond 6."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu6(20 * self.conv2(F.relu(self.conv1(x)))))


@pytest.mark.parametrize("name", ["Saturated", "SqueezeExcitation", "a branch around the site"])
def test_other_suffixes_are_not_homogeneous(name: str) -> None:
    if name == "Saturated":
        torch.manual_seed(1)
        model: nn.Module = without_biases(Saturated().double().eval(), ())
        x, site = torch.randn(3, 2, 5, 5, dtype=torch.float64), "relu"
    else:
        case = BY_NAME["SqueezeExcitation" if name == "SqueezeExcitation" else "Concat"]
        model, x = without_biases(case.model(), ()), case.x(3, seed=2)
        site = "relu" if name == "SqueezeExcitation" else "relu_1"  # beside it stands relu_2
    network = fxpath.trace(model, x)
    block = network.index.site(site).slice
    mct = NeuronMCT().scores(network, x).signed[:, block]
    response = network.respond(x).detach()
    assert float((mct.sum(1) - response).abs().max()) > 1e-2 * float(response.abs().max())
    if "branch" not in name:  # what follows that branch is affine
        found = NeuronIntGrad().scores(network, x).signed[:, block]
        assert float((found - mct).abs().max()) > 1e-2 * float(mct.abs().max())


# --- 5: null player and symmetry ------------------------------------------------------------------------------------


class TwoNeurons(nn.Module):
    """A function of two activations, which are the rectified inputs."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.relu, self.function = nn.ReLU(), function

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(x)
        return self.function(a[:, 0], a[:, 1])


def of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Network:
    example = torch.ones(3, 2, dtype=torch.float64)
    return fxpath.trace(TwoNeurons(function).eval(), example, sites="relu", response=lambda output: output)


def test_a_null_player_can_score() -> None:
    """f = h(a₁ − a₂/2) at (1, 1): a₁ changes nothing in any coalition, and yet its MCT and IntGrad are 2."""

    def f(first: Tensor, second: Tensor) -> Tensor:
        t = first - second / 2
        return F.relu(-2 * t) + F.relu(2 * t) - 4 * F.relu(t - 0.5)

    network, x = of_two(f), torch.ones(1, 2, dtype=torch.float64)
    corners = [network.respond(torch.tensor([[p, q]], dtype=torch.float64)).item() for p in (0, 1) for q in (0, 1)]
    assert corners == [0, 1, 0, 1]  # f(0, 0), f(0, 1), f(1, 0), f(1, 1)
    assert marginal_contributions(network, x, [0, 1]).tolist() == [[0, 1]]
    assert NeuronMCT().scores(network, x).signed.tolist() == [[2, -1]]
    for rule in ("gauss-legendre", "midpoint"):
        found = NeuronIntGrad(rule=rule).scores(network, x)
        torch.testing.assert_close(found.signed, torch.tensor([[2.0, -1]], dtype=torch.float64), rtol=1e-12, atol=0)
        assert found.completeness is not None
        assert float(found.completeness.max()) < 1e-12


def layered(change: Callable[[nn.Linear, nn.Linear], None]) -> tuple[Network, Tensor]:
    """Six neurons, then five; `change` sets the weights before and behind the six."""
    torch.manual_seed(3)
    before, behind = nn.Linear(4, 6), nn.Linear(6, 5)
    with torch.no_grad():
        before.bias += 1  # most are alive
        change(before, behind)
    model = nn.Sequential(before, nn.ReLU(), behind, nn.ReLU(), nn.Linear(5, 4)).double().eval()
    x = torch.randn(5, 4, dtype=torch.float64) / 2
    return fxpath.trace(model, x), x


METHODS: dict[str, Callable[[Network, Tensor], Tensor]] = {
    "ablation": lambda network, x: marginal_contributions(network, x, "1", progress=False),
    "mct": lambda network, x: NeuronMCT().scores(network, x).site("1"),
    "intgrad": lambda network, x: NeuronIntGrad(steps=7).scores(network, x).site("1"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_neuron_that_is_not_read_contributes_nothing(method: str) -> None:
    def change(before: nn.Linear, behind: nn.Linear) -> None:
        behind.weight[:, 2] = 0

    network, x = layered(change)
    assert bool((network.activations(x)[0][:, 2] > 0).any())
    found = METHODS[method](network, x)
    assert bool((found[:, 2] == 0).all())
    assert bool((found[:, [0, 1, 3, 4, 5]] != 0).any(0).all())


@pytest.mark.parametrize("method", METHODS)
def test_equal_neurons_contribute_equally(method: str) -> None:
    def change(before: nn.Linear, behind: nn.Linear) -> None:
        before.weight[4], before.bias[4] = before.weight[1], before.bias[1]
        behind.weight[:, 4] = behind.weight[:, 1]

    network, x = layered(change)
    found = METHODS[method](network, x)
    torch.testing.assert_close(found[:, 1], found[:, 4], rtol=1e-12, atol=1e-15)
    assert bool((found[:, 1] != 0).any())
    assert float((found[:, 1] - found[:, 0]).abs().max()) > 1e-3


def test_a_tie_breaks_the_symmetry_of_gradients_alone() -> None:
    """max(a₁, a₂) + a₁·a₂ at (1, 1), the maximum by pooling: its gradient goes to one of the two."""

    def f(first: Tensor, second: Tensor) -> Tensor:
        return F.max_pool1d(torch.stack([first, second], 1).unsqueeze(1), 2).flatten() + first * second

    network, x = of_two(f), torch.ones(1, 2, dtype=torch.float64)
    assert marginal_contributions(network, x, [0, 1]).tolist() == [[1, 1]]
    assert sorted(NeuronMCT().scores(network, x).signed[0].tolist()) == [1, 2]
    integrated = NeuronIntGrad().scores(network, x).signed[0].sort().values
    torch.testing.assert_close(integrated, torch.tensor([0.5, 1.5], dtype=torch.float64), rtol=1e-12, atol=0)


# --- 6: contribution pathways are alive -----------------------------------------------------------------------------

SPARSITIES = (0.0, 0.2, 0.5, 0.8, 0.9, 0.99)


@quiet
@every
def test_pathways_hold_no_dead_neuron(case: Case) -> None:
    network, x = traced(case.name), case.x(5, seed=6)
    values = network.rows(network.activations(x))
    for selector in (NeuronMCT(), NeuronIntGrad(steps=2), NeuronIntGrad(steps=2, rank="signed")):
        selection = selector.select(network, x, SPARSITIES)
        for sparsity in SPARSITIES:
            assert not bool((selection[sparsity].mask & (values == 0)).any())
            assert int(selection[sparsity].count.max()) <= network.index.kept(sparsity)


@LARGE
def test_pathways_of_large_networks_hold_no_dead_neuron(name: str) -> None:
    network, x = large(name)
    values = network.rows(network.activations(x))
    for selector in (NeuronMCT(), NeuronIntGrad(steps=1)):
        selection = selector.select(network, x, SPARSITIES)
        for sparsity in SPARSITIES:
            assert not bool((selection[sparsity].mask & (values == 0)).any())
        assert selection[0.9].count.tolist() == [network.index.kept(0.9)] * 2
