"""NeuronIntGrad against captum and a naive loop; its diagnostics, its memory, and what it leaves behind."""

from __future__ import annotations

import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from captum.attr import IntegratedGradients
from footprint import require_clean_failures, unchanged
from networks import BY_NAME, CASES, Case, traced
from processes import run
from small_jobs import cifar, small
from test_leaks import Sighted, tensors, uncollected
from test_leaks import traced as watched
from test_stacking import AWKWARD, Mixed, awkward
from torch import Tensor, nn

import fxpath
from fxpath.errors import InputError, NoContributionWarning, RestrictionError, SampleError, SiteError, SparsityError
from fxpath.images import load_images
from fxpath.network import Network
from fxpath.pathways import Scores
from fxpath.responses import Margin, OutputFunction, probability, respond
from fxpath.samples import Samples
from fxpath.selectors import NeuronIntGrad, NeuronMCT, Random
from fxpath.selectors.integrated import quadrature
from fxpath.selectors.registry import family, parameters, parse
from fxpath.zoo import load_model

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
quiet = pytest.mark.filterwarnings("ignore::fxpath.errors.NoContributionWarning")
RULES = ("gauss-legendre", "midpoint", "right")
CAPTUMS = {"gauss-legendre": "gausslegendre", "midpoint": "riemann_middle", "right": "riemann_right"}


def by_rule(rule: str, steps: int) -> tuple[list[float], list[float]]:
    """Nodes and weights, written out."""
    if rule == "gauss-legendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return [(1 + node) / 2 for node in nodes], [weight / 2 for weight in weights]
    nodes = [(k + (0.5 if rule == "midpoint" else 1)) / steps for k in range(steps)]
    return nodes, [1 / steps] * steps


def naive(network: Network, x: Any, steps: int, rule: str = "gauss-legendre", target: Any = None) -> Tensor:
    """Eq. 4, one site and one α after another, `(B, N)`."""
    samples = network.samples(x, target)
    with torch.no_grad():
        wanted = network._resolve(network(samples), samples)
    columns = []
    for number, site in enumerate(network.sites):
        suffix = network.suffix(number)
        a, boundary = suffix.cache(samples)
        total = torch.zeros_like(a)
        for alpha, weight in zip(*by_rule(rule, steps), strict=True):
            leaf = (alpha * a).requires_grad_()
            value = respond(network.response, suffix(leaf, boundary), wanted, samples.batch)
            slope = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] if value.requires_grad else None
            total += 0 if slope is None else weight * slope
        block = (total * a).reshape(samples.batch, *site.shape)
        if site.neurons != site.units:
            block = block.movedim(site.axis + 1, 1).reshape(samples.batch, site.neurons, -1).sum(2)
        columns.append(block.reshape(samples.batch, -1))
    return torch.cat(columns, 1)


def errors(network: Network, x: Any, signed: Tensor, target: Any = None) -> Tensor:
    """|Σ c − (Φ(x) − Φ(a ← 0))|, `(B, sites)`, by the suffixes."""
    samples = network.samples(x, target)
    with torch.no_grad():
        output = network(samples)
        wanted = network._resolve(output, samples)
        whole = respond(network.response, output, wanted, samples.batch)
        columns = []
        for number, site in enumerate(network.sites):
            suffix = network.suffix(number)
            a, boundary = suffix.cache(samples)
            rest = respond(network.response, suffix(torch.zeros_like(a), boundary), wanted, samples.batch)
            columns.append((signed[:, site.slice].sum(1) - (whole - rest)).abs())
    return torch.stack(columns, 1)


# --- against captum -------------------------------------------------------------------------------------------------


def captums(network: Network, number: int, x: Tensor, target: Tensor, steps: int, rule: str) -> Tensor:
    """captum's IntegratedGradients of what follows a site, with baseline 0."""
    suffix = network.suffix(number)
    a, boundary = suffix.cache(x)

    def forward(activation: Tensor, wanted: Tensor, *rest: Any) -> Tensor:
        return suffix(activation, rest).gather(1, wanted.unsqueeze(1)).squeeze(1)

    found = IntegratedGradients(forward).attribute(
        a, baselines=0, additional_forward_args=(target, *boundary), n_steps=steps, method=CAPTUMS[rule]
    )
    return found.flatten(1)


def differ(network: Network, x: Tensor, sites: list[int], steps: int, rule: str) -> list[float]:
    """By how much sites differ from captum's, relative to their largest score."""
    target = network.original(x).target
    scores = NeuronIntGrad(steps=steps, rule=rule, sites="+".join(network.sites[n].name for n in sites))
    signed = scores.scores(network, x).signed
    found = []
    for number in sites:
        expected = captums(network, number, x, target, steps, rule)
        assert float(expected.abs().max()) > 0
        error = (signed[:, network.sites[number].slice] - expected).abs().max() / expected.abs().max()
        found.append(float(error))
    return found


