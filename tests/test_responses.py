"""Responses at places of any output, and hidden neurons, against what is written by hand."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import BY_NAME
from small_jobs import FEW, Chosen, inputs, module
from torch import Tensor, nn

import fxpath
from fxpath import responses
from fxpath.ablation import marginal_contributions
from fxpath.errors import BranchError, FxpathError, InputError, NoContributionWarning, SiteError, TraceWarning
from fxpath.job import Job
from fxpath.outputs import read_path
from fxpath.pathways import Pathways
from fxpath.responses import (
    ClassResponse,
    Detection,
    Logit,
    Margin,
    Neuron,
    OutputFunction,
    Pixel,
    Probability,
    Region,
    Response,
    Token,
    detection,
    identity,
    neuron,
    parse_response,
    pixel,
    region,
    token,
)
from fxpath.selectors import DGR, GreedyPruning, NeuronIntGrad, NeuronMCT
from fxpath.stacking import SiteRuns

Picked = Callable[[Any], Tensor]


class Segmentation(nn.Module):
    """A map of class scores under "out", another under "aux"; `checked` needs torch.export."""

    def __init__(self, *, checked: bool = False) -> None:
        super().__init__()
        self.checked = checked
        self.one, self.two = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.out, self.aux, self.relu = nn.Conv2d(5, 4, 1), nn.Conv2d(6, 4, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.checked and x.shape[2] != 5:
            raise ValueError("five rows, please")
        h = self.relu(self.one(x))
        return {"aux": self.aux(h), "out": self.out(self.relu(self.two(h)))}


class Tokens(nn.Module):
    """A tiny transformer: `(B, 3, 4)` → scores of 7 words at 3 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
        self.head = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Boxes(nn.Module):
    """A RetinaNet's head on two levels: 2 anchors a point, 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.deep = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, 2)
        self.scores, self.sides = nn.Conv2d(6, 2 * 3, 1), nn.Conv2d(6, 2 * 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.body(x))
        levels = (h, F.relu(self.deep(h)))

        def listed(made: list[Tensor], width: int) -> Tensor:
            return torch.cat([m.unflatten(1, (2, width)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in made], 1)

        return {
            "cls_logits": listed([self.scores(level) for level in levels], 3),
            "bbox_regression": listed([self.sides(level) for level in levels], 4),
        }


class Line(nn.Module):
    """A one-dimensional map `(B, 4, 6)`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv1d(5, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Volume(nn.Module):
    """A three-dimensional map `(B, 4, 3, 4, 5)`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv3d(5, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Pair(nn.Module):
    """Two inputs by name, and a tuple within a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(3, 4)
        self.last, self.side = nn.Conv2d(4, 5, 1), nn.Linear(4, 3)

    def forward(self, picture: Tensor, words: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        said = F.relu(self.right(words))
        h = F.relu(self.left(picture) + said[:, :, None, None])
        return said, (self.side(said), self.last(h))


def double(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        model = build().double().eval()
    for parameter in model.parameters():
        parameter.data *= 2 if parameter.ndim > 1 else 0.2  # PyTorch's own first numbers let all places look alike
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


MASK = torch.tensor([[0, 1, 1, 0, 0]] * 2 + [[0, 0, 0, 0, 1]] * 3, dtype=torch.bool)
MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "segmentation": (Segmentation, noise(3, 2, 5, 5)),
    "exported": (lambda: Segmentation(checked=True), noise(3, 2, 5, 5)),
    "tokens": (Tokens, noise(3, 3, 4)),
    "boxes": (Boxes, noise(3, 2, 5, 5)),
    "line": (Line, noise(3, 2, 6)),
    "volume": (Volume, noise(3, 2, 3, 4, 5)),
    "pair": (Pair, {"words": noise(3, 3), "picture": noise(3, 2, 4, 4)}),
}


@dataclass(frozen=True)
class Case:
    """A place in a model's output, and by hand the scores `(B, classes, n)` at its points."""

    model: str
    place: Any
    output: Any
    points: Picked

    def network(self, response: Response | Picked) -> fxpath.Network:
        build, x = MODELS[self.model]
        return fxpath.trace(double(build), x, response=response)


CASES = {
    "pixel": Case("segmentation", Pixel(3, 1), "out", lambda y: y["out"][:, :, 3, 1, None]),
    "pixel of another part": Case("segmentation", Pixel(0, 4), "aux", lambda y: y["aux"][:, :, 0, 4, None]),
    "by convention": Case("segmentation", Pixel(2, 2), None, lambda y: y["out"][:, :, 2, 2, None]),
    "exported": Case("exported", Pixel(4, 1), "out", lambda y: y["out"][:, :, 4, 1, None]),
    "box": Case("segmentation", Region(1, 2, 4, 5), "out", lambda y: y["out"][:, :, 1:4, 2:5].flatten(2)),
    "mask": Case("exported", Region(mask=MASK), "out", lambda y: y["out"][:, :, MASK]),
    "whole": Case("segmentation", Region(), "out", lambda y: y["out"].flatten(2)),
    "token": Case("tokens", Token(1), None, lambda y: y[:, 1, :, None]),
    "last token": Case("tokens", Token(-1), None, lambda y: y[:, 2, :, None]),
    "detection": Case("boxes", Detection(53), "cls_logits", lambda y: y["cls_logits"][:, 53, :, None]),
    "point of a line": Case("line", Pixel(5), None, lambda y: y[:, :, 5, None]),
    "part of a line": Case("line", Region(1, 3), None, lambda y: y[:, :, 1:3]),
    "voxel": Case("volume", Pixel(2, 0, 4), None, lambda y: y[:, :, 2, 0, 4, None]),
    "box of voxels": Case("volume", Region(0, 1, 2, 2, 3, 4), None, lambda y: y[:, :, :2, 1:3, 2:4].flatten(2)),
    "nested": Case("pair", Pixel(1, 3), (1, 1), lambda y: y[1][1][:, :, 1, 3, None]),
    "no place": Case("pair", None, (1, 0), lambda y: y[1][0][:, :, None]),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def mean(points: Tensor) -> Tensor:
    return points.sum(2) / points.shape[2]


def share(points: Tensor) -> Tensor:
    """The mean of each point's softmax."""
    return (points.exp() / points.exp().sum(1, keepdim=True)).sum(2) / points.shape[2]


def of(scores: Tensor, target: Tensor) -> Tensor:
    return scores[range(len(scores)), target]


def ahead(scores: Tensor, target: Tensor) -> Tensor:
    return torch.stack([row[t] - torch.cat([row[:t], row[t + 1 :]]).max() for row, t in zip(scores, target)])  # noqa: B905


Kind = tuple[Callable[..., Response], Picked, Callable[[Tensor, Tensor], Tensor]]
KINDS: dict[str, Kind] = {
    "logit": (Logit, mean, of),
    "probability": (Probability, share, of),
    "margin": (Margin, mean, ahead),
    "margin against 1": (lambda **more: Margin(1, **more), mean, lambda s, t: of(s, t) - s[:, 1]),
}


# --- numbers and gradients by hand ----------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_numbers_and_gradients(case: Case, kind: Kind) -> None:
    make, pooled, number = kind
    network = case.network(make(output=case.output, at=case.place))
    x = MODELS[case.model][1]
    with torch.no_grad():
        scores = pooled(case.points(network(x)))
    predicted = scores.argmax(1)
    assert network.original(x).target.tolist() == predicted.tolist()  # type: ignore[union-attr]
    for target in (None, [2, 0, 1]):
        wanted = predicted if target is None else torch.tensor(target)
        by_hand = case.network(OutputFunction(lambda y, t=wanted: number(pooled(case.points(y)), t)))
        found, expected = network.gradients(x, target), by_hand.gradients(x)
        torch.testing.assert_close(found.response, expected.response, rtol=1e-12, atol=1e-14)
        assert any(bool(slope.any()) for slope in found.gradients)
        for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
        original = network.original(x, target)
        softmax = scores if pooled is share else scores.softmax(1)
        torch.testing.assert_close(original.probability, of(softmax, wanted), rtol=1e-12, atol=0)


def test_a_region_has_the_mean_of_probabilities_not_the_probability_of_the_mean() -> None:
    case, x = CASES["whole"], MODELS["segmentation"][1]
    network = case.network(Probability("out", Region()))
    logits = mean(case.points(network(x)))
    target = network.original(x).target
    assert target is not None
    assert float((network.respond(x) - of(logits.softmax(1), target)).detach().abs().max()) > 1e-4


def test_probabilities_that_are_nearly_nothing_have_a_gradient() -> None:
    scores = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    scores[:, 0] = 800
    leaf = scores.requires_grad_()
    said = Probability(at=Region()).logits(leaf)
    assert said.isfinite().all()
    assert torch.autograd.grad(said[0, 1], leaf)[0].abs().sum() > 0.5


@each_case
def test_a_restricted_network_keeps_the_original_class(case: Case) -> None:
    network = case.network(Logit(case.output, case.place))
    x = MODELS[case.model][1]
    original = network.original(x)
    target = original.target
    assert target is not None
    torch.manual_seed(0)
    differed = False
    for _ in range(20):
        pathways = Pathways(torch.rand(3, network.index.size) < 0.1, network.index)
        with network.masked(pathways):
            scores = mean(case.points(network(x)))
            torch.testing.assert_close(network.respond(x), of(scores, target))
            differed |= scores.argmax(1).tolist() != target.tolist()
            assert torch.equal(network.gradients(x).target, target)  # type: ignore[arg-type]
        outcome = network.outcome(x, pathways)
        torch.testing.assert_close(outcome.response, of(scores, target).detach())
        assert outcome.same_class.tolist() == (scores.argmax(1) == target).tolist()  # type: ignore[union-attr]
    assert differed
    with network.frozen(pathways, at=x):
        torch.testing.assert_close(network.respond(x), original.response)


# --- as a model that picks the place itself -------------------------------------------------------------------------


class Picking(nn.Module):
    """The model with the place built in, so that its output is `(B, classes)`."""

    def __init__(self, model: nn.Module, pick: Picked) -> None:
        super().__init__()
        self.model, self.pick = model, pick

    def forward(self, x: Tensor) -> Tensor:
        return self.pick(self.model(x))


class PickingPair(Picking):
    def forward(self, words: Tensor, picture: Tensor) -> Tensor:  # type: ignore[override]
        return self.pick(self.model(words=words, picture=picture))


def both(name: str) -> tuple[fxpath.Network, fxpath.Network, Any]:
    case = CASES[name]
    build, x = MODELS[case.model]
    wrapper = PickingPair if isinstance(x, dict) else Picking
    alone = fxpath.trace(wrapper(double(build), lambda y: mean(case.points(y))).eval(), x)
    return case.network(Logit(case.output, case.place)), alone, x


SOME = ("pixel", "exported", "mask", "whole", "last token", "detection", "voxel", "nested")


@pytest.mark.parametrize("target", [None, [2, 0, 1]], ids=["predicted", "given"])
@pytest.mark.parametrize("name", SOME)
def test_contributions(name: str, target: Any) -> None:
    network, alone, x = both(name)
    ours, theirs = list(network.index), list(alone.index)
    # another execution order of sites would need sorting; the wrapper runs the same lines
    assert [site.shape for site in ours] == [site.shape for site in theirs]
    for selector in (NeuronMCT(), NeuronIntGrad(steps=6), NeuronIntGrad(steps=6, max_batch=1)):
        found, expected = selector.scores(network, x, target), selector.scores(alone, x, target)
        torch.testing.assert_close(found.signed, expected.signed, rtol=1e-9, atol=1e-14)
        assert float(found.signed.abs().max()) > 0
        if found.completeness is not None:
            torch.testing.assert_close(found.completeness, expected.completeness, rtol=1e-6, atol=1e-13)
    some = np.arange(0, network.index.size, 7)
    torch.testing.assert_close(
        marginal_contributions(network, fxpath.Samples(x, target), some, progress=False),
        marginal_contributions(alone, fxpath.Samples(x, target), some, progress=False),
        rtol=1e-9,
        atol=1e-13,
    )


@pytest.mark.parametrize("name", SOME)
def test_pruning(name: str) -> None:
    network, alone, x = both(name)
    for selector in (GreedyPruning(share=0.05), DGR(lr=0.2, gamma=0.002, iterations=12)):
        found, expected = selector.select(network, x, (0.5,)), selector.select(alone, x, (0.5,))
        assert torch.equal(found.pathways[0.5].mask, expected.pathways[0.5].mask)
        assert found.pathways[0.5].mask.any()
        for column, values in found.diagnostics.items():
            torch.testing.assert_close(values, expected.diagnostics[column], rtol=1e-6, atol=1e-9, equal_nan=True)


# --- the last layer, narrow -----------------------------------------------------------------------------------------


class Bare(nn.Module):
    """The map alone, so that the last layer is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 5, 2), nn.Conv2d(5, 40, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.two(F.relu(self.one(x)))))


class Words(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 40))


@dataclass(frozen=True)
class Turned:
    """A user's own place, which turns the classes round."""

    kind = "turned"
    parameters: Any = None

    def __call__(self, scores: Tensor) -> Tensor:
        return scores[:, :, 1, 1, None].flip(1)


NARROW: dict[str, tuple[Any, Any, Any, Picked, bool]] = {
    "pixel": (Bare, noise(3, 2, 5, 5), Pixel(1, 0), lambda y: y[:, :, 1, 0], True),
    "region": (Bare, noise(3, 2, 5, 5), Region(0, 0, 2, 1), lambda y: y[:, :, :2, 0].mean(2), True),
    "token": (Words, noise(3, 3, 4), Token(-1), lambda y: y[:, -1], True),
    "box": (Words, noise(3, 3, 4), Detection(0), lambda y: y[:, 0], True),
    "another": (Bare, noise(3, 2, 5, 5), Turned({}), lambda y: y[:, :, 1, 1].flip(1), False),
}


def plain_loop(network: fxpath.Network, x: Tensor, target: Tensor, pick: Picked, steps: int) -> Tensor:
    """NeuronIntGrad by whole suffixes, one step at a time."""
    nodes, weights = fxpath.selectors.integrated.quadrature("midpoint", steps)
    found = []
    for number in range(len(network.sites)):
        suffix = network.suffix(number)
        activation, boundary = suffix.cache(x)
        total = torch.zeros_like(activation)
        for alpha, weight in zip(nodes, weights, strict=True):
            leaf = (activation * alpha).requires_grad_()
            (slope,) = torch.autograd.grad(of(pick(suffix(leaf, boundary)), target).sum(), leaf)
            total += weight * slope
        found.append((total * activation).flatten(1))
    return torch.cat(found, 1)


@pytest.mark.parametrize("altered", [False, True], ids=["as it is", "hooked"])
@pytest.mark.parametrize("name", NARROW)
def test_the_last_layer_is_narrowed_rightly_or_not_at_all(name: str, altered: bool) -> None:
    build, x, place, pick, narrow = NARROW[name]
    network = fxpath.trace(double(build), x, response=Logit(at=place))
    target = torch.tensor([30, 1, 30])
    before = NeuronIntGrad(steps=4, rule="midpoint").scores(network, x, target=target).signed
    samples = network.samples(x, target)
    assert SiteRuns(network, 0, samples, target, 2, 40)._parts.narrow is narrow
    if altered:  # after the narrow graph was made
        last = network._called[-1] if build is Words else network._module.get_submodule("out")
        last.register_forward_hook(lambda *given: given[2].sin())
    expected = plain_loop(network, x, target, pick, 4)
    found = NeuronIntGrad(steps=4, rule="midpoint").scores(network, x, target=target).signed
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    assert torch.allclose(found, before) is not altered


# --- hidden neurons -------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """A reused rectifier, a skip, and a side branch that `relu_2` does not read."""

    def __init__(self, until: int = 9) -> None:
        super().__init__()
        self.until = until
        self.one, self.side = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 3, 1)
        self.two, self.three = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 2)
        self.relu, self.last = nn.ReLU(inplace=True), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.one(x))
        aside = self.relu(self.side(x))
        h = self.relu(self.two(h) + h)
        if self.until == 2:
            return h
        z = self.three(h)
        if self.until == 3:
            return z
        return self.last((self.relu(z) + aside[:, :, 1:, 1:]).mean((2, 3)))


