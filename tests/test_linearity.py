"""Propositions 4 and 5 in float64: inside of ε̂ the frozen network is linear, just beyond it its pattern changes."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from footprint import unchanged
from networks import CASES, Case, Head, SqueezeExcitation, trace_any, traced
from torch import Tensor, nn

import fxpath
from fxpath import linearity, piecewise, probing
from fxpath.deviations import gradient_stability, verify_linearity
from fxpath.errors import InputError, LinearityError, RestrictionError
from fxpath.linearity import linear_radius, random_directions, ray_radius, tied_windows, uncovered
from fxpath.probing import Terms
from fxpath.samples import Samples
from fxpath.windows import maximum

PATHWAYS = 200
pytestmark = pytest.mark.filterwarnings("ignore::fxpath.errors.EmptyPathwaysWarning")  # random ones may be


class Rectified(Head):
    """ReLU, overlapping max-pooling, a residual, average pooling."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(2, 3, 3, padding=1),
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 1),
        )
        self.pool, self.average, self.relu = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.conv2(self.pool(self.relu(self.conv1(x)))))
        return self.head(self.average(self.relu(self.conv3(h) + h)))


class Bounded(Rectified):
    """ReLU6 that saturates, in front of an overlapping max-pool without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.relu, self.average = nn.MaxPool2d(3, 1), nn.ReLU6(), nn.AvgPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.conv2(4 * self.pool(self.relu(9 * self.conv1(x)))))
        return self.head(self.average(self.relu(3 * self.conv3(h) + h)))


class PoolFirst(Head):
    """The pool reads convolutions; batch normalisation; a dilated pool with a ceiling; a maximum over space."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 2)
        self.bn, self.pool, self.relu = nn.BatchNorm2d(3), nn.MaxPool2d(2, 2, ceil_mode=True), nn.ReLU(inplace=True)
        self.last = nn.AdaptiveMaxPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.pool(self.bn(self.conv1(x))))
        return self.head(self.last(self.relu(self.conv2(h))))