@pytest.mark.parametrize(
    "kind", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=["float32", "float64"]
)
def test_it_is_captums_on_a_photo(kind: torch.dtype) -> None:
    """All 26 sites of SqueezeNet 1.1 with its weights.

    In float32 a unit whose input is 0 but for rounding may count as active in one and not in the other: that changes
    few scores, at few sites. captum's own weights of the steps are float32.
    """
    loaded = load_model("zoo:squeezenet1_1")
    photos = load_images("foolbox:imagenet", loaded.preprocess, classes=loaded.classes, limit=3)
    x = photos[2][0].unsqueeze(0).to(kind)
    network = fxpath.trace(loaded.model.to(kind), x)
    found = sorted(differ(network, x, list(range(26)), 3, "gauss-legendre"))
    if kind == torch.float64:
        assert found[-1] < 1e-6
    else:
        assert found[19] < 1e-4
        assert found[-1] < 2e-2


def test_it_is_captums_on_a_residual_network() -> None:
    """All 17 sites, skips around them included, in float64."""
    network, x = residual()
    assert len(network.sites) == 17
    assert max(differ(network, x, list(range(17)), 3, "gauss-legendre")) < 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_captums(rule: str) -> None:
    network, x = residual()
    for steps in (2, 5):
        assert max(differ(network, x, [9, 13, 15], steps, rule)) < 1e-6


@cache
def residual() -> tuple[Network, Tensor]:
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        model = torchvision.models.resnet18(weights=None).double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                nn.init.normal_(module.bias, 0, 0.1)
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    return fxpath.trace(model, x), x


# --- against a naive loop -------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("granularity", ["unit", "channel"])
@every
def test_it_is_a_naive_loop(case: Case, granularity: str) -> None:
    network, x = traced(case.name, granularity), case.x(3, seed=5)
    expected = naive(network, x, 6)
    largest = float(expected.abs().max())
    assert largest > 0
    for most in (16, 5, 1):
        scores = NeuronIntGrad(steps=6, max_batch=most).scores(network, x)
        torch.testing.assert_close(scores.signed, expected, rtol=0, atol=1e-13 * largest)
        assert scores.completeness is not None
        torch.testing.assert_close(scores.completeness, errors(network, x, expected), rtol=0, atol=1e-13)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["Plain", "Depthwise", "Smooth", "SqueezeExcitation"])
def test_rules(name: str, rule: str) -> None:
    network, x = traced(name), BY_NAME[name].x(2, seed=5)
    for steps in (1, 2, 9):
        expected = naive(network, x, steps, rule)
        found = NeuronIntGrad(steps=steps, rule=rule).scores(network, x).signed
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))


def test_nodes_and_weights() -> None:
    for rule in RULES:
        for steps in (1, 2, 3, 50):
            alphas, weights = quadrature(rule, steps)
            expected = by_rule(rule, steps)
            assert alphas.dtype == weights.dtype == torch.float64
            np.testing.assert_allclose(alphas, expected[0], rtol=1e-14)
            np.testing.assert_allclose(weights, expected[1], rtol=1e-14)
            assert 0 < alphas.min() <= alphas.max() <= 1
    alphas, weights = quadrature("gauss-legendre", 4)  # exact for polynomials up to degree 7
    for degree in range(8):
        assert abs(float((weights * alphas**degree).sum()) - 1 / (degree + 1)) < 1e-15


def test_by_hand() -> None:
    """Φ = relu(a − 1)² with a = 3: c = a·∫2·relu(αa − 1) dα = 4, the whole of it."""
    model = nn.Sequential(nn.ReLU(), nn.Linear(1, 1), nn.ReLU()).double().eval()
    nn.init.ones_(model[1].weight)
    nn.init.constant_(model[1].bias, -1)
    network = fxpath.trace(
        model, torch.ones(2, 1, dtype=torch.float64), sites=["0"], response=lambda output: output[:, 0] ** 2
    )
    x = torch.tensor([[3.0], [0.5], [-2]], dtype=torch.float64)
    scores = NeuronIntGrad(steps=3000, rule="midpoint", sites="0").scores(network, x)
    assert float((scores.signed - torch.tensor([[4.0], [0], [0]])).abs().max()) < 1e-5
    right = NeuronIntGrad(steps=3, rule="right").scores(network, x)  # α = 1/3, 2/3, 1: 2·0, 2·1, 2·2
    torch.testing.assert_close(right.signed, torch.tensor([[6.0], [0], [0]], dtype=torch.float64))
    assert right.completeness is not None
    torch.testing.assert_close(right.completeness, torch.tensor([[2.0], [0], [0]], dtype=torch.float64))


# --- batches --------------------------------------------------------------------------------------------------------