@pytest.fixture
def deep() -> tuple[nn.Module, Tensor]:
    return double(Deep), noise(3, 2, 5, 5)


HIDDEN: dict[str, tuple[Neuron, int, Picked]] = {
    "unit": (neuron("relu_2", (3, 2, 4)), 2, lambda h: h[:, 3, 2, 4]),
    "channel": (neuron("relu_2", channel=3), 2, lambda h: h[:, 3].mean((1, 2))),
    "pre-activation": (neuron("three", (1, 0, 3)), 3, lambda z: z[:, 1, 0, 3]),
    "its channel": (neuron("three", channel=2), 3, lambda z: z[:, 2].mean((1, 2))),
}


def leading(network: fxpath.Network, kept: fxpath.Network) -> list[int]:
    """The columns of another network's index that a cut network has."""
    return [n for site in kept.sites for n in range(*network.index.site(site.name).slice.indices(network.index.size))]


@pytest.mark.parametrize("name", HIDDEN)
def test_a_hidden_neuron_is_the_output_of_a_model_that_is_cut_there(name: str, deep: tuple[nn.Module, Tensor]) -> None:
    response, until, pick = HIDDEN[name]
    model, x = deep
    network = fxpath.trace(model, x, response=response)
    short = Deep(until).double().eval()
    short.load_state_dict(model.state_dict())
    by_hand = fxpath.trace(short, x, response=pick)
    assert torch.equal(network(x), by_hand(x))
    torch.testing.assert_close(network.respond(x), by_hand.respond(x), rtol=1e-14, atol=0)
    names = ["relu"] if until == 2 else ["relu", "relu_2"]
    assert [site.name for site in network.sites] == names
    assert set(network.edges) == ({(-1, 0), (0, 1)} if until == 2 else {(-1, 0), (0, 1), (1, 2)})
    for selector in (NeuronMCT(), NeuronIntGrad(steps=5)):
        columns = leading(by_hand, network)
        found = selector.scores(network, x).signed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoContributionWarning)  # the side branch, which the cut network has not
            expected = selector.scores(by_hand, x).signed
        torch.testing.assert_close(found, expected[:, columns], rtol=1e-11, atol=1e-14)
        assert float(found.abs().max()) > 0


