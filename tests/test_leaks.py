"""Nothing left behind: after any call, also one that raises, nothing is alive, and the model is what it was.

Garbage collection is off while the calls run: a reference cycle would keep a batch of activations alive until the next
collection, which with large tensors and few objects may never come.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil
import pytest
import torch
from footprint import Watched, require_clean_failures, unchanged
from networks import BY_NAME, DataBranch
from torch import Tensor, nn

import fxpath
from fxpath.errors import FxpathError, InputError, SmoothSitesWarning
from fxpath.gates import Restriction
from fxpath.pathways import Pathways
from fxpath.samples import Samples
from fxpath.selectors import Active, Magnitude, NeuronMCT, Random


class Sighted(nn.Module):
    """Three convolutions with a skip, and activations that remember what they saw."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3),
        )
        self.bn, self.relu, self.fc = nn.BatchNorm2d(4), Watched(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn(self.conv1(x)))
        h = self.relu(self.conv2(h) + h)
        return self.fc(self.relu(self.conv3(h)).mean((2, 3)))


class Guarded(Sighted):
    """The same for torch.export: it looks into the activation, so this one sees only what the module runs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[1] == 2 else x


def traced(model: nn.Module, x: Any, **options: Any) -> fxpath.Network:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmoothSitesWarning)
        return fxpath.trace(model, x, **{"sites": Watched, **options})


@pytest.fixture
def model() -> Sighted:
    torch.manual_seed(0)
    return Sighted().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1))


@contextmanager
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def tensors() -> int:
    """How many tensors Python knows of."""
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def whole_frozen(network: fxpath.Network, x: Tensor, pathways: Pathways) -> Any:
    with network.frozen(pathways, at=x):
        return network(x), network.respond(x), network.gradients(x), network.activations(x)


def whole_masked(network: fxpath.Network, x: Tensor, pathways: Pathways) -> Any:
    with network.masked(pathways):
        return network(x), network.respond(x), network.gradients(x), network.activations(x)


def whole_restricted(network: fxpath.Network, x: Tensor, pathways: Pathways) -> Any:
    scale = [torch.full((1, *site.gate_shape), 0.5, requires_grad=True) for site in network.sites]
    with network.restricted(Restriction(scale, [None] * len(scale))):
        return torch.autograd.grad(network.respond(x).sum(), scale)


def whole_suffix(network: fxpath.Network, x: Tensor, pathways: Pathways) -> Any:
    found = []
    for site in network.sites:
        suffix = network.suffix(site)
        activation, boundary = suffix.cache(x)
        found.append(suffix(activation.requires_grad_(), boundary).sum())
    return found


CALLS: dict[str, Callable[[fxpath.Network, Tensor, Pathways], Any]] = {
    "network(x)": lambda network, x, _: network(x),
    "network(x) with gradients": lambda network, x, _: torch.autograd.grad(
        network(y := x.clone().requires_grad_()).sum(), y
    ),
    "respond": lambda network, x, _: network.respond(x, 1),
    "samples": lambda network, x, _: network.samples(x),
    "activations": lambda network, x, _: network.activations(x),
    "gradients": lambda network, x, _: network.gradients(x),
    "signed_products": lambda network, x, _: network.signed_products(x),
    "rows": lambda network, x, _: network.rows(network.activations(x)),
    "original": lambda network, x, _: network.original(x),
    "outcome": lambda network, x, pathways: network.outcome(x, pathways),
    "masked": whole_masked,
    "frozen": whole_frozen,
    "restricted": whole_restricted,
    "suffix": whole_suffix,
    "fingerprint": lambda network, x, _: network.fingerprint,
    "scores": lambda network, x, _: NeuronMCT().scores(network, x).pathways(0.5),
    "threshold": lambda network, x, _: NeuronMCT().scores(network, x).threshold((0.5, 0.9)),
    "neuron_mct": lambda network, x, _: NeuronMCT().select(network, x, (0.5, 0.9)),
    "magnitude": lambda network, x, _: Magnitude().select(network, x, (0.5, 0.9)),
    "active": lambda network, x, _: Active().select(network, x),
    "random": lambda network, x, _: Random().select(network, Samples(x, ids=list("abc")), (0.5, 0.9)),
    "packed": lambda network, x, pathways: Pathways.from_packed(pathways.packed(), network.index).jaccard(pathways),
}


UNSEEING = ("samples", "random", "fingerprint", "packed")  # these run no network
NO_RESPONSE = ("network(x)", "network(x) with gradients", "activations", "rows", "suffix", "magnitude", *UNSEEING)


@pytest.mark.parametrize("granularity", ["unit", "channel"])
def test_nothing_is_left_behind(granularity: str, model: Sighted, x: Tensor) -> None:
    network, record = traced(model, x, granularity=granularity), model.relu.record
    pathways = Random().select(network, x, (0.5,))[0.5]
    for call in CALLS.values():
        call(network, x, pathways)  # whatever is made once is made now
    expected, before = network(x).detach(), x.clone()
    with uncollected():
        count = tensors()
        for name, call in CALLS.items():
            record.start()
            with unchanged(model, network._module):
                result = call(network, x, pathways)
                del result
            assert (record.calls > 0) == (name not in UNSEEING), name
            assert record.alive() == 0, name
            assert network._restriction is None, name
        assert tensors() == count
    assert torch.equal(network(x), expected)
    assert torch.equal(model(x), expected)
    assert torch.equal(x, before)
    assert x.grad is None


def test_nothing_is_left_behind_when_an_activation_fails(model: Sighted, x: Tensor) -> None:
    """Each activation of a call fails in turn: in its first forward, in its second, within a restriction …"""
    network, record = traced(model, x), model.relu.record
    pathways = Random().select(network, x, (0.5,))[0.5]
    runs = {}
    for name, call in CALLS.items():
        record.start()
        call(network, x, pathways)
        runs[name] = record.calls
    assert (runs["network(x)"], runs["outcome"], runs["random"]) == (3, 9, 0)
    expected = model(x).detach()
    with uncollected():
        count = tensors()
        for name, call in CALLS.items():
            turns = range(1, runs[name] + 1)
            require_clean_failures(network, model, record, turns, partial(call, network, x, pathways))
        assert tensors() == count
    record.start()
    assert torch.equal(network(x), expected)


def test_nothing_is_left_behind_when_the_response_fails(model: Sighted, x: Tensor) -> None:
    failing = [False]

    def response(output: Tensor) -> Tensor:
        if failing[0]:
            raise ArithmeticError("this response fails")
        return output[:, 0]

    network, record = traced(model, x, response=response), model.relu.record
    pathways = Random().select(network, x, (0.5,))[0.5]
    calls = CALLS | {"respond": lambda network, x, _: network.respond(x)}  # there are no classes to choose one of
    failing[0] = True
    with uncollected():
        count = tensors()
        for name, call in calls.items():
            record.start()
            raised = False
            with unchanged(model, network._module):
                try:
                    call(network, x, pathways)
                except InputError as error:
                    assert "this response fails" in str(error)  # noqa: PT017
                    raised = True
            assert raised == (name not in NO_RESPONSE), name
            assert record.alive() == 0, name
            assert network._restriction is None, name
        assert tensors() == count


@pytest.mark.parametrize("kind", [Sighted, Guarded])
def test_tracing_leaves_nothing_behind(kind: type[Sighted], x: Tensor) -> None:
    model = kind().eval()
    sites = Watched if kind is Sighted else "rectifiers"
    network = traced(model, x, sites=sites)
    del network
    gc.collect()
    example = x.clone().requires_grad_()
    expected = model(x).detach()
    with uncollected(), unchanged(model):
        model.relu.record.start()
        network = traced(model, example, sites=sites)
        assert model.relu.record.calls > 0
        assert model.relu.record.alive() == 0  # the network is here; no activation is
        parameters = len(list(network._module.parameters()))
        assert parameters == len(list(model.parameters()))
    assert example.grad is None
    assert torch.equal(model(x), expected)
    assert torch.equal(network(x), expected)


def test_tracing_that_fails_leaves_nothing_behind(x: Tensor) -> None:
    """Every activation of every run that tracing makes fails in turn."""
    model = Sighted().eval()
    record = model.relu.record
    record.start()
    traced(model, x)
    runs = record.calls
    assert runs >= 9  # the module on two batches, the graph on two, and the measuring
    expected = model(x).detach()
    said = []
    with uncollected(), unchanged(model):
        for turn in range(1, runs + 1):
            record.start(fails_at=turn)
            try:
                traced(model, x)
            except FxpathError as error:  # never anything else
                said.append(str(error))
            assert record.alive() == 0
    record.start()
    assert len(said) >= 3  # where one way of tracing fails, another does it; the module itself has to run
    assert all("this activation fails" in text or "'Watched' matches no node" in text for text in said)
    assert torch.equal(model(x), expected)


def test_untraceable_models_leave_nothing_behind() -> None:
    class Sampled(DataBranch):
        def __init__(self) -> None:
            super().__init__()
            self.act = Watched()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.act(x))

    model, x = Sampled().eval(), torch.randn(2, 2, 5, 5)
    for _ in range(2):
        with uncollected(), unchanged(model):
            model.act.record.start()
            try:
                fxpath.trace(model, x)
            except FxpathError as error:
                assert "h.sum() > 0" in str(error)  # noqa: PT017
            assert model.act.record.alive() == 0


def test_the_example_is_let_go(model: Sighted) -> None:
    with uncollected():
        for build in (model, *(BY_NAME[name].model().float() for name in ("ShapeBranch", "ViewSlice"))):
            x = torch.randn(3, 2, 5, 5)
            reference = weakref.ref(x)
            network = traced(build, x, sites="activations" if build is not model else Watched)
            del x
            assert reference() is None
            del network
        x = torch.randn(3, 2, 5, 5)
        reference = weakref.ref(x)
        with contextlib.suppress(FxpathError):
            fxpath.trace(DataBranch().eval(), x)
        del x
        assert reference() is None


class Applying(nn.Module):
    """Applies an autograd function twice."""

    def __init__(self, kind: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.kind = nn.Linear(4, 4), nn.Linear(4, 3), kind

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.kind.apply(self.kind.apply(self.fc1(x)))))


def test_autograd_functions_are_let_go() -> None:
    """A class made in a notebook again and again, with all that its cell holds."""

    def run() -> weakref.ref[Any]:
        class Twice(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return 2 * x

            @staticmethod
            def backward(ctx: Any, *slopes: Tensor) -> Tensor:
                return 2 * slopes[0]

        network = fxpath.trace(Applying(Twice).eval(), torch.randn(2, 4))
        targets = [node.target for node in network._module.graph.nodes]
        one, two = (target for target in targets if getattr(target, "__name__", "") == "Twice")
        assert one is two
        return weakref.ref(Twice)

    kept = run()
    gc.collect()
    assert kept() is None


def resident() -> float:
    return psutil.Process().memory_info().rss / 2**20


def test_resident_memory_is_flat_over_500_batches() -> None:
    """A batch of activations is 160 KiB: if one stayed each time, that would be 80 MiB."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    ).eval()  # fmt: skip
    network = fxpath.trace(model, torch.randn(2, 3, 32, 32))
    assert 2 * network.index.size * 4 == 160 * 2**10
    with uncollected():
        for batch in range(520):
            if batch == 20:
                before = resident()
            x = torch.randn(2, 3, 32, 32)
            selection = NeuronMCT().select(network, x, (0.9,))
            if batch % 5 == 0:
                network.outcome(x, selection[0.9])
                with network.frozen(selection[0.9], at=x):
                    network.respond(x)
        growth = resident() - before
    assert growth < 20, f"{growth:.1f} MiB more after 500 batches"