def test_batches_larger_than_what_runs_at_once() -> None:
    for name in ("Concat", "ResidualIadd", "BatchFolded", "DictInput", "OptionalGiven"):
        network, x = traced(name), BY_NAME[name].x(7, seed=5)
        samples = network.samples(x, [0, 1, 2, 3, 0, 1, 2])
        expected = naive(network, samples, 4)
        for most in (1, 2, 3, 7, 100):
            scores = NeuronIntGrad(steps=4, max_batch=most).scores(network, samples)
            torch.testing.assert_close(scores.signed, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
            assert scores.completeness is not None
            assert scores.completeness.shape == (7, len(network.sites))
            torch.testing.assert_close(scores.completeness, errors(network, samples, expected), rtol=0, atol=1e-13)
        alone = [NeuronIntGrad(steps=4).scores(network, samples.take([row])).signed for row in range(7)]
        torch.testing.assert_close(torch.cat(alone), expected, rtol=0, atol=1e-13 * float(expected.abs().max()))


def test_many_samples_of_many_classes() -> None:
    """More samples than any block of logits holds, each with its own class, and those of single samples."""
    for name, last in (("MLP", "4"), ("Concat", "fc"), ("Conv1d", "fc"), ("ResidualIadd", "fc")):
        case = BY_NAME[name]
        model = case.model()
        torch.manual_seed(1)
        setattr(model, last, nn.Linear(model.get_submodule(last).in_features, 37).double().eval())
        network, x = case.trace(model), case.x(35, seed=5)
        target = torch.arange(35).flip(0) + 1
        target[:3] = torch.tensor([0, 36, 0])
        expected = naive(network, x, 2, target=target)
        for most in (35, 70, 16, 1):
            found = NeuronIntGrad(steps=2, max_batch=most).scores(network, x, target).signed
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", AWKWARD)
def test_networks_whose_first_axis_is_awkward(kind: type[nn.Module]) -> None:
    """A batch size read before the site, a fold, rows by number, samples that see each other."""
    network, x = awkward(kind)
    expected = naive(network, x, 5)
    largest = float(expected.abs().max())
    assert largest > 0
    for most in (3, 4, 6, 16, 50):
        found = NeuronIntGrad(steps=5, max_batch=most).scores(network, x).signed
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * largest)
    if kind is not Mixed:
        one = NeuronIntGrad(steps=5, max_batch=1).scores(network, x).signed
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-12 * largest)


def test_targets() -> None:
    """None, one for all, one a sample, class 0 among them, and those within the samples."""
    network, x = traced("Concat"), BY_NAME["Concat"].x(4)
    predicted = network.original(x).target
    by_class = [NeuronIntGrad(steps=3).scores(network, x, each).signed for each in range(4)]
    for number, found in enumerate(by_class):
        torch.testing.assert_close(found, naive(network, x, 3, target=number), rtol=1e-10, atol=1e-14)
    assert predicted is not None
    for target, classes in (
        (None, predicted.tolist()), (0, [0] * 4), ([0, 3, 1, 0], [0, 3, 1, 0]), (np.array([2, 0, 0, 1]), [2, 0, 0, 1]),
        (torch.tensor([3]), [3] * 4),
    ):  # fmt: skip
        expected = torch.stack([by_class[wanted][row] for row, wanted in enumerate(classes)])
        for most in (16, 3, 1):
            selector = NeuronIntGrad(steps=3, max_batch=most)
            for found in (selector.scores(network, x, target), selector.scores(network, Samples(x, target))):
                torch.testing.assert_close(found.signed, expected, rtol=1e-10, atol=1e-14)


def square(output: Tensor) -> Tensor:
    return output[:, 0] ** 2 - output[:, 1] * output[:, 2]


RESPONSES: dict[str, Any] = {
    "probability": probability, "margin": "margin", "against 0": Margin(against=0), "function": square,
    "smallest": OutputFunction(lambda output: output.amin(1)), "all": lambda output: output.sum(1).tanh(),
}  # fmt: skip


@pytest.mark.parametrize("name", ["Concat", "BatchFolded", "Smooth"])
@pytest.mark.parametrize("response", RESPONSES)
def test_responses(name: str, response: str) -> None:
    case = BY_NAME[name]
    network, x = case.trace(response=RESPONSES[response]), case.x(3, seed=5)
    known = network.response.logits(network(x)) is not None
    for target in (None, [3, 2, 1]) if known else (None,):
        expected = naive(network, x, 5, target=target)
        for most in (16, 1):
            scores = NeuronIntGrad(steps=5, max_batch=most).scores(network, x, target)
            torch.testing.assert_close(scores.signed, expected, rtol=1e-9, atol=1e-14)
            assert scores.completeness is not None
            wanted = errors(network, x, expected, target)
            torch.testing.assert_close(scores.completeness, wanted, rtol=1e-7, atol=1e-14)
        assert bool((expected != 0).any())
        precise = NeuronIntGrad(steps=300).scores(network, x, target).completeness
        assert precise is not None
        assert float(precise.max()) < 2e-3


def test_other_outputs() -> None:
    for name in ("TupleOutput", "DictOutput", "ScalarOutput"):
        network, x = traced(name), BY_NAME[name].x(3, seed=5)
        torch.testing.assert_close(NeuronIntGrad(steps=4).scores(network, x).signed, naive(network, x, 4))