def test_nothing_behind_a_hidden_neuron_is_run(deep: tuple[nn.Module, Tensor]) -> None:
    model, x = deep
    response = neuron("relu_2", (3, 2, 4))
    network = fxpath.trace(model, x, response=response)
    assert set(network.tensors) == {"one.weight", "one.bias", "two.weight", "two.bias"}
    runs: list[str] = []

    def raises(*_: Any) -> None:
        raise AssertionError("this lies behind the neuron")

    handles = [getattr(model, name).register_forward_pre_hook(raises) for name in ("three", "last", "side")]
    handles.append(model.get_submodule("two").register_forward_pre_hook(lambda *_: runs.append("two")))
    network(x)
    assert runs == ["two"]
    pathways = NeuronMCT().scores(network, x).pathways(0.5)
    network.outcome(x, pathways)
    for selector in fxpath.selectors.names():
        chosen = fxpath.selectors.parse("dgr:iterations=5,lr=0.1" if selector == "dgr" else selector)
        selection = chosen.select(network, x, (0.5,))
        assert selection.pathways
    marginal_contributions(network, x, [0, 5], progress=False)
    for handle in handles:
        handle.remove()
    assert fxpath.trace(model, x).index.size > network.index.size  # the model is as it was


def test_a_masked_and_a_frozen_hidden_neuron(deep: tuple[nn.Module, Tensor]) -> None:
    model, x = deep
    network = fxpath.trace(model, x, response=neuron("relu_2", (3, 2, 4)))
    z = network._module.get_submodule("two")
    keep = torch.rand(3, network.index.size, generator=torch.Generator().manual_seed(1)) < 0.5
    first = F.relu(network._module.get_submodule("one")(x))
    masked = first * keep.view_as(first)
    pathways = Pathways(keep, network.index)
    with network.masked(pathways):
        expected = F.relu(z(masked) + masked)
        torch.testing.assert_close(network.respond(x), expected[:, 3, 2, 4], rtol=1e-13, atol=0)
        torch.testing.assert_close(network(x), expected, rtol=1e-13, atol=0)
    with network.frozen(pathways, at=x):
        torch.testing.assert_close(network.respond(x), F.relu(z(first) + first)[:, 3, 2, 4], rtol=1e-13, atol=0)
    outcome = network.outcome(x, pathways)
    torch.testing.assert_close(outcome.response, expected[:, 3, 2, 4].detach())
    rest = first * ~keep.view_as(first)
    torch.testing.assert_close(outcome.dropped_response, F.relu(z(rest) + rest)[:, 3, 2, 4].detach())
    assert outcome.same_class is None
    assert network.original(x).target is None