class Leaking(Rectified):
    """Leaky activations as sites, and a clamp that is no site."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-0.8, 1.5))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "rectified": Rectified, "bounded": Bounded, "pool first": PoolFirst, "leaking": Leaking,
}  # fmt: skip


@cache
def network_of(name: str) -> tuple[nn.Module, fxpath.Network]:
    case = Case(name, NETWORKS[name], lambda b: torch.randn(b, 2, 5, 5, dtype=torch.float64), {})
    model = case.model()
    return model, trace_any(model, case.x())


def inputs(count: int, repeated: int, size: int = 5) -> Tensor:
    torch.manual_seed(3)
    return 1.5 * torch.randn(count, 2, size, size, dtype=torch.float64).repeat_interleave(repeated, 0)


def active_pathways(network: fxpath.Network, x: Tensor) -> fxpath.Pathways:
    """Random pathways of active neurons, of all densities."""
    torch.manual_seed(4)
    share = torch.rand(len(x), 1)
    mask = torch.rand(len(x), network.index.size) < share
    return fxpath.Pathways(mask & network.original(x).active, network.index)


def pattern(model: nn.Module, network: fxpath.Network, pathways: fxpath.Pathways, at: Tensor, x: Tensor) -> Tensor:
    """The states of kept neurons and the winners of every pool in Φ̂(x), one row a sample; seen by torch's own hooks."""
    found: list[Tensor] = []

    def note(pool: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if isinstance(pool, nn.AdaptiveMaxPool2d):
            winners = F.adaptive_max_pool2d(args[0], pool.output_size, return_indices=True)[1]
        else:
            winners = F.max_pool2d(
                args[0], pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, return_indices=True
            )[1]
        found.append(winners.flatten(1))

    pools = [each for each in model.modules() if isinstance(each, nn.MaxPool2d | nn.AdaptiveMaxPool2d)]
    hooks = [pool.register_forward_hook(note) for pool in pools]
    try:
        with network.frozen(pathways, at=at):
            found.clear()
            rows = network.rows(network.activations(x))
    finally:
        for hook in hooks:
            hook.remove()
    states = torch.where(rows <= 0, 0, torch.where(rows < 6, 1, 2 if isinstance(model, Bounded) else 1))
    if isinstance(model, Leaking):
        found.append(((x > -0.8).long() + (x > 1.5)).flatten(1))
    return torch.cat([states * pathways.mask, *found], dim=1)


def check_radius(name: str, count: int = PATHWAYS) -> None:
    """Everything that Propositions 4 and 5 say, with METHODS' terms, of `count` random pathways of active neurons."""
    model, network = network_of(name)
    x = inputs(count // 5, 5)
    pathways = active_pathways(network, x)
    found = linear_radius(network, x, pathways)
    assert found.exact
    assert bool((found.value > 0).all())
    assert not bool(found.tied.any())
    finite = found.value.isfinite()
    assert finite.sum() > 0.9 * count
    step = torch.where(finite, found.value, 1.0).view(-1, 1, 1, 1)

    original = network.original(x)
    slope = fxpath.pathway_gradient(network, x, pathways, original.target)
    at = Samples(x, original.target)
    rays = [ray.inputs for ray in random_directions(Samples(x), 3)]
    for direction in (found.towards, -found.towards, *rays):
        for share in (0.5, 0.999):
            moved = x + share * step * direction
            with network.frozen(pathways, at=at):
                value = network.respond(moved, original.target).detach()
            along = (slope * (moved - x)).flatten(1).sum(1)
            deviation = (value - original.response - along).abs()
            allowed = 1e-9 * (1 + original.response.abs() + along.abs())
            assert bool((deviation <= allowed).all()), float((deviation / allowed).max())

    before = pattern(model, network, pathways, x, x)
    inside = pattern(model, network, pathways, x, x + 0.99 * step * found.towards)
    assert torch.equal(inside, before)
    beyond = pattern(model, network, pathways, x, x + 1.01 * step * found.towards)
    assert bool((beyond != before).any(dim=1)[finite].all())

    radii = ray_radius(network, x, pathways, 3)
    assert bool((radii >= found.value * (1 - 1e-9)).all())
    for ray, radius in zip(rays, radii, strict=True):  # the exact place where the pattern changes on this ray
        reach = torch.where(radius.isfinite(), radius, 1.0).view(-1, 1, 1, 1)
        assert torch.equal(pattern(model, network, pathways, x, x + (1 - 1e-7) * reach * ray), before)
        changed = (pattern(model, network, pathways, x, x + (1 + 1e-7) * reach * ray) != before).any(dim=1)
        assert bool(changed[radius.isfinite()].all())
    nearest = ray_radius(network, x[finite], pathways.take(torch.nonzero(finite)[:, 0].tolist()), found.towards[finite])
    torch.testing.assert_close(nearest, found.value[finite], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_radius(name: str) -> None:
    check_radius(name)


def _without_upper_kink(node: object) -> tuple[float, ...]:
    return _KINKS(node)[:1]  # type: ignore[arg-type]


_KINKS, _TERMS = piecewise._kinks, probing.Probe.terms


def _runner_up_only(probe: probing.Probe, place: int, values: Tensor, kept: Tensor | None) -> list[Terms]:
    """Of each window only the largest of the others."""
    found = _TERMS(probe, place, values, kept)
    if found[0].side is None:
        (terms,) = found
        windows = terms.distance.view(len(values), -1, probe.width(place))
        second = windows.argmin(dim=2, keepdim=True)
        only = torch.full_like(windows, math.inf).scatter(2, second, windows.gather(2, second))
        return [dataclasses.replace(terms, distance=only.flatten(1))]
    return found


def _without_constants(self: Terms, slopes: Tensor) -> Tensor:
    """Candidates of which either is a constant are no terms."""
    found = _CLOSING(self, slopes)
    if self.side is None:
        one, two = self._at(slopes, self.first), self._at(slopes, self.second)
        found = found.masked_fill((one == 0) | (two == 0), 0.0)
    return found


_CLOSING, _ROWS = Terms.closing, probing._rows_of


def _rows_without_constants(flat: Tensor, leaves: list[Tensor], first: Tensor, second: Tensor | None) -> Tensor:
    found = _ROWS(flat, leaves, first, second)
    if second is not None:
        one, two = (_ROWS(flat, leaves, each, None) for each in (first, second))
        found = found * (one.norm(dim=1) > 0).unsqueeze(1) * (two.norm(dim=1) > 0).unsqueeze(1)
    return found


def _without_pools(probe: probing.Probe, place: int, values: Tensor, kept: Tensor | None) -> list[Terms]:
    found = _TERMS(probe, place, values, kept)
    return [
        dataclasses.replace(each, distance=torch.full_like(each.distance, math.inf)) if each.side is None else each
        for each in found
    ]


MUTATIONS = {
    "no second hyperplane": ("bounded", [(piecewise, "_kinks", _without_upper_kink)]),
    "the runner-up only": ("bounded", [(probing.Probe, "terms", _runner_up_only)]),
    "no constant candidates": (
        "rectified", [(Terms, "closing", _without_constants), (probing, "_rows_of", _rows_without_constants)],
    ),
    "no pools": ("pool first", [(probing.Probe, "terms", _without_pools)]),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_term_is_needed(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving out one kind of term breaks what `check_radius` asserts."""
    name, changes = MUTATIONS[mutation]
    _, network = network_of(name)
    monkeypatch.setattr(network, "_probes", {})
    for owner, attribute, changed in changes:
        monkeypatch.setattr(owner, attribute, changed)
    with pytest.raises(AssertionError):
        check_radius(name)


# --- the windows of pools ---

x1, x2, x3 = torch.randn(2, 3, 9), torch.randn(2, 3, 7, 8), torch.randn(2, 2, 5, 6, 4)
POOLS: list[tuple[nn.Module | Callable[[Tensor], Tensor], Tensor]] = [
    (nn.MaxPool1d(3), x1), (nn.MaxPool1d(4, 2, padding=1, dilation=2, ceil_mode=True), x1),
    (nn.MaxPool2d(2), x2), (nn.MaxPool2d(3, 2, 1), x2), (nn.MaxPool2d((3, 2), (2, 1), (1, 0), (1, 2)), x2),
    (nn.MaxPool2d(3, 2, ceil_mode=True), x2), (nn.MaxPool2d(3, 3, 1, ceil_mode=True), x2), (nn.MaxPool2d(2, 5), x2),
    (nn.MaxPool3d(2, 1), x3), (nn.MaxPool3d((2, 3, 1), ceil_mode=True), x3),
    (nn.AdaptiveMaxPool1d(4), x1), (nn.AdaptiveMaxPool2d((3, None)), x2), (nn.AdaptiveMaxPool2d(5), x2),
    (nn.AdaptiveMaxPool3d(2), x3),
    (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), x2), (lambda x: F.max_pool2d(x, kernel_size=2), x2),
    (lambda x: torch.max_pool2d(x, 3, stride=1), x2), (lambda x: F.max_pool1d(x, 3, stride=2, padding=1), x1),
    (lambda x: F.adaptive_max_pool2d(x, 3), x2), (lambda x: x.amax((2, 3)), x2), (lambda x: x.amax(-1), x2),
    (lambda x: torch.amax(x, dim=(1, 3), keepdim=True), x2), (lambda x: x.max(dim=2)[0], x2),
    (lambda x: torch.max(x, 3).values, x2), (lambda x: torch.maximum(x, 2 * x.flip(2) - 1), x2),
    (lambda x: torch.max(x, x[:, :1] + 0.5), x2), (lambda x: torch.fmax(x, -x), x1),
]  # fmt: skip


class Pooled(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool, self.weight = pool, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.pool(x * self.weight)).flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("number", range(len(POOLS)))
@pytest.mark.parametrize("way", ["symbolic_trace", "torch.export"])
def test_windows_hold_what_a_pool_reads(number: int, way: str) -> None:
    """The largest of every window's candidates is the pool's output, in order, and no candidate lies outside."""
    pool, x = POOLS[number]
    model = Pooled(pool).eval()
    network = fxpath.trace(model, x, check=False)
    if way == "torch.export":
        from fxpath.tracing import _export

        network = fxpath.Network(_export(model, Samples(x), functionalise=number % 2 == 0), Samples(x))
    assert uncovered(network) == ()
    found = [each for node in network._module.graph.nodes if (each := maximum(node)) is not None]
    (part,) = found
    values: dict[str, Tensor] = {}

    class Seen(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            values[n.name] = super().run_node(n)
            return values[n.name]

    Seen(network._module).run(x, None)
    read = [values[source.name] for source in part.sources]
    windows = part.candidates([tuple(value.shape) for value in read])
    flat = torch.cat([value.flatten(1) for value in read], dim=1)
    largest = flat[:, windows.clamp(min=0)].masked_fill(windows < 0, -math.inf).amax(2)
    output = values[part.node.name]
    output = output[0] if isinstance(output, tuple) else output
    assert torch.equal(largest, output.flatten(1))
    for row in windows.tolist():  # each candidate once
        inside = [each for each in row if each >= 0]
        assert len(inside) == len(set(inside)) > 0


# --- coverage ---


class Composed(nn.Module):
    def __init__(self, first: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.conv, self.fc = first, nn.Conv2d(2, 2, 1), nn.Linear(2, 3)
        nn.init.ones_(self.conv.bias)  # so that most of its neurons are alive

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(self.first(x))).mean((2, 3)))


def formula(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


COVERED: dict[str, Callable[[Tensor], Tensor]] = {
    "formula": formula, "bounded formula": lambda x: torch.where(x < 0, 0.0, torch.where(x > 0.7, 0.7, x)),
    "abs": torch.abs, "hardtanh": nn.Hardtanh(-0.5, 0.5), "hardsigmoid": F.hardsigmoid, "softshrink": F.softshrink,
    "prelu": nn.PReLU(2), "threshold": lambda x: F.threshold(x, 0.0, 0.0), "clamp_max": lambda x: x.clamp(max=0.3),
    "pad": nn.ReflectionPad2d(1), "upsample": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "halves": lambda x: (x + x.flip(2)) / 2 - 1, "written": lambda x: (x + x.abs()) / 2, "norm": nn.BatchNorm2d(2),
    "cast": lambda x: x.double(), "relu6": lambda x: F.relu6(5 * x), "largest": lambda x: torch.maximum(x, 0.1 * x),
}  # fmt: skip


@pytest.mark.parametrize("name", COVERED)
def test_covered_operations(name: str) -> None:
    """Every way to bend that is covered bends where it is said to: deviations vanish inside of every ray's radius."""
    model = Composed(COVERED[name]).double().eval()
    x = torch.randn(60, 2, 3, 3, dtype=torch.float64)
    network = trace_any(model, x)
    assert uncovered(network) == ()
    pathways = active_pathways(network, x)
    table = verify_linearity(network, x, pathways, directions=3, inside=(0.5, 0.999), outside=(1.01, 3))
    assert table[table["inside"]]["relative"].max() < (1e-8 if name == "hardsigmoid" else 1e-12)  # its 1/6 is a float32
    assert table[~table["inside"]]["gradient_change"].max() > 1e-3 or name in (
        "pad",
        "upsample",
        "halves",
        "norm",
        "cast",
    )


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "halves": lambda x: (x + x.abs()) / 2, "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "step": lambda x: x * (x > 0),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_a_formula_bends_as_the_rectifier_that_it_is(name: str) -> None:
    """Not where its parts do: off the path nothing of it is left that bends."""
    torch.manual_seed(5)
    x = torch.randn(20, 2, 3, 3, dtype=torch.float64)
    plain = fxpath.trace(Composed(nn.ReLU()).double().eval(), x)
    written = fxpath.trace(Composed(WRITTEN[name]).double().eval(), x)
    state = {key.removeprefix("first."): value for key, value in plain.tensors.items()}
    for key, tensor in written.tensors.items():
        tensor.data.copy_(state[key])
    pathways = active_pathways(plain, x)
    found = linear_radius(written, x, fxpath.Pathways(pathways.mask, written.index)).value
    torch.testing.assert_close(found, linear_radius(plain, x, pathways).value)


class Shifted(nn.ReLU):
    """A subclass that bends elsewhere."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input - 1)


class Powered(nn.Module):
    """A formula that leaks only while its parameter is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.1 * x**self.power)


UNCOVERED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "softmax": (lambda x: x.softmax(1), "softmax"), "layer norm": (nn.LayerNorm(3), "LayerNorm"),
    "gelu": (F.gelu, "gelu"), "silu formula": (lambda x: x * x.sigmoid(), "silu"),
    "halved gelu": (lambda x: 0.5 * (x * (1 + torch.erf(x / math.sqrt(2)))), "gelu"),
    "square": (lambda x: x * x, "mul"), "power": (lambda x: x**2, "pow"),
    "instance norm": (nn.InstanceNorm2d(2), "InstanceNorm2d"), "detach": (lambda x: x + x.detach(), "detach"),
    "round": (torch.round, "round"), "jump": (nn.Threshold(0.1, 0.5), "Threshold"),
    "jump by name": (lambda x: F.threshold(x, 0.1, 0.5), "threshold"),
    "group norm": (nn.GroupNorm(1, 2), "GroupNorm"), "exponential": (torch.exp, "exp"),
    "whole numbers": (lambda x: x + x.int(), "int"), "normalised": (F.normalize, "norm"),
    "a parameter's power": (Powered(), "leaky_relu"),
    "bends far away": (lambda x: torch.where(x > 0, x, torch.where(x > -200, 0.1 * x, 5 * x)), "leaky_relu"),
    "slopes of data": (lambda x: F.prelu(x, x.mean((0, 2, 3))), "prelu"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_is_not_covered_is_named(name: str) -> None:
    first, named = UNCOVERED[name]
    model = Composed(first).double().eval()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        network = trace_any(model, x, sites="rectifiers")
    assert named in ", ".join(uncovered(network))
    pathways = active_pathways(network, x)
    for call in (linear_radius, ray_radius, tied_windows, verify_linearity):
        with pytest.raises(LinearityError, match=named):
            call(network, x, pathways)
    assert len(gradient_stability(network, x, pathways, lengths=[0.1], directions=2)) == 2


def test_a_subclass_of_a_rectifier_that_is_not_looked_into() -> None:
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    network = fxpath.trace(Composed(Shifted()).double().eval(), x, leaves=Shifted)
    assert uncovered(network) == ("first (Shifted)",)
    looked_into = fxpath.trace(Composed(Shifted()).double().eval(), x)
    assert uncovered(looked_into) == ()


def test_squeeze_excitation_and_attention_are_named() -> None:
    assert uncovered(traced("SqueezeExcitation")) == ("sigmoid (sigmoid)", "mul (mul)")
    assert "attention (MultiheadAttention)" in uncovered(traced("Norms"))
    assert isinstance(SqueezeExcitation(), nn.Module)


def test_responses() -> None:
    from fxpath.responses import Margin, Probability

    model, _ = network_of("rectified")
    x = inputs(2, 1)
    for response, why in ((Probability(), "softmax"), (Margin(), "largest of the other")):
        network = fxpath.trace(model, x, response=response)
        with pytest.raises(LinearityError, match=why):
            linear_radius(network, x, active_pathways(network, x))
    network = fxpath.trace(model, x, response=lambda out: out[:, 0] * out[:, 1])
    pathways = active_pathways(network, x)
    with pytest.raises(LinearityError, match="affine in the network's output"):
        linear_radius(network, x, pathways)
    for fits in (
        Margin(against=1),
        lambda out: out[:, 0] - 2 * out[:, 1],
        fxpath.responses.neuron("relu_2", (1, 2, 2)),
    ):
        network = fxpath.trace(model, x, response=fits)
        pathways = active_pathways(network, x)
        table = verify_linearity(network, x, pathways, 2 if isinstance(fits, Margin) else None, directions=2)
        assert table[table["inside"]]["relative"].max() < 1e-12


def test_nodes_that_the_user_knows_to_be_affine() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: object, slope: Tensor) -> Tensor:
            return 2 * slope

    class Leaf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Doubled.apply(x)

    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    network = fxpath.trace(Composed(Leaf()).double().eval(), x, leaves=Leaf)
    pathways = active_pathways(network, x)
    with pytest.raises(LinearityError, match=r"first \(Leaf\)"):
        linear_radius(network, x, pathways)
    with pytest.raises(LinearityError, match=r"node first cannot be differentiated in forward mode"):
        linear_radius(network, x, pathways, affine=["first"])
    with pytest.raises(LinearityError, match="there is no node 'frist'; nearest: first"):
        ray_radius(network, x, pathways, affine=["frist"])

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x + 1

    network = fxpath.trace(Composed(Twice()).double().eval(), x, leaves=Twice)
    table = verify_linearity(network, x, pathways, affine=["first"])
    assert table[table["inside"]]["relative"].max() < 1e-12


# --- the frozen network at x, bit for bit ---


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_frozen_network_at_x(case: Case) -> None:
    """Φ̂(x) = Φ(x) to the last bit, for any pathway."""
    network = case.trace()
    samples = network.samples(case.x(3))
    target = network.original(samples).target
    mask = torch.rand(3, network.index.size) < 0.4
    plain = network.respond(samples, target)
    with network.frozen(fxpath.Pathways(mask, network.index), at=samples):
        assert torch.equal(network.respond(samples, target), plain)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_inside_are_one(name: str) -> None:
    _, network = network_of(name)
    x = inputs(20, 2)
    pathways = active_pathways(network, x)
    table = verify_linearity(network, x, pathways, directions=4, inside=(0.1, 0.9, 0.999))
    inside = table[table["inside"]]
    assert len(table) == 40 * 4 * 6
    assert table[table["share"] < 1]["inside"].all()
    assert inside["gradient_change"].max() <= 1e-12
    assert inside["relative"].max() <= 1e-9
    outside = table[~table["inside"]]
    assert outside["gradient_change"].max() > 1e-3
    assert outside["relative"].max() > 1e-6
    whole = verify_linearity(network, x, pathways, directions=2, radius=linear_radius(network, x, pathways).value)
    assert whole[whole["inside"]]["relative"].max() <= 1e-9


# --- ties ---


def test_tied_windows_are_counted() -> None:
    """A flat image: every window's candidates have the same value and different gradients."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.fc = nn.Conv2d(1, 2, 1), nn.MaxPool2d(2), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.pool(F.relu(self.conv(x))).flatten(1))

    model = Flat().double().eval()
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
        model.conv.bias.copy_(torch.tensor([0.5, 0.25]))
    x = torch.ones(4, 1, 4, 4, dtype=torch.float64)
    x[1, 0, 0, 0] = 2.0  # one strict winner
    x[2] = torch.arange(16.0).view(4, 4)  # all strict, of the channel that is alive
    network = fxpath.trace(model, x)
    everything = torch.ones(4, network.index.size, dtype=torch.bool)
    everything[3] = False  # constants: no candidate has a gradient
    pathways = fxpath.Pathways(everything & network.original(x).active, network.index)
    assert tied_windows(network, x, pathways).tolist() == [4, 3, 0, 0]
    for exact in (True, False):
        found = linear_radius(network, x, pathways, exact=exact)
        assert found.tied.tolist() == [4, 3, 0, 0]
        assert found.value[:2].tolist() == [0, 0]
        assert found.value[3] == math.inf
        assert 0 < found.value[2] < math.inf
        assert found.nearest[3] is None
        assert found.nearest[0] == "pool"
    # its first pixel's neurons are at 0.5 and 0.25, with gradients of length 1
    assert found.value[2] == pytest.approx(0.25)
    # towards the winner that torch takes nothing changes; away from it the tie breaks at once
    assert (
        ray_radius(network, x[:1], pathways.take([0]), torch.eye(16, dtype=torch.float64)[15].view(1, 1, 4, 4))[0] == 0
    )
    assert ray_radius(network, x[:1], pathways.take([0]), torch.eye(16, dtype=torch.float64)[0].view(1, 1, 4, 4))[0] > 0


def test_a_kept_neuron_at_its_kink() -> None:
    """z = 0 exactly: any step bends the network, or may; off the path nothing does."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    network = fxpath.trace(model, torch.ones(2, 2, dtype=torch.float64))
    x = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    both, second = (fxpath.Pathways(torch.tensor([mask]), network.index) for mask in ([True, True], [False, True]))
    for direction in (1.0, -1.0):
        ray = torch.tensor([[direction, 0.0]], dtype=torch.float64)
        assert ray_radius(network, x, both, ray).tolist() == [0.0]
        assert ray_radius(network, x, second, ray).tolist() == [math.inf]
    assert linear_radius(network, x, both).value.tolist() == [0.0]
    assert linear_radius(network, x, second).value.tolist() == [2.0]


def test_candidates_that_are_one_function_are_no_tie() -> None:
    """h + h + h and 3h are equal and stay so, though their slopes are rounded differently."""

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Linear(4, 64), nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.conv(x))
            return self.fc(torch.maximum(0.1 * h + 0.2 * h, 0.3 * h))

    model = Same().double().eval()
    with torch.no_grad():
        model.conv.weight.mul_(0.1)
        model.conv.bias.fill_(0.0).add_(torch.arange(64.0) / 8 + 1)  # all are alive
    x = torch.zeros(1, 4, dtype=torch.float64)
    network = fxpath.trace(model, x.expand(2, 4))
    pathways = fxpath.Pathways(torch.ones(1, 64, dtype=torch.bool), network.index)
    h = model.conv(x)
    equal = int((0.1 * h + 0.2 * h == 0.3 * h).sum())
    assert equal > 8
    assert tied_windows(network, x, pathways).tolist() == [0]
    assert bool((ray_radius(network, x, pathways, 8) > 0).all())


# --- estimate, batches, seeds ---


def test_the_estimate_is_near_and_never_below() -> None:
    for name in NETWORKS:
        _, network = network_of(name)
        x = inputs(10, 1)
        pathways = active_pathways(network, x)
        exact = linear_radius(network, x, pathways, exact=True).value
        found = linear_radius(network, x, pathways, exact=False, directions=24, candidates=16)
        assert not found.exact
        assert bool((found.value >= exact * (1 - 1e-12)).all())
        assert bool((found.value <= exact * 1.1).all())
        few = linear_radius(network, x, pathways, exact=False, directions=1, candidates=1).value
        assert bool((few >= exact * (1 - 1e-12)).all())
        assert bool((few > exact * 1.001).any()), "one direction and one candidate cannot find all of them"


def test_exact_is_chosen_by_the_number_of_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    _, network = network_of("rectified")
    x = inputs(2, 1)
    pathways = active_pathways(network, x)
    assert linear_radius(network, x, pathways).exact
    monkeypatch.setattr(linearity, "_EXACT", 10)
    assert not linear_radius(network, x, pathways).exact


def test_samples_alone_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    _, network = network_of("bounded")
    x = inputs(5, 1)
    pathways = active_pathways(network, x)
    samples = Samples(x, ids=["a", "b", "c", "d", "e"])
    together = ray_radius(network, samples, pathways, 3)
    whole = linear_radius(network, samples, pathways)
    order = [3, 1]
    torch.testing.assert_close(ray_radius(network, samples.take(order), pathways.take(order), 3), together[:, order])
    torch.testing.assert_close(linear_radius(network, samples.take([4]), pathways.take([4])).value, whole.value[4:])
    assert not torch.equal(ray_radius(network, samples, pathways, 3, seed=1), together)
    monkeypatch.setattr(linearity, "_AT_ONCE", 1)
    torch.testing.assert_close(ray_radius(network, samples, pathways, 3), together)
    given = torch.stack([ray.inputs for ray in random_directions(samples, 3)])
    torch.testing.assert_close(
        torch.stack([ray_radius(network, samples, pathways, 7 * each) for each in given]), together
    )
    one = fxpath.Pathways(pathways.mask[:1], network.index)
    assert ray_radius(network, x, one, 2).shape == (2, 5)


def test_several_inputs_and_channels() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.fc = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(torch.maximum(F.relu(self.left(x)), self.right(y)))

    model = Two().double().eval()
    both = (torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64))
    network = fxpath.trace(model, both)
    pathways = active_pathways(network, both[0]) if False else fxpath.Pathways(
        (torch.rand(20, 6) < 0.7) & network.original(both).active, network.index
    )  # fmt: skip
    found = linear_radius(network, both, pathways)
    assert [each.shape for each in found.towards] == [(20, 3), (20, 4)]
    norm = torch.cat(found.towards, 1).norm(dim=1)
    torch.testing.assert_close(norm, torch.ones_like(norm))
    torch.testing.assert_close(ray_radius(network, both, pathways, found.towards), found.value)
    table = verify_linearity(network, both, pathways)
    assert table[table["inside"]]["relative"].max() < 1e-12

    network = fxpath.trace(network_of("rectified")[0], inputs(2, 1), granularity="channel")
    x = inputs(8, 1)
    pathways = fxpath.Pathways(torch.rand(8, network.index.size) < 0.5, network.index)
    table = verify_linearity(network, x, pathways, directions=3)
    assert table[table["inside"]]["relative"].max() < 1e-12
    assert table[~table["inside"]]["relative"].max() > 1e-9


def test_frames_folded_into_the_batch() -> None:
    """Pools and maxima within a fold: a sample's windows are those of all its frames."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.fc = nn.Conv2d(2, 3, 2), nn.MaxPool2d(3, 1), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            frames = x.flatten(0, 1)
            h = self.pool(F.relu(self.conv(frames)))
            h = torch.maximum(h, 0.5 * h.flip(3) + 0.2).mean((2, 3))
            return self.fc(F.relu(h - 0.1).reshape(x.shape[0], x.shape[1], 3).mean(1))

    x = torch.randn(40, 3, 2, 5, 5, dtype=torch.float64)
    network = fxpath.trace(Frames().double().eval(), x[:3])
    assert [site.fold for site in network.sites] == [3, 3]
    pathways = active_pathways(network, x)
    table = verify_linearity(network, x, pathways, directions=3, inside=(0.5, 0.999), outside=(1.5,))
    assert table[table["inside"]]["relative"].max() < 1e-12
    assert table[~table["inside"]]["relative"].max() > 1e-6
    rows = torch.nonzero(linear_radius(network, x, pathways).value.isfinite())[:, 0].tolist()
    assert len(rows) > 20
    x, pathways = x[rows], pathways.take(rows)
    exact = linear_radius(network, x, pathways)
    assert bool((ray_radius(network, x, pathways, 4) >= exact.value * (1 - 1e-9)).all())
    torch.testing.assert_close(ray_radius(network, x, pathways, exact.towards), exact.value, rtol=1e-9, atol=0)


def test_stability_of_the_original_and_of_the_frozen_network() -> None:
    """Within ε̂ the frozen gradient does not move; the original's does, of the same δ."""
    _, network = network_of("rectified")
    x = inputs(6, 1)
    pathways = fxpath.NeuronMCT().scores(network, x).pathways(0.7)
    radius = linear_radius(network, x, pathways).value
    lengths = [0.9 * radius, 0.5]
    ours = gradient_stability(network, x, pathways, lengths=lengths, directions=5)
    theirs = gradient_stability(network, x, lengths=lengths, directions=5)
    assert ours[ours["number"] == 0]["maximum"].max() <= 1e-12
    assert (theirs[theirs["number"] == 1]["maximum"] > 0).sum() >= 4
    assert (ours["mean"] <= ours["maximum"]).all()
    torch.testing.assert_close(
        torch.tensor(ours[ours["number"] == 0]["length"].tolist(), dtype=torch.float64), lengths[0]
    )
    # by hand: the first sample, one direction
    (ray,) = random_directions(Samples(x), 1)
    target = network.original(x).target

    def slope(at: Tensor) -> Tensor:
        leaf = at.clone().requires_grad_()
        return torch.autograd.grad(network.respond(leaf, target).sum(), leaf)[0]

    one = gradient_stability(network, x, lengths=[0.5], directions=1)
    expected = (slope(x + 0.5 * ray.inputs) - slope(x)).flatten(1).norm(dim=1) / slope(x).flatten(1).norm(dim=1)
    torch.testing.assert_close(torch.tensor(one["mean"].tolist(), dtype=torch.float64), expected)


# --- bad input, and what stays behind ---


def test_bad_input() -> None:
    model, network = network_of("rectified")
    x = inputs(2, 1)
    pathways = active_pathways(network, x)
    other = fxpath.trace(model, x, granularity="channel")
    for call in (linear_radius, ray_radius, tied_windows, verify_linearity):
        with pytest.raises(RestrictionError, match="of another index"):
            call(network, x, fxpath.Pathways(torch.ones(2, other.index.size, dtype=torch.bool), other.index))
        with pytest.raises(RestrictionError, match="2 pathways for 3 samples"):
            call(network, inputs(3, 1), pathways)
        with pytest.raises(RestrictionError, match="expected Pathways, found Tensor"):
            call(network, x, pathways.mask)
        with network.masked(pathways), pytest.raises(RestrictionError, match="restricted already"):
            call(network, x, pathways)
    with pytest.raises(InputError, match=r"directions: expected .* found \[\(2, 3\)\]"):
        ray_radius(network, x, pathways, torch.ones(2, 3))
    with pytest.raises(InputError, match="found 0 for sample 1"):
        ray_radius(network, x, pathways, torch.stack([torch.ones(2, 5, 5), torch.zeros(2, 5, 5)]))
    with pytest.raises(InputError, match="directions: expected a whole number of at least 1, found 0"):
        ray_radius(network, x, pathways, 0)
    with pytest.raises(InputError, match="candidates: expected a whole number"):
        linear_radius(network, x, pathways, candidates=0)
    with pytest.raises(InputError, match=r"inside: expected shares of the radius above 0"):
        verify_linearity(network, x, pathways, inside=(0.0,))
    with pytest.raises(InputError, match=r"expected lengths of at least 0, one or 2"):
        gradient_stability(network, x, pathways, lengths=[torch.ones(3)])
    tokens = nn.Sequential(nn.Embedding(5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    ids = torch.tensor([[1, 2], [3, 4]])
    network = fxpath.trace(tokens, ids)
    with pytest.raises(InputError, match="whole numbers alone"):
        ray_radius(network, ids, fxpath.Pathways(torch.ones(2, network.index.size, dtype=torch.bool), network.index))


def test_nothing_stays_behind() -> None:
    model, network = network_of("bounded")
    x = inputs(2, 1)
    pathways = active_pathways(network, x)
    with unchanged(model):
        linear_radius(network, x, pathways)
        linear_radius(network, x, pathways, exact=False)
        ray_radius(network, x, pathways, 2)
        verify_linearity(network, x, pathways, directions=1)
        gradient_stability(network, x, pathways, lengths=[1.0], directions=1)
    own = fxpath.trace(model, x)
    ray_radius(own, x, pathways, 1)
    gone = weakref.ref(own)
    gc.disable()
    try:
        del own
        assert gone() is None, "the probes of a network must not keep it"
    finally:
        gc.enable()