# --- sites ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("*", ["relu", "relu_1", "relu_2"]),
        ("relu_1", ["relu_1"]),
        ("relu", ["relu"]),
        ("relu_*", ["relu_1", "relu_2"]),
        ("relu_2+relu", ["relu", "relu_2"]),
        ("relu_[12]+relu_1", ["relu_1", "relu_2"]),
        ("rel?+relu_?", ["relu", "relu_1", "relu_2"]),
    ],
)
def test_some_sites(wanted: str, chosen: list[str]) -> None:
    network, x = traced("Concat"), BY_NAME["Concat"].x(3)
    whole = NeuronIntGrad(steps=4).scores(network, x)
    found = NeuronIntGrad(steps=4, sites=wanted).scores(network, x)
    assert whole.completeness is not None
    assert found.completeness is not None
    for number, site in enumerate(network.sites):
        if site.name in chosen:
            assert torch.equal(found.signed[:, site.slice], whole.signed[:, site.slice])
            assert torch.equal(found.completeness[:, number], whole.completeness[:, number])
        else:
            assert not bool(found.signed[:, site.slice].any())
            assert bool(found.completeness[:, number].isnan().all())
    kept = NeuronIntGrad(steps=4, sites=wanted).select(network, x, (0.2,))[0.2].mask
    assert not any(bool(kept[:, site.slice].any()) for site in network.sites if site.name not in chosen)


def test_a_name_as_it_stands_goes_before_a_glob() -> None:
    layers = {"one": nn.Linear(4, 5), "act[12]": nn.ReLU(), "two": nn.Linear(5, 5), "act1": nn.ReLU()}
    model = nn.Sequential(OrderedDict(layers))
    x = torch.randn(3, 4)
    network = fxpath.trace(model.eval(), x)
    assert [site.name for site in network.sites] == ["act[12]", "act1"]
    for wanted, chosen in (("act[12]", 0), ("act[1]", 1), ("act1", 1)):
        signed = NeuronIntGrad(steps=2, sites=wanted).scores(network, x).signed
        assert [bool(signed[:, site.slice].any()) for site in network.sites] == [chosen == 0, chosen == 1]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("relu_4", r"neuron_intgrad: there is no site 'relu_4'; nearest: relu_"),
        ("relu+conv", r"there is no site 'conv' \(all: relu, relu_1, relu_2\)|there is no site 'conv'; nearest"),
        ("relu+", r"there is no site ''"),
        ("Relu*", r"there is no site 'Relu\*'"),
        ("relu, relu_1", r"there is no site 'relu, relu_1'"),
    ],
)
def test_sites_that_are_not_there(wanted: str, message: str) -> None:
    network, x = traced("Concat"), BY_NAME["Concat"].x(2)
    with pytest.raises(SiteError, match=message):
        NeuronIntGrad(sites=wanted).scores(network, x)


# --- ranks ----------------------------------------------------------------------------------------------------------


def test_ranks() -> None:
    network, x = traced("Concat"), BY_NAME["Concat"].x(4)
    both = [NeuronIntGrad(steps=4, rank=rank).scores(network, x) for rank in ("absolute", "signed")]
    assert torch.equal(both[0].signed, both[1].signed)
    signed = both[0].signed
    assert bool((signed < 0).any())
    assert torch.equal(both[0].values, signed.abs())
    assert torch.equal(both[1].values, signed.clamp(min=0))
    for most in (16, 2):
        selection = NeuronIntGrad(steps=4, rank="signed", max_batch=most).select(network, x, (0.0, 0.5, 0.9))
        for sparsity in (0.0, 0.5, 0.9):
            mask, count = selection[sparsity].mask, network.index.kept(sparsity)
            for row in range(4):
                best = signed[row].argsort(descending=True)[:count]
                expected = {int(neuron) for neuron in best if signed[row, neuron] > 0}
                assert set(torch.nonzero(mask[row]).flatten().tolist()) == expected
    assert not torch.equal(both[0].pathways(0.5).mask, both[1].pathways(0.5).mask)


# --- the name and the parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (NeuronIntGrad(), "neuron_intgrad"),
        (NeuronIntGrad(steps=7), "neuron_intgrad:steps=7"),
        (NeuronIntGrad(steps=7, rule="right"), "neuron_intgrad:rule=right,steps=7"),
        (NeuronIntGrad(rank="signed"), "neuron_intgrad:rank=signed"),
        (NeuronIntGrad(sites="relu+relu_[12]"), "neuron_intgrad:sites=relu+relu_[12]"),
        (NeuronIntGrad(max_batch=1, max_bytes=10**9), "neuron_intgrad"),
        (NeuronIntGrad(max_batch=4, steps=3), "neuron_intgrad:steps=3"),
    ],
)
def test_names(selector: NeuronIntGrad, text: str) -> None:
    assert str(family(selector)) == text
    unbudgeted = parse(text)
    assert isinstance(unbudgeted, NeuronIntGrad)
    assert family(unbudgeted) == family(selector)
    assert (unbudgeted.steps, unbudgeted.rule, unbudgeted.rank) == (selector.steps, selector.rule, selector.rank)
    assert parse("neuron_intgrad:max_batch=3,max_bytes=5000") == NeuronIntGrad(max_batch=3, max_bytes=5000)
    assert set(parameters(selector)) == {"steps", "rule", "sites", "rank", "max_batch", "max_bytes"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "expected steps to be a whole number ≥ 1, found 0"),
        ({"steps": -3}, "expected steps to be a whole number ≥ 1, found -3"),
        ({"steps": 2.0}, r"expected steps to be a whole number ≥ 1, found 2\.0"),
        ({"steps": True}, "expected steps to be a whole number ≥ 1, found True"),
        ({"max_batch": 0}, "expected max_batch to be a whole number ≥ 1, found 0"),
        ({"max_bytes": -1}, "expected max_bytes to be a whole number ≥ 0, found -1"),
        ({"rule": "gauss"}, "there is no rule 'gauss'; nearest: gauss-legendre"),
        ({"rule": "left"}, r"there is no rule 'left'.*gauss-legendre, midpoint, right"),
        ({"rank": "abs"}, r"there is no rank 'abs'.*absolute, signed"),
        ({"sites": ""}, "expected sites as names or globs joined by '\\+', found ''"),
        ({"sites": ["relu"]}, r"expected sites as names or globs joined by '\+', found \['relu'\]"),
    ],
)
def test_bad_parameters(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"neuron_intgrad: .*{message}"):
        NeuronIntGrad(**given)