def test_a_neuron_by_its_number(deep: tuple[nn.Module, Tensor]) -> None:
    model, x = deep
    whole = fxpath.trace(model, x)
    number = whole.index.flat("relu_2", (3, 2, 4))
    network = fxpath.trace(model, x, response=neuron(*whole.index.locate(number)))
    assert torch.equal(network.respond(x), whole.activations(x)[2][:, 3, 2, 4])
    assert fxpath.trace(model, x, response=neuron(whole.sites[2], np.array([3, 2, 4]))).response == network.response


def test_rows_that_are_folded_into_the_batch() -> None:
    case = BY_NAME["BatchFolded"]
    x = case.x(3)
    whole = case.trace()
    (block,) = [site for site in whole.sites if site.name == "relu_1"]
    assert (block.fold, block.shape) == (3, (3, 3))
    values = whole.activations(x)[1].view(3, 3, 3)
    network = case.trace(response=neuron("relu_1", (2, 1)))
    assert network(x).shape == (3, 3, 3)
    assert torch.equal(network.respond(x), values[:, 2, 1])
    mean_of_channel = case.trace(response=neuron("relu_1", channel=1))
    torch.testing.assert_close(mean_of_channel.respond(x), values[:, :, 1].mean(1))
    assert mean_of_channel.response == neuron("relu_1", channel=1)  # where its channels are is no part of what it is
    assert identity(mean_of_channel.response) == identity(neuron("relu_1", channel=1))
    signed = NeuronIntGrad(steps=4).scores(network, x).signed.view(3, 3, 5)
    assert bool(signed[:, 2].any())
    assert not bool(signed[:, :2].any())  # other rows of the sample have no part in it


def test_hidden_neurons_of_other_networks() -> None:
    exported = BY_NAME["ShapeBranch"]
    network = exported.trace(response=neuron("relu_2", (1, 2, 0)))
    assert network.traced.tracer == "torch.export"
    assert torch.equal(network.respond(exported.x(2)), exported.trace().activations(exported.x(2))[2][:, 1, 2, 0])
    scalar = BY_NAME["ScalarOutput"]
    network = scalar.trace(response=neuron("relu_1"))
    assert torch.equal(network.respond(scalar.x(2)), scalar.trace().respond(scalar.x(2)))
    two = BY_NAME["DictInput"]
    network = two.trace(response=neuron("last", (3,)))
    assert torch.equal(network.respond(two.x(2)), two.trace()(two.x(2))[:, 3])
    pair, x = double(Pair), MODELS["pair"][1]
    network = fxpath.trace(pair, x, response=neuron("side", (2,)))  # which does not read the picture
    torch.testing.assert_close(network.respond(x), pair(**x)[1][0][:, 2], rtol=1e-14, atol=0)
    assert [site.name for site in network.sites] == ["relu"]
    assert bool(NeuronIntGrad(steps=3).scores(network, x).signed.any())
    table = nn.Sequential(nn.Embedding(9, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 6)).double().eval()
    words = torch.tensor([[1, 2, 3], [4, 5, 8]])
    network = fxpath.trace(table, words, response=neuron("3", channel=5))
    torch.testing.assert_close(network.respond(words), table(words)[:, :, 5].mean(1))  # a linear layer's come last