def test_bad_input() -> None:
    network, x = traced("Plain"), BY_NAME["Plain"].x(3)
    with pytest.raises(InputError, match="expected inputs"):
        NeuronIntGrad().scores(network, x[:, :, 1:])
    for target, message in ((4, "class in 0 … 3, found 4"), ([0, 1], "one a sample, found 2"), (0.5, "whole class")):
        with pytest.raises(InputError, match=message):
            NeuronIntGrad().scores(network, x, target)  # type: ignore[arg-type]
    with pytest.raises(SparsityError):
        NeuronIntGrad().select(network, x, (1.0,))
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = x.clone()
        broken[1, 0, 2, 2] = value
        with pytest.raises(SampleError, match="sample 'b' holds NaN or infinite") as caught:
            NeuronIntGrad().scores(network, Samples(broken, ids=["a", "b", "c"]))
        assert caught.value.positions == (1,)


def test_samples_that_overflow_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    x = torch.ones(3, 2, dtype=torch.float64)
    network = fxpath.trace(model, x)
    x[1] = 1.7e308  # finite, but two of them are not
    with pytest.raises(SampleError, match="NaN or infinite") as caught:
        NeuronIntGrad(steps=2).select(network, x, (0.5,))
    assert caught.value.positions == (1,)


# --- nothing to contribute ------------------------------------------------------------------------------------------


def test_sites_that_do_not_lead_to_the_response_are_named() -> None:
    network, x = traced("Unused"), BY_NAME["Unused"].x(3)
    with pytest.warns(NoContributionWarning, match="neuron_intgrad: 2 sites do not lead to the response 'logit'.*"
                      "score 0: relu, relu_1$") as caught:  # fmt: skip
        scores = NeuronIntGrad(steps=3).scores(network, x)
    assert len(caught) == 1
    first, second, last = network.sites
    assert scores.completeness is not None
    assert not bool(scores.signed[:, first.slice].any() | scores.signed[:, second.slice].any())
    assert not bool(scores.completeness[:, :2].any())
    torch.testing.assert_close(scores.signed[:, last.slice], naive(network, x, 3)[:, last.slice])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NeuronIntGrad(steps=3, sites="relu_2").scores(network, x)
    with pytest.warns(NoContributionWarning, match="1 sites do not lead"):
        NeuronIntGrad(steps=3, sites="relu_1+relu_2").scores(network, x)


def test_a_break_is_not_complete() -> None:
    """A site whose value matters but whose gradient is cut scores 0, and the completeness error says so."""
    network, x = traced("Break"), BY_NAME["Break"].x(3)
    scores = NeuronIntGrad(steps=3).scores(network, x)
    site = network.sites[0]
    assert not bool(scores.signed[:, site.slice].any())
    assert scores.completeness is not None
    assert float(scores.completeness[:, 0].min()) > 1e-4
    assert float(scores.completeness[:, 1:].max()) < 1e-13


def test_a_target_whose_gradient_vanishes_everywhere() -> None:
    """The second class has no weights: its pathway is empty, and that is said."""
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval()
    nn.init.zeros_(model[4].weight[1])
    x = torch.randn(3, 3, dtype=torch.float64)
    network = fxpath.trace(model, x)
    with pytest.warns(NoContributionWarning, match="neuron_intgrad: no neuron of sample 'a', 'c' scores"):
        selection = NeuronIntGrad(steps=3).select(network, Samples(x, [1, 0, 1], ids=["a", "b", "c"]), (0.5,))
    assert [int(count) > 0 for count in selection[0.5].count] == [False, True, False]
    assert selection.scores is not None
    assert not bool(selection.scores.signed[[0, 2]].any())
    assert not bool(selection.diagnostics["completeness"][[0, 2]].any())
    assert bool(selection.diagnostics["completeness_relative"][[0, 2]].isnan().all())


# --- diagnostics, and a store ---------------------------------------------------------------------------------------


def test_diagnostics() -> None:
    network, x = traced("Depthwise"), BY_NAME["Depthwise"].x(3)
    selection = NeuronIntGrad(steps=4, rule="right").select(network, x, (0.5, 0.9))
    expected = naive(network, x, 4, "right")
    absolute = errors(network, x, expected)
    sizes = torch.stack([expected[:, site.slice].abs().sum(1) for site in network.sites], 1)
    assert set(selection.diagnostics) == {"completeness", "completeness_relative"}
    torch.testing.assert_close(selection.diagnostics["completeness"], absolute, rtol=0, atol=1e-13)
    torch.testing.assert_close(selection.diagnostics["completeness_relative"], absolute / sizes, rtol=0, atol=1e-11)
    assert float(absolute.max()) > 1e-4


FAMILY = "neuron_intgrad:steps=4"


def stored(path: Path, *selectors: NeuronIntGrad, **options: Any) -> fxpath.Store:
    chosen = {"sparsities": [0.8], "threads": 1, "progress": False, "micro_batch": 4, **options}
    fxpath.compute(small(), cifar(), path, selectors=list(selectors), **chosen)
    return fxpath.open_store(path)


def test_through_a_store(tmp_path: Path) -> None:
    """Scores, pathways and completeness errors, with the sparsities cut offline; the budget is no part of the name."""
    network = small()
    x = torch.stack([cifar()[row][0] for row in range(20)])
    signed = NeuronIntGrad(steps=4, rank="signed")
    with stored(
        tmp_path / "run.h5", NeuronIntGrad(steps=4, max_batch=3, max_bytes=10**9), signed, scores="float32"
    ) as store:
        assert store.families == (FAMILY, "neuron_intgrad:rank=signed,steps=4")
        for selector, name in ((NeuronIntGrad(steps=4), FAMILY), (signed, "neuron_intgrad:rank=signed,steps=4")):
            selection = selector.select(network, x, (0.8, 0.95))
            assert selection.scores is not None
            for row in range(20):
                kept = selection[0.8].mask[row].numpy()
                found = store.mask(f"{name}@0.8", row)
                assert (found & kept).sum() >= 0.99 * (found | kept).sum()  # last bits go by the batch size
                np.testing.assert_allclose(store.scores(name, row), selection.scores.signed[row], atol=1e-5)
                for sparsity in (0.8, 0.95):
                    cut, expected = store.cut(name, sparsity, row), selection[sparsity].mask[row].numpy()
                    assert (cut & expected).sum() >= 0.99 * (cut | expected).sum()
            for column in ("completeness", "completeness_relative"):
                given = store.column(f"{name}@0.8", f"diagnostics/{column}")
                assert given.shape == (20, len(network.sites))
                np.testing.assert_allclose(given, selection.diagnostics[column], atol=1e-4)
        negative = np.stack([store.scores("neuron_intgrad:rank=signed,steps=4", row) < 0 for row in range(20)])
        assert negative.any()
        cut = np.stack([store.cut("neuron_intgrad:rank=signed,steps=4", 0.0, row) for row in range(20)])
        assert not (cut & negative).any()
        assert (np.stack([store.cut(FAMILY, 0.0, row) for row in range(20)]) & negative).any()
        assert store.parameters(f"{FAMILY}@0.8")["steps"] == 4


# --- memory bounds --------------------------------------------------------------------------------------------------


def test_too_little_memory_says_how_much_is_needed() -> None:
    network, x = traced("Plain"), BY_NAME["Plain"].x(3)
    with pytest.raises(InputError, match=r"one sample needs about [\d,]+ bytes behind site relu1") as caught:
        NeuronIntGrad(max_bytes=100).scores(network, x)
    assert "sites=" in str(caught.value)
    (said,) = re.findall(r"needs about ([\d,]+) bytes", str(caught.value))
    needed = int(said.replace(",", ""))
    assert needed >= (75 + 27) * 8  # what is behind the first site is a site more
    expected = naive(network, x, 4)
    for enough in (needed, 2 * needed, 7 * needed, 1000 * needed):
        found = NeuronIntGrad(steps=4, max_bytes=enough).scores(network, x).signed
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
    with pytest.raises(InputError, match="bytes behind site relu1"):
        NeuronIntGrad(max_bytes=needed - 1).scores(network, x)
    NeuronIntGrad(max_bytes=needed - 1, sites="relu2").scores(network, x)  # a later site needs less


class Counted(nn.Module):
    """A ReLU that remembers the largest batch it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.note = Note()

    def forward(self, x: Tensor) -> Tensor:
        self.note.most = max(self.note.most, int(x.shape[0]))
        return torch.relu(x)


class Note:
    most = 0


def test_no_more_rows_run_at_once_than_asked() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), Counted(), nn.Linear(6, 3)).eval()
    x = torch.randn(5, 4)
    network = fxpath.trace(model, x, leaves=Counted)
    note = model[3].note
    NeuronIntGrad(steps=20).scores(network, x)  # whether copies may be stacked is tried once
    for most in (1, 2, 4, 5, 9, 10, 16, 100):
        note.most = 0
        NeuronIntGrad(steps=20, max_batch=most).scores(network, x)
        pieces = [min(most, 5), 5 % most if most < 5 else 0]
        assert note.most <= most
        assert note.most >= min(max(pieces), most)
        if most >= 10:
            assert note.most > most / 2


PEAK = """
import json, sys, threading
import psutil, torch
from torch import nn
import fxpath

most, limit = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
layers = []
for first in range(6):
    layers += [nn.Conv2d(3 if first == 0 else 16, 16, 3, padding=1), nn.ReLU()]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()
x = torch.randn(1, 3, 192, 192)
network = fxpath.trace(model, x)
network.gradients(x)
process, seen, over = psutil.Process(), [], threading.Event()