def test_channels_as_neurons_of_a_hidden_neuron(deep: tuple[nn.Module, Tensor]) -> None:
    model, x = deep
    response = neuron("relu_2", (3, 2, 4))
    units, channels = (fxpath.trace(model, x, response=response, granularity=g) for g in ("unit", "channel"))
    expected = NeuronMCT().scores(units, x).signed.view(3, 4, 25).sum(2)
    torch.testing.assert_close(NeuronMCT().scores(channels, x).signed, expected)


def test_sites_that_are_asked_for(deep: tuple[nn.Module, Tensor]) -> None:
    """Those that do not lead to the neuron are left out; a node that is nowhere is an error."""
    model, x = deep
    network = fxpath.trace(model, x, sites=["relu", "relu_1", "relu_3"], response=neuron("relu_2", channel=0))
    assert [site.name for site in network.sites] == ["relu"]
    with pytest.raises(SiteError, match=r"there is no node .*'relu_9'"):
        fxpath.trace(model, x, sites=["relu", "relu_9"], response=neuron("relu_2", channel=0))


@pytest.mark.parametrize(
    ("response", "error", "message"),
    [
        (neuron("relo_2", (0, 0, 0)), SiteError, r"^neuron: there is no node 'relo_2'; nearest: relu_2"),
        (neuron("relu_2", (4, 0, 0)), InputError, r"within \(4, 5, 5\) of relu_2, found \(4, 0, 0\)"),
        (neuron("relu_2", (0, 0, -1)), InputError, r"within \(4, 5, 5\) of relu_2, found \(0, 0, -1\)"),
        (neuron("relu_2", (1,)), InputError, r"within \(4, 5, 5\) of relu_2, found \(1,\); or channel=…"),
        (neuron("relu_2"), InputError, r"within \(4, 5, 5\) of relu_2, found none; or channel=…"),
        (neuron("relu_2", channel=4), InputError, r"relu_2 is \(4, 5, 5\), axis 0 .* a channel in 0 … 3, found 4"),
        (neuron("relu", (0, 0, 0)), SiteError, r"^neuron: no site leads to relu, .*take a later node"),
        (neuron("one", channel=1), SiteError, r"^neuron: no site leads to one"),
    ],
)
def test_neurons_that_are_not_there(
    response: Neuron, error: type[Exception], message: str, deep: tuple[nn.Module, Tensor]
) -> None:
    with pytest.raises(error, match=message) as raised:
        fxpath.trace(*deep, response=response)
    assert "\n" not in str(raised.value)
    assert fxpath.trace(*deep).index.size == 323


def test_nodes_without_a_value_for_each_sample() -> None:
    case = BY_NAME["SizeReshape"]
    with pytest.raises(SiteError, match=r"^neuron: size holds no neurons of each sample: .*found int; name another"):
        case.trace(response=neuron("size", (0,)))
    mixing = double(Mixing)
    x = noise(3, 4)
    with (
        pytest.raises(SiteError, match=r"mean holds no neurons .* first axis to grow .*; name another node$"),
        pytest.warns(TraceWarning, match="the others of its batch"),
    ):
        fxpath.trace(mixing, x, response=neuron("mean", (0,)))


class Patches(nn.Module):
    """A convolution, whose channels come first, and a linear layer, whose channels come last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(2, 3, 2), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).transpose(1, 2))


def test_channels_are_those_of_the_node_itself() -> None:
    model, x = double(Patches), noise(3, 2, 5)
    network = fxpath.trace(model, x, response=neuron("fc", channel=3))
    torch.testing.assert_close(network.respond(x), model(x)[:, :, 3].mean(1), rtol=1e-14, atol=0)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.one(x))
        return self.two(h - h.mean(0, keepdim=True))


# --- outputs --------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, ...]


class Named(NamedTuple):
    features: Tensor
    scores: list[Tensor]


class Wrapped(nn.Module):
    """One hidden layer, and class scores in whatever `wrap` makes of them."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any], *, checked: bool = False) -> None:
        super().__init__()
        self.wrap, self.checked = wrap, checked
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        if self.checked and x.shape[1] != 4:
            raise ValueError("four, please")
        h = F.relu(self.one(x))
        return self.wrap(self.two(h), h)


WRAPS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
    "tuple": (lambda y, h: (h, y), 1),
    "tuple from the end": (lambda y, h: (h, y), -1),
    "list": (lambda y, h: [y, h], 0),
    "dict": (lambda y, h: {"y": y, "h": h}, "y"),
    "dict of digits": (lambda y, h: {"0": h, "1": y}, 1),
    "dict of numbers": (lambda y, h: {0: h, 1: y}, 1),
    "dict by convention": (lambda y, h: {"hidden": (h,), "logits": y}, None),
    "only one": (lambda y, h: {"best": y.argmax(1), "heads": [(y,)]}, None),
    "nested": (lambda y, h: {"heads": [h, {"a": (y, h)}]}, ("heads", 1, "a", 0)),
    "named": (lambda y, h: Named(h, [y]), ("scores", 0)),
    "named by number": (lambda y, h: Named(h, [y]), (1, 0)),
    "dataclass": (lambda y, h: Answer(y, (h,)), "logits"),
    "dataclass by convention": (lambda y, h: Answer(y, (h,)), None),
    "dataclass nested": (lambda y, h: [Answer(h, (y,))], (0, "hidden", 0)),
}


BOTH_TRACERS = [(name, checked) for name in WRAPS for checked in (False, True)]


@pytest.mark.parametrize(
    ("name", "checked"),  # torch.export has to be told of dataclasses: below
    [(name, checked) for name, checked in BOTH_TRACERS if not (checked and name.startswith("dataclass"))],
)
def test_parts_of_an_output(name: str, checked: bool) -> None:
    wrap, part = WRAPS[name]
    model, x = double(lambda: Wrapped(wrap, checked=checked)), noise(3, 4)
    network = fxpath.trace(model, x, response=Logit(part))
    assert network.traced.tracer == ("torch.export" if checked else "symbolic_trace")
    scores = model.two(F.relu(model.one(x)))
    torch.testing.assert_close(network.respond(x), scores.amax(1), rtol=1e-14, atol=0)
    run = network.gradients(x)
    assert not any(leaf.requires_grad for leaf in fxpath.outputs.tensors(run.output))
    assert bool(run.gradients[0].any())