def watch():
    while not over.wait(0.002):
        seen.append(process.memory_info().rss)

thread = threading.Thread(target=watch)
before = process.memory_info().rss
thread.start()
fxpath.NeuronIntGrad(steps=16, sites="1", max_batch=most, max_bytes=limit).scores(network, x)
over.set()
thread.join()
print(json.dumps((max(seen) - before) / 2**20))
"""


def peak(most: int, limit: int = 0) -> float:
    """MiB that a run adds, at its peak, to the memory in use."""
    ended = run(PEAK, most, limit)
    assert ended.returncode == 0, ended.stderr
    return float(json.loads(ended.stdout))


@pytest.mark.slow
def test_memory_is_bounded_by_what_runs_at_once() -> None:
    """A value is 2.25 MiB here; a row's forward and backward hold seven to ten of them, as the operators choose."""
    one, four, sixteen = (peak(most) for most in (1, 4, 16))
    assert one < four < sixteen
    assert 12 * 5 < sixteen - four < 12 * 30
    assert sixteen - one < 15 * 30
    bounded = peak(16, 40 * 2**20)
    assert bounded - one < 2 * 40
    assert bounded < sixteen - 80


# --- restricted networks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Concat", "ResidualIadd", "BatchFolded", "SqueezeExcitation", "Norms"])
@pytest.mark.parametrize("kind", ["masked", "frozen"])
def test_restricted_networks(name: str, kind: str) -> None:
    """The contributions in a masked or frozen network are that network's own; outside they are what they were."""
    network, x = traced(name), BY_NAME[name].x(4, seed=5)
    free = NeuronIntGrad(steps=4).scores(network, x).signed
    for seed in (1, 2):
        pathways = Random(seed=seed).select(network, x, (0.3,))[0.3]
        with network.masked(pathways) if kind == "masked" else network.frozen(pathways, at=x):
            expected = naive(network, x, 4)
            largest = float(expected.abs().max())
            for most in (16, 4):
                scores = NeuronIntGrad(steps=4, max_batch=most).scores(network, x)
                torch.testing.assert_close(scores.signed, expected, rtol=0, atol=1e-12 * largest)
                if kind == "masked":
                    assert bool((scores.signed[~pathways.mask] == 0).all())
    if kind == "masked" or name != "Norms":  # which has one site: behind it nothing is frozen
        assert float((free - expected).abs().max()) > 1e-3 * largest
    assert torch.equal(NeuronIntGrad(steps=4).scores(network, x).signed, free)


def test_pathways_of_another_batch_are_refused() -> None:
    network, x = traced("Concat"), BY_NAME["Concat"].x(4)
    pathways = Random().select(network, x[:3], (0.5,))[0.5]
    with network.masked(pathways), pytest.raises(RestrictionError, match="3"):
        NeuronIntGrad(steps=2).scores(network, x)


# --- types and modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "allowed"), [(torch.float32, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)], ids=str
)
@pytest.mark.parametrize("name", ["Concat", "OverlappingPool", "MLP"])
def test_other_weights(name: str, kind: torch.dtype, allowed: float) -> None:
    case = BY_NAME[name]
    model, x = case.model().to(kind), case.x(2).to(kind)
    network = fxpath.trace(model, x)
    wanted = network.original(x).target
    exact = fxpath.trace(case.model().to(kind).double(), x.double())  # the same rounded numbers
    expected = naive(exact, x.double(), 8, target=wanted)
    scores = NeuronIntGrad(steps=8).scores(network, x)
    assert scores.signed.dtype == torch.float32
    assert float((scores.signed - expected).abs().max()) < allowed * float(expected.abs().max())
    assert scores.completeness is not None
    assert scores.completeness.dtype == torch.float64
    assert scores.pathways(0.9).count.tolist() == [network.index.kept(0.9)] * 2


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad, nullcontext])
def test_in_any_mode(context: Callable[[], Any]) -> None:
    network, x = traced("Concat"), BY_NAME["Concat"].x(3)
    expected = NeuronIntGrad(steps=3).scores(network, x)
    by_target = NeuronIntGrad(steps=3).scores(network, x, [0, 3, 1]).signed
    fresh = BY_NAME["Concat"].trace()
    with context():
        for each in (network, fresh):
            for given in (x, x.clone(), x.clone().requires_grad_()):
                found = NeuronIntGrad(steps=3).scores(each, given)
                assert torch.equal(found.signed, expected.signed)
                assert found.completeness is not None
                assert not found.signed.requires_grad
                assert not found.completeness.requires_grad
            wanted = torch.tensor([0, 3, 1])
            assert torch.equal(NeuronIntGrad(steps=3).scores(each, x, wanted).signed, by_target)
            assert NeuronIntGrad(steps=3, max_bytes=10**8).scores(each, x).pathways(0.5).batch == 3
    again = NeuronIntGrad(steps=3).scores(fresh, x)  # what is kept of the graphs serves outside as well
    assert torch.equal(again.signed, expected.signed)