def test_a_dataclass_that_torch_export_knows() -> None:
    @dataclass
    class Known:
        logits: Tensor
        hidden: Tensor

    torch.export.register_dataclass(Known)
    model, x = double(lambda: Wrapped(Known, checked=True)), noise(3, 4)
    network = fxpath.trace(model, x)
    assert network.traced.tracer == "torch.export"
    assert type(network(x)) is Known
    torch.testing.assert_close(network.respond(x), model(x).logits.amax(1), rtol=1e-14, atol=0)


def test_a_graph_that_differs_within_a_dataclass_is_seen() -> None:
    from fxpath.equality import difference

    one, two = Answer(torch.ones(2), (torch.zeros(2),)), Answer(torch.ones(2), (torch.ones(2),))
    assert difference(one, one) == 0
    assert difference(one, two) is None


def test_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=8, hidden_act="relu",
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval().double()
    x = {"input_ids": torch.randint(0, 30, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    network = fxpath.trace(model, x, response=token(-2))
    with torch.no_grad():
        torch.testing.assert_close(network.respond(x), model(**x).logits[:, -2].amax(1))
    assert fxpath.trace(model, x, response=token(-2, output="logits")).respond(x).equal(network.respond(x))
    assert float(NeuronMCT().scores(network, x).signed.abs().max()) > 0


def test_a_torchvision_segmentation_network() -> None:
    torch.manual_seed(0)
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        out = model(x)["out"]
    network = fxpath.trace(model, x, response=pixel(10, 20))
    torch.testing.assert_close(network.original(x).response, out[:, :, 10, 20].amax(1))
    network = fxpath.trace(model, x, response="region:box=0/8/4/32,output=out,of=probability")
    expected = out[:, :, :4, 8:].softmax(1).mean((2, 3))
    torch.testing.assert_close(network.original(x).response, expected.amax(1))
    scores = NeuronMCT().scores(network, x, target=[4, 0])
    assert float(scores.signed.abs().amax(1).min()) > 0


# --- names, text and identity ---------------------------------------------------------------------------------------

TEXTS: dict[str, Response] = {
    "logit": Logit(),
    "logit:output=out": Logit("out"),
    "logit:output=heads/1/a": Logit(("heads", 1, "a")),
    "probability:output=0": Probability(0),
    "margin:against=3": Margin(3),
    "margin:against=3,output=y": Margin(3, "y"),
    "pixel:row=10,column=20": pixel(10, 20),
    "pixel:row=10,column=20,output=out": pixel(row=10, column=20, output="out"),
    "pixel:row=10,column=20,of=margin": pixel(10, 20, of="margin"),
    "pixel:row=10,column=20,of=margin,against=3,output=out": pixel(10, 20, of=Margin(3, "out")),
    "pixel:at=4/10/20": pixel(4, 10, 20),
    "pixel:at=7": pixel(7),
    "region": region(),
    "region:output=out": region(output="out"),
    "region:box=0/0/8/8": region(0, 0, 8, 8),
    "region:box=0/0/8/8,of=probability": region(0, 0, 8, 8, of="probability"),
    "token:position=-1": token(-1),
    "token:position=4,of=probability,output=logits": token(4, of=Probability("logits")),
    "detection:box=7,output=cls_logits": detection(7, output="cls_logits"),
    "neuron:site=features.3.squeeze_activation,at=5/2/2": neuron("features.3.squeeze_activation", (5, 2, 2)),
    "neuron:site=1,at=5": neuron("1", (5,)),
    "neuron:site=a.relu,channel=5": neuron("a.relu", channel=5),
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_forms(text: str) -> None:
    assert parse_response(text) == TEXTS[text]
    assert TEXTS[text].name == text
    assert hash(TEXTS[text]) == hash(parse_response(text))


def test_masks_are_told_apart() -> None:
    one, again, other = region(mask=MASK), region(mask=MASK.numpy().copy()), region(mask=~MASK)
    wide = region(mask=MASK.view(1, 25))
    assert one == again
    assert hash(one) == hash(again)
    assert one.name.startswith("region:mask=")
    for different in (other, wide, region(), region(mask=MASK, of="probability")):
        assert one != different
        assert identity(one) != identity(different)
        assert one.name != different.name
    given = MASK.clone()
    kept = Region(mask=given)
    given.fill_(True)
    assert kept == Region(mask=MASK)


def test_jobs_of_other_responses_are_told_apart(tmp_path: Path) -> None:
    def job(response: Any) -> Job:
        network = fxpath.trace(module(), inputs()[:2], response=response, check=False)  # not all fit
        return Job(network, Chosen(range(4)), tmp_path / "run.h5", FEW, [0.9], "predicted", 2, 1, None, False, 0, 0, "",
                   "", ())  # fmt: skip

    given = [*TEXTS.values(), region(mask=MASK), region(mask=~MASK), region(mask=~MASK, of="margin")]
    jobs = [job(response) for response in given if not isinstance(response, Neuron)]
    jobs += [job(neuron("relu_2", (0, 1, 1))), job(neuron("relu_2", (0, 1, 2))), job(neuron("relu_2", channel=0))]
    assert len({each.digest for each in jobs}) == len(jobs)
    assert len({each.header.response for each in jobs}) == len(jobs)
    assert all(len(each.header.response) < 60 for each in jobs)
    assert job("pixel:row=10,column=20").digest == job(pixel(10, 20)).digest
    assert job(neuron("relu_2", channel=0)).digest == jobs[-1].digest


def test_a_store_of_a_hidden_neuron(tmp_path: Path) -> None:
    network = fxpath.trace(module(), inputs()[:2], response="neuron:site=relu_2,channel=5")
    options: dict[str, Any] = {"selectors": ["neuron_mct", "greedy_pruning"], "sparsities": [0.8], "progress": False}
    fxpath.compute(network, Chosen(range(4)), tmp_path / "run.h5", diagnose=2, **options)
    with fxpath.open_store(tmp_path / "run.h5") as store:
        assert store.header.response == "neuron:site=relu_2,channel=5"
        assert [site.name for site in store.index.sites] == [site.name for site in network.sites]
        assert store.ok.all()
        expected = network.original(inputs()[:4]).response.numpy()
        np.testing.assert_allclose(store.samples()["response"], expected, rtol=1e-5, atol=1e-6)
        assert set(store.samples()["target"]) == {-1}
        assert json.loads(str(store.header.notes["record"]))["response_is"] == identity(network.response)
    other = fxpath.trace(module(), inputs()[:2], response="neuron:site=relu_2,channel=6")
    with pytest.raises(FxpathError, match=r"results of another job.*response: there .*channel=5.*, here .*channel=6"):
        fxpath.compute(other, Chosen(range(4)), tmp_path / "run.h5", diagnose=2, **options)


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pixle:row=1", r"^there is no response 'pixle'; nearest: pixel \(all: logit, .*neuron\)"),
        ("pixel:rwo=1,column=2", r"^response 'pixel:rwo=1,column=2': there is no parameter 'rwo'; nearest: row"),
        ("pixel:row=a,column=2", r"expected row to be int, found 'a'"),
        ("pixel:row=1.5,column=2", r"expected row to be int, found '1.5'"),
        ("pixel:row=1", r"expected row=… and column=…, or at=…"),
        ("pixel", r"expected row=… and column=…"),
        ("pixel:row=1,column=2,at=1/2", r"expected row=… and column=…, or at=…"),
        ("pixel:at=1/x", r"expected whole numbers joined by '/', such as 5/2/2, found '1/x'"),
        ("pixel:row=1,column=2,of=logits", r"no response with classes 'logits'; nearest: logit"),
        ("pixel:row=1,column=2,against=3", r"against=… is for a margin; add of=margin"),
        ("pixel:row=1,row=2,column=3", r"row is given twice"),
        ("logit:out", r"expected param=value, found 'out'"),
        ("region:box=1/2/3", r"expected a box \(top, left, bottom, right\)"),
        ("token", r"expected position=…, found none"),
        ("detection:output=a", r"expected box=…, found none"),
        ("neuron:at=1/2", r"expected site=NAME and at=5/2/2 or channel=5, found no site"),
        ("neuron:site=a,at=1,channel=1", r"neuron: expected coordinates or a channel, found both"),
    ],
)
def test_text_that_is_no_response(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        responses.checked_response(text)
    assert "\n" not in str(raised.value)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no pixel": (Pixel, r"pixel: expected coordinates, such as Pixel\(row, column\), found none"),
    "half a pixel": (lambda: Pixel(1.5, 2), r"pixel: expected a coordinate to be a whole number, found 1.5$"),
    "truth": (lambda: Pixel(True, 2), r"pixel: expected a coordinate to be a whole number, found True"),
    "by sample": (lambda: Token(torch.tensor([1, 2])), r"found torch.int64 \(2,\); it is the same for all samples. W"),
    "list": (lambda: token([1, 2]), r"token: .* found \[1, 2\]; it is the same for all .* a module around the model"),
    "empty box": (lambda: Region(2, 2, 2, 4), r"0 ≤ top < bottom and 0 ≤ left < right, found \(2, 2, 2, 4\)"),
    "negative box": (lambda: Region(-2, 2, 2, 4), r"0 ≤ top < bottom and 0 ≤ left < right, found \(-2, 2, 2, 4\)"),
    "mask by place": (lambda: Region(MASK), r"all starts and then all ends, or mask=…, found torch.bool \(5, 5\)"),
    "box and mask": (lambda: Region(0, 0, 1, 1, mask=MASK), r"expected a box or a mask, found both"),
    "no bool mask": (lambda: Region(mask=MASK.int()), r"expected a bool mask .*, found int32 \(5, 5\); compare first"),
    "no point": (lambda: Region(mask=MASK & ~MASK), r"with at least one point, found none in \(5, 5\)"),
    "no place": (lambda: Logit(at=(1, 2)), r"at: expected a place such as Pixel\(row, column\) or Region\(\), found"),
    "a class": (lambda: Logit(at=Region), r"at: expected a place such as"),
    "a function": (lambda: Logit(len), r"output: expected a key, an index, .*response=function"),
    "of": (lambda: pixel(1, 2, of=neuron("a")), r"pixel: expected of='logit', 'probability' or 'margin', found Neur"),
    "of a place": (lambda: pixel(1, 2, of=token(1)), r"pixel: expected of='logit', 'probability' or 'margin', found"),
    "no site": (lambda: neuron(""), r"neuron: expected the name of a site, found ''"),
    "text": (lambda: neuron("a", "12"), r"neuron: expected coordinates such as \(5, 2, 2\), found '12'"),
    "a number": (lambda: neuron("a", 3), r"neuron: expected coordinates such as \(5, 2, 2\), found 3; or channel=…"),
    "half a channel": (lambda: neuron("a", channel=0.5), r"neuron: expected the channel to be a whole number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_responses_that_cannot_be(name: str) -> None:
    make, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        make()


@dataclass(frozen=True)
class Flat:
    """A user's own place, which forgets the axis of points."""

    parameters: Any
    kind = "flat"

    def __call__(self, scores: Tensor) -> Tensor:
        return scores[:, :, 0, 0]


UNFIT: dict[str, tuple[str, Any, Any, str]] = {
    "no part": ("boxes", Logit(), None, r"found dict of cls_logits \(3, 58, 3\) float64, bbox_regression \(3, 58, 4\)"),
    "how to pick": ("boxes", Logit(), None, r"response=fxpath.responses.Logit\(output='cls_logits'\)"),
    "a way that ends": ("pair", Logit((1, 4)), None, r"no part '1/4' in the network's output, tuple of 0 \(3, 4\)"),
    "a sample": ("tokens", Logit(0), None, r"no part '0' in the network's output, \(3, 3, 7\) float64"),
    "a container": ("pair", Logit(1), None, r"expected a floating-point tensor .*, found tuple of 0 \(3, 3\) float64"),
    "a map": ("segmentation", Logit(), None, r"found a tensor \(3, 4, 5, 5\); say where in it, at=Pixel"),
    "outside": ("segmentation", pixel(5, 0), None, r"pixel: expected a place within the map \(5, 5\), found \(5, 0\)"),
    "negative": ("segmentation", pixel(-1, 0), None, r"pixel: expected a place within the map \(5, 5\), found \(-1, 0"),
    "a box too far": ("segmentation", region(0, 0, 6, 5), None, r"region: expected a box within the map \(5, 5\)"),
    "another mask": ("segmentation", region(mask=MASK[1:]), None, r"a mask of the map's size \(5, 5\), found \(4, 5\)"),
    "rank": ("segmentation", pixel(1), None, r"pixel: expected \(B, classes, L\), found \(3, 4, 5, 5\); Pixel with 2"),
    "rank of a box": (
        "volume",
        region(0, 0, 1, 1),
        None,
        r"\(B, classes, H, W\), found \(3, 4, 3, 4, 5\); Pixel with 3",
    ),
    "no list": (
        "segmentation",
        token(1),
        None,
        r"token: expected \(B, positions, classes\), found \(3, 4, 5, 5\); Pix",
    ),
    "no map": ("pair", pixel(1, 1, output=0), None, r"pixel: .*found \(3, 4\); it has one place only: take logit, p"),
    "no region": ("pair", region(output=0), None, r"region: expected a map \(B, classes, …\), found \(3, 4\)"),
    "token too far": ("tokens", token(3), None, r"token: expected a position in -3 … 2, found 3"),
    "before the first": ("tokens", token(-4), None, r"token: expected a position in -3 … 2, found -4"),
    "box too far": ("tokens", detection(-1), None, r"detection: expected a box in 0 … 2, found -1"),
    "class": ("segmentation", pixel(1, 1), 4, r"target: expected a class in 0 … 3, found 4 \(row 0 of the batch\)"),
    "rival": ("segmentation", pixel(1, 1, of=Margin(4)), None, r"margin: expected a class in 0 … 3, found 4"),
    "no number": (
        "segmentation",
        OutputFunction(lambda y: y["out"]),
        None,
        r"one real number per sample, \(3,\), found",
    ),
    "own place": (
        "segmentation",
        Logit(at=Flat({})),
        None,
        r"flat: expected it to give \(B, classes, n\), found \(3, 4\)",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_responses_that_do_not_fit(name: str) -> None:
    model, response, target, message = UNFIT[name]
    build, x = MODELS[model]
    if isinstance(response, ClassResponse) and response != Logit() and target is None:  # at once
        with pytest.raises(InputError, match=message):
            fxpath.trace(double(build), x, response=response)
    network = fxpath.trace(double(build), x, response=response, check=False)
    for call in (network.respond, network.original, network.gradients):
        with pytest.raises(InputError, match=message) as raised:
            call(x, target)
        assert "\n" not in str(raised.value)


def test_paths() -> None:
    assert read_path("a/0/b") == ("a", 0, "b")
    assert read_path("-1") == -1
    assert Logit(["a", 0]) == Logit(("a", 0))


def test_integers_are_no_class_scores() -> None:
    model, x = double(lambda: Wrapped(lambda y, h: {"best": y.argmax(1), "y": y})), noise(3, 4)
    with pytest.raises(InputError, match=r"expected a floating-point tensor with class scores, found \(3,\) int64"):
        fxpath.trace(model, x, response=Logit("best"))
    assert fxpath.trace(model, x).respond(x).shape == (3,)


def test_many_parts_are_not_all_listed() -> None:
    model, x = double(lambda: Wrapped(lambda y, h: {f"part{n}": y for n in range(30)})), noise(3, 4)
    with pytest.raises(InputError, match=r"part11 \(3, 3\) float64, … 30 in all; pick") as raised:
        fxpath.trace(model, x).respond(x)
    assert "part12" not in str(raised.value)


def test_functions_are_told_apart_by_what_they_hold() -> None:
    """A job does not go on with the results of another response."""

    def scaled(output: Tensor, by: float = 1.0, *, row: int = 0) -> Tensor:
        return output[:, row] * by

    def held(weights: Any) -> Any:
        return lambda output: (output * weights).sum(1)

    class Own:
        def __init__(self, by: float) -> None:
            self.by = by

        def __call__(self, output: Tensor) -> Tensor:
            return output[:, 0] * self.by

    def keyword(row: int) -> Any:
        def read(output: Tensor, *, row: int = row) -> Tensor:
            return output[:, row]

        return read

    made: dict[str, Callable[[int], Any]] = {
        "partial": lambda n: functools.partial(scaled, by=float(n)),
        "tensor": lambda n: held(torch.full((4,), float(n))),
        "array": lambda n: held(np.full(4, n)),
        "function": lambda n: held(lambda y: y * 2) if n == 1 else held(lambda y: y * 3),
        "keyword": keyword,
        "object": lambda n: Own(float(n)),
        "method": lambda n: Own(float(n)).__call__,
    }
    found = {name: [identity(OutputFunction(make(n))) for n in (1, 1, 2)] for name, make in made.items()}
    for name, (one, again, other) in found.items():
        assert one == again, name
        assert one != other, name
        assert " at 0x" not in one


def test_a_hidden_neuron_of_a_network_with_fixed_branches() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.h, self.o = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.h(F.relu(self.a(x) if x.sum() > 0 else self.b(x)))
            return self.o(h if h.sum() > 1e9 else 2 * h)

    model, x = double(Forked), torch.ones(2, 3, dtype=torch.float64)
    with pytest.warns(TraceWarning, match="a branch is fixed"):
        network = fxpath.trace(model, x, response=neuron("h", (0,)), fix_branches=True)
    assert network.respond(x).shape == (2,)
    with pytest.raises(BranchError, match=r"x\.sum\(\) > 0"):
        network(-x)
    with pytest.warns(TraceWarning, match="a branch is fixed"):
        whole = fxpath.trace(model, x, fix_branches=True)
    assert whole.suffix("relu").cache(x)[0].shape == (2, 4)
    with pytest.raises(BranchError, match=r"x\.sum\(\) > 0"):
        whole.suffix("relu").cache(-x)


def test_a_margin_is_against_a_whole_class() -> None:
    with pytest.raises(InputError, match=r"margin: expected the class against to be a whole number, found 1\.5"):
        Margin(against=1.5)  # type: ignore[arg-type]
    assert Margin(against=np.int64(2)) == Margin(against=2)