def test_weights_that_need_no_gradient() -> None:
    case = BY_NAME["Concat"]
    model = case.model()
    network = case.trace(model.requires_grad_(False))
    expected = NeuronIntGrad(steps=3).scores(traced("Concat"), case.x()).signed
    torch.testing.assert_close(NeuronIntGrad(steps=3).scores(network, case.x()).signed, expected)


def test_weights_that_change() -> None:
    """Sub-graphs are kept, weights are read anew."""
    case = BY_NAME["Concat"]
    model = case.model()
    network, x = case.trace(model), case.x()
    before = NeuronIntGrad(steps=3).scores(network, x).signed
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = NeuronIntGrad(steps=3).scores(network, x).signed
    torch.testing.assert_close(after, naive(network, x, 3))
    assert float((after - before).abs().max()) > 1e-3 * float(before.abs().max())


# --- nothing left behind --------------------------------------------------------------------------------------------

SELECTORS = (NeuronIntGrad(steps=4), NeuronIntGrad(steps=4, max_batch=2), NeuronIntGrad(steps=4, max_bytes=10**6))


@pytest.fixture
def model() -> Sighted:
    torch.manual_seed(0)
    return Sighted().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("granularity", ["unit", "channel"])
def test_nothing_is_left_behind(granularity: str, model: Sighted, x: Tensor) -> None:
    network, record = watched(model, x, granularity=granularity), model.relu.record
    for selector in SELECTORS:
        selector.select(network, x, (0.5,))  # whatever is made once is made now
    expected, before = network(x).detach(), x.clone()
    with uncollected():
        count = tensors()
        for selector in SELECTORS:
            record.start()
            with unchanged(model, network._module):
                result = selector.select(network, x, (0.5, 0.9))
                del result
            assert record.calls > 0
            assert record.alive() == 0
        assert tensors() == count
    assert torch.equal(network(x), expected)
    assert torch.equal(model(x), expected)
    assert torch.equal(x, before)
    assert x.grad is None


def test_a_first_call_leaves_nothing_behind(model: Sighted, x: Tensor) -> None:
    network, record = watched(model, x), model.relu.record
    with uncollected(), unchanged(model, network._module):
        record.start()
        NeuronIntGrad(steps=3).scores(network, x)
        assert record.alive() == 0


@pytest.mark.parametrize("selector", SELECTORS, ids=["plain", "few", "bytes"])
def test_nothing_is_left_behind_when_an_activation_fails(selector: NeuronIntGrad, model: Sighted, x: Tensor) -> None:
    """Each activation that a call runs fails in turn."""
    network, record = watched(model, x), model.relu.record
    selector.scores(network, x)
    record.start()
    expected = selector.scores(network, x).signed
    runs = record.calls
    assert runs > 10
    with uncollected():
        count = tensors()
        require_clean_failures(network, model, record, range(1, runs + 1), lambda: selector.scores(network, x))
        assert tensors() == count
    record.start()
    assert torch.equal(selector.scores(network, x).signed, expected)


def test_a_failure_in_a_first_call_is_no_verdict(model: Sighted, x: Tensor) -> None:
    """Whatever fails while a call finds out how to run, the next call answers as if nothing had been."""
    expected = NeuronIntGrad(steps=4).scores(watched(model, x), x).signed
    record = model.relu.record
    fresh = watched(model, x)
    record.start()
    NeuronIntGrad(steps=4).scores(fresh, x)
    runs = record.calls
    for turn in range(1, runs + 1, 3):
        network = watched(model, x)
        record.start(fails_at=turn)
        try:
            NeuronIntGrad(steps=4).scores(network, x)
        except RuntimeError as error:
            assert "this activation fails" in str(error)  # noqa: PT017
        record.start()
        found = NeuronIntGrad(steps=4).scores(network, x).signed
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert record.alive() == 0


# --- an accelerator -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_an_accelerator() -> None:
    """Scores are on the device, and those of the host within float32's rounding."""
    from test_gpu import network_on

    on_host, y = network_on("cpu")
    network, x = network_on("cuda")
    for selector in (NeuronIntGrad(), NeuronIntGrad(max_batch=3), NeuronIntGrad(max_bytes=10**7, rule="midpoint")):
        here, there = selector.scores(on_host, y, [0, 1, 2, 3]), selector.scores(network, x, [0, 1, 2, 3])
        assert there.signed.is_cuda
        assert there.completeness is not None
        assert there.completeness.is_cuda
        assert float((there.signed.cpu() - here.signed).abs().max()) < 1e-3 * float(here.signed.abs().max())
    mct = NeuronMCT().scores(network, x, [0, 1, 2, 3])
    last = network.sites[-1]
    torch.testing.assert_close(there.signed[:, last.slice], mct.signed[:, last.slice], rtol=1e-3, atol=1e-5)
    assert isinstance(there, Scores)


def test_in_inference_mode_a_batch_may_be_split() -> None:
    network, x = traced("TwoInputs"), BY_NAME["TwoInputs"].x(3)
    expected = NeuronIntGrad(steps=3).scores(network, x).signed
    with torch.inference_mode():
        for rows in (1, 2, 16):
            found = NeuronIntGrad(steps=3, max_batch=rows).scores(network, tuple(part.clone() for part in x)).signed
            torch.testing.assert_close(found, expected)
