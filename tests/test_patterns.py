"""Activations however they are written: torch.nn's, functions, aten forms of export, and formulas."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import trace_any
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import fxpath
from fxpath.activations import RECTIFIERS as RECTIFYING
from fxpath.activations import activations_of, choose_sites
from fxpath.errors import SiteError
from fxpath.patterns import formulas_of
from fxpath.samples import Samples
from fxpath.tracing import _export

RECTIFIERS: dict[str, Callable[[Tensor], Tensor]] = {
    "where": lambda x: torch.where(x > 0, x, 0),
    "where with a tensor": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "where with a scalar tensor": lambda x: torch.where(x >= 0, x, torch.tensor(0.0)),
    "where turned round": lambda x: torch.where(x < 0, torch.zeros_like(x), x),
    "where, number on the left": lambda x: torch.where(0 < x, x, 0.0),  # noqa: SIM300
    "where as a method": lambda x: x.where(x > 0, torch.zeros_like(x)),
    "times mask": lambda x: x * (x > 0),
    "mask times": lambda x: (x > 0) * x,
    "times float mask": lambda x: x * (x > 0).float(),
    "times mask, as functions": lambda x: torch.mul(x, torch.gt(x, 0).to(x.dtype)),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "max": lambda x: torch.max(x, torch.zeros_like(x)),
    "by names": lambda x: torch.where(x > 0, input=x, other=torch.zeros_like(x)),
    "masked_fill by names": lambda x: torch.masked_fill(x, mask=x < 0, value=0.0),
    "maximum by names": lambda x: torch.maximum(input=x, other=torch.zeros_like(x)),
    "times heaviside": lambda x: x * torch.heaviside(x.detach(), x.new_zeros(())),
    "half of x + |x|": lambda x: 0.5 * (x + x.abs()),
    "|x| + x, halved": lambda x: torch.div(torch.abs(x) + x, 2),
    "x + |x|": lambda x: torch.add(x, abs(x)),
    "half of x (sign(x) + 1)": lambda x: x * (torch.sign(x) + 1) / 2,
    "x times half of 1 + sign(x)": lambda x: 0.5 * x * (1 + x.sign()),
    "times chosen 1 or 0": lambda x: x * torch.where(x > 0, 1.0, 0.0),
    "times a whole-number mask": lambda x: x * (x > 0).int(),
    "times 1 - mask": lambda x: x * (1 - (x <= 0).to(x.dtype)),
    "times a copied mask": lambda x: x * torch.clone(input=(x > 0)),
    "times heaviside of copies": lambda x: x * torch.heaviside(torch.clone(input=x).double(), x.new_zeros(())),
    "where, by a detached x": lambda x: torch.where(x.detach() > 0, x, 0.0),
    "twice x where": lambda x: torch.where(x > 0, 2 * x, 0.0),
    "bounded where": lambda x: torch.where(x > 6, 6.0, torch.where(x > 0, x, 0.0)),
    "bounded where, turned round": lambda x: torch.where(x < 0, 0.0, torch.where(x < 1, x, torch.ones_like(x))),
    "bounded where of a clamp": lambda x: torch.where(
        x > 0.5, torch.full_like(input=x, fill_value=0.5), x.clamp(min=0)
    ),
    "clamp_min": lambda x: x.clamp_min(0),
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
    "relu6": F.relu6,
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
}
SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "silu": (lambda x: x * torch.sigmoid(x), "silu"),
    "silu as methods": (lambda x: x.sigmoid().mul(x), "silu"),
    "silu by exp": (lambda x: x / (1 + torch.exp(-x)), "silu"),
    "silu with a factor": (lambda x: x * torch.sigmoid(1.5 * x), "silu"),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu"),
    "silu by an inverse": (lambda x: x * (1 / (1 + torch.exp(-x))), "silu"),
    "sigmoid by exp": (lambda x: 1 / (1 + torch.exp(-x)), "sigmoid"),
    "sigmoid by exp, inverted": (lambda x: (1 + x.neg().exp()).reciprocal(), "sigmoid"),
    "softplus": (lambda x: torch.log1p(torch.exp(x)), "softplus"),
    "softplus by log": (lambda x: torch.log(1 + x.exp()), "softplus"),
    "leaky relu": (lambda x: torch.maximum(x, 0.1 * x), "leaky_relu"),
    "leaky relu, share first": (lambda x: torch.max(x * 0.2, x), "leaky_relu"),
    "gelu by erf": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), "gelu"),
    "gelu by erf, halved last": (lambda x: x * (1 + torch.erf(x / math.sqrt(2))) * 0.5, "gelu"),
    "gelu by tanh": (lambda x: 0.5 * x * (1 + torch.tanh(0.797885 * (x + 0.044715 * torch.pow(x, 3)))), "gelu"),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), "mish"),
    "hardswish": (lambda x: x * F.relu6(x + 3) / 6, "hardswish"),
    "hardswish, gate first": (lambda x: x * (F.relu6(x + 3.0) / 6), "hardswish"),
    "hardswish by clamp": (lambda x: x * torch.clamp(x + 3, min=0, max=6) / 6, "hardswish"),
    "softsign": (lambda x: x / (1 + x.abs()), "softsign"),
    "softsign by names": (lambda x: torch.div(input=x, other=1 + x.abs()), "softsign"),
    "softsign by other names": (lambda x: x.divide(1 + torch.absolute(x)), "softsign"),
    "tanhshrink": (lambda x: x - torch.tanh(x), "tanhshrink"),
    "tanhshrink by names": (lambda x: torch.sub(input=x, other=x.tanh()), "tanhshrink"),
    "tanhshrink turned round": (lambda x: torch.rsub(x.tanh(), x), "tanhshrink"),
    "leaky relu by where": (lambda x: torch.where(x > 0, x, 0.1 * x), "leaky_relu"),
    "leaky relu by a chosen factor": (lambda x: x * torch.where(x > 0, 1.0, 0.1), "leaky_relu"),
    "leaky relu by a quotient": (lambda x: torch.maximum(x, x / 10), "leaky_relu"),
    "elu by where": (lambda x: torch.where(x > 0, x, 0.5 * (torch.exp(x) - 1)), "elu"),
    "softplus by where": (lambda x: torch.where(x > 20, x, torch.log1p(torch.exp(x))), "softplus"),
    "sigmoid by where": (lambda x: torch.where(x < 0, x.exp() / (1 + x.exp()), 1 / (1 + torch.exp(-x))), "sigmoid"),
    "quick gelu by exp": (lambda x: x / (1 + torch.exp(-1.702 * x)), "quick_gelu"),
    "silu twice": (lambda x: x * (2 * torch.sigmoid(x)), "silu"),
    "silu twice, halved": (lambda x: x * (2 * torch.sigmoid(x)) / 2, "silu"),
    "gelu with rounded numbers": (
        lambda x: 0.5 * x * (1 + torch.tanh(0.7979 * x * (1 + 0.0447 * x * x))),
        "gelu",
    ),
    "mish by exp": (lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))), "mish"),
    "hardswish without its sixth": (lambda x: x * F.relu6(x + 3), "hardswish"),
    "gated by tanh": (lambda x: x * torch.tanh(x), "self_gated"),
    "gated by a clamp": (lambda x: x * x.clamp(-1, 1), "self_gated"),
    "gated by a falling sigmoid": (lambda x: x * torch.sigmoid(-x), "self_gated"),
    "gated by another sum": (lambda x: x * (1 / (2 + torch.exp(-x))), "self_gated"),
}


class OfModules(nn.Module):
    """A formula that calls modules: `body` gets them and x."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], act: nn.Module, more: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.act, self.more, self.fc = body, act, more, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


MODULES: dict[str, tuple[nn.Module, str]] = {
    "silu": (OfModules(lambda m, x: x * m.act(x), nn.Sigmoid()), "silu"),
    "hardswish": (OfModules(lambda m, x: x * m.act(x + 3) / 6, nn.ReLU6()), "hardswish"),
    "hardswish in place": (OfModules(lambda m, x: x * (m.act(x + 3) / 6), nn.ReLU6(inplace=True)), "hardswish"),
    "hardswish by hardtanh": (OfModules(lambda m, x: x * m.act(x + 3) / 6, nn.Hardtanh(0, 6)), "hardswish"),
    "hardswish by hardsigmoid": (OfModules(lambda m, x: x * m.act(x), nn.Hardsigmoid()), "hardswish"),
    "mish": (OfModules(lambda m, x: x * m.act(m.more(x)), nn.Tanh(), nn.Softplus()), "mish"),
    "gelu by tanh": (
        OfModules(lambda m, x: 0.5 * x * (1 + m.act(0.797885 * (x + 0.044715 * x**3))), nn.Tanh()),
        "gelu",
    ),
    "tanhshrink": (OfModules(lambda m, x: x - m.act(x), nn.Tanh()), "tanhshrink"),
}


class Written(nn.Module):
    """An activation as a formula, on what a branch has summed; `*more` sends it to torch.export."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.function = function

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        h = self.one(x)
        return self.head(self.function(h + self.two(h)))


class Bound(Written):
    """The same without `*more`, which symbolic_trace can bind."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


WAYS = {"symbolic_trace": Bound, "torch.export": Written}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RECTIFIERS)
def test_rectifiers_as_formulas(name: str, way: str) -> None:
    model = WAYS[way](RECTIFIERS[name]).double().eval()
    network = fxpath.trace(model, torch.randn(3, 5, dtype=torch.float64))  # rectifiers, and so without a warning
    assert network.traced.tracer == way
    assert [(site.shape, site.op in RECTIFYING) for site in network.sites] == [((6,), True)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*SMOOTH, *(f"{name} of modules" for name in MODULES)])
def test_smooth_activations_as_formulas(name: str, way: str) -> None:
    """One site, the formula's value; what it is made of (a sigmoid, a tanh, a relu6) is none."""
    function, op = SMOOTH[name] if name in SMOOTH else MODULES[name.removesuffix(" of modules")]
    model, x = WAYS[way](function).double().eval(), torch.randn(3, 5, dtype=torch.float64)
    network = trace_any(model, x)
    assert network.traced.tracer == way
    assert [(site.op, site.shape) for site in network.sites] == [(op, (6,))]
    with torch.no_grad():
        h = model.one(x)
        torch.testing.assert_close(network.activations(x)[0], function(h + model.two(h)))


@pytest.mark.parametrize("name", MODULES)
def test_modules_within_formulas_chosen_by_name_or_type(name: str) -> None:
    """By choice of the user's, and then what they are."""
    function, _ = MODULES[name]
    model, x = Bound(function).double().eval(), torch.randn(3, 5, dtype=torch.float64)
    kind = type(function.act)
    for sites in (kind, "function.act", [kind, "function.act"]):
        network = trace_any(model, x, sites=sites)
        assert [(site.name, site.op) for site in network.sites] == [("function.act", kind.__name__.lower())]
    (chosen,) = choose_sites(trace_any(model, x)._module, kind)
    assert chosen.rectifier == (kind in (nn.ReLU6, nn.Hardtanh))


def test_gates_of_modules_that_are_no_formulas() -> None:
    """On another tensor, altered by a hook, of a type of the user's."""

    class Own(nn.Sigmoid):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(2 * input)

    hooked = nn.Sigmoid()
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    for function in (
        OfModules(lambda m, x: x * m.act(m.fc(x)), nn.Sigmoid()),
        OfModules(lambda m, x: x * m.act(x.flip(1)), nn.Sigmoid()),
        OfModules(lambda m, x: x * m.act(x), hooked),
        OfModules(lambda m, x: x * m.act(x), Own()),
    ):
        leaves = (Own,) if isinstance(function.act, Own) else ()
        (site,) = trace_any(Bound(function).eval(), torch.randn(3, 5), leaves=leaves).sites
        assert (site.name, site.op) == ("function.act", "sigmoid")


GIVEN_WAY: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {  # formula, rectifier in it
    "relu6": (lambda x: x * F.relu6(x), F.relu6),
    "relu6 of another shift": (lambda x: x * F.relu6(x + 2) / 6, lambda x: F.relu6(x + 2)),
    "clamp": (lambda x: x * x.clamp(min=0), F.relu),
    "clip": (lambda x: x * torch.clip(x, 0, 1), lambda x: x.clip(0, 1)),
    "hardtanh": (lambda x: x * F.hardtanh(x, 0.0, 1.0), lambda x: x.clip(0, 1)),
    "where in a gate": (lambda x: x * torch.sigmoid(torch.where(x > 0, x, 0.0)), F.relu),
    "where in pieces": (lambda x: torch.where(x < -1, x, torch.where(x > 0, x, 0.0)), F.relu),
    "where that ends": (lambda x: torch.where(x > 1000, 0.0, torch.where(x > 0, x, 0.0)), F.relu),
    "mask in a gate": (lambda x: x * torch.tanh(x * (x > 0)), F.relu),
    "maximum in pieces": (lambda x: torch.where(x > 1, x * x, torch.maximum(x, torch.zeros_like(x))), F.relu),
    "sum, then rounded": (lambda x: torch.div(x + x.abs(), 2, rounding_mode="floor"), lambda x: x + x.abs()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GIVEN_WAY)
def test_rectifiers_within_other_formulas(name: str, way: str) -> None:
    """They are sites: what encloses them is no activation that is made of one."""
    function, inner = GIVEN_WAY[name]
    model, x = WAYS[way](function).double().eval(), torch.randn(3, 5, dtype=torch.float64)
    network = fxpath.trace(model, x)
    assert [site.op in RECTIFYING for site in network.sites] == [True]
    with torch.no_grad():
        h = model.one(x)
        torch.testing.assert_close(network.activations(x)[0], inner(h + model.two(h)))


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(0, 2)], ids=str)
def test_modules_that_rectify_within_other_formulas(act: nn.Module) -> None:
    for body in (lambda m, x: x * m.act(x + 0), lambda m, x: x * m.act(x + 1) / 6):
        (site,) = fxpath.trace(Bound(OfModules(body, act)).eval(), torch.randn(3, 5)).sites
        assert (site.name, site.op) == ("function.act", type(act).__name__.lower())


def test_bounded_rectifiers_are_one() -> None:
    """The whole, with its bound, and called by it."""
    for bound, op in ((6.0, "relu6"), (0.5, "clamp")):

        def bounded(x: Tensor, bound: float = bound) -> Tensor:
            return torch.where(x > bound, bound, torch.where(x > 0, x, 0.0))

        model, x = Bound(bounded).double().eval(), 9 * torch.randn(3, 5, dtype=torch.float64)
        network = fxpath.trace(model, x)
        assert [site.op for site in network.sites] == [op]
        with torch.no_grad():
            h = model.one(x)
            torch.testing.assert_close(network.activations(x)[0], (h + model.two(h)).clamp(0, bound))


def gated_by_another(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x.flip(1))


def shared_gate(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return x * gate + gate


def several_multiples(x: Tensor) -> Tensor:
    s = x + x.abs()
    return s / 2 + 0.1 * s


@pytest.mark.parametrize(
    ("function", "ops"),
    [
        (gated_by_another, ["sigmoid"]),  # a gate, no activation of x alone
        (shared_gate, ["sigmoid"]),  # the sigmoid is read on its own as well
        (lambda x: torch.where(x > 1, x, 0), ["piecewise"]),  # in pieces, and not a rectifier
        (lambda x: torch.where(x > 0, x, x * 2), ["piecewise"]),
        (lambda x: torch.where(x > 0, -x, 0), ["piecewise"]),
        (lambda x: torch.where(x > x.mean(), x, 0), []),
        (lambda x: torch.where(x > 0, x, x.flip(1)), []),
        (lambda x: x * (x.flip(1) > 0), []),
        (lambda x: torch.max(x, 0).values.expand(6).expand_as(x) + x, []),  # a maximum along the batch axis
        (lambda x: x * 0.5, []),
        (lambda x: torch.log(x.exp() + 2), []),  # softplus, had it added 1
        (lambda x: torch.log(torch.add(x.exp(), 1, alpha=2)), []),
        (lambda x: x / (1e-6 + x.abs()), []),  # a sign rather than a softsign
        (lambda x: 1 / (1e-6 + torch.exp(-x)), []),
        (lambda x: x - 2 * torch.tanh(x), ["tanh"]),
        (lambda x: torch.sub(x, torch.tanh(x), alpha=2), ["tanh"]),
        (lambda x: torch.tanh(x) - x, ["tanh"]),
        (lambda x: 1 / torch.exp(-(1 + x)), []),  # the operations of a sigmoid, in another order
        (lambda x: 1 / (1 + (-torch.exp(x))), []),
        (lambda x: torch.log(torch.exp(1 + x)), []),
        (lambda x: x / (1 + x).abs(), []),
        (lambda x: x / torch.exp(-(1 + x)), []),
        (lambda x: torch.div(x, 1 + x.abs(), rounding_mode="floor"), []),
        (lambda x: x * torch.heaviside(x.to(torch.int32).float(), x.new_zeros(())), []),  # 0 below 1
        (lambda x: x * torch.heaviside(x.type("torch.IntTensor").float(), x.new_zeros(())), []),
        (lambda x: x * torch.heaviside(x.to(torch.int32).float(), x.flip(1)), []),
        (lambda x: x * torch.sign(x), []),
        (lambda x: x * (x.int() > 0), []),
        (lambda x: torch.maximum(x, -0.1 * x), []),
        (lambda x: (x - x.abs()) / 2, []),  # min(x, 0)
        (lambda x: torch.clone(input=x) / (x * x + 1), []),
        (lambda x: F.relu6(x + 3) / 6, ["relu6"]),
        (lambda x: torch.where(x > 0, x, -0.1 * x), ["piecewise"]),
        (lambda x: x * torch.where(x < 0, 0.0, torch.where(x > 1e5, 0.0, 1.0)), ["piecewise"]),  # it ends far away
        (several_multiples, ["relu"]),  # the sum, which both multiples read
        (lambda x: torch.clamp(x, min=torch.zeros_like(x)), ["clamp"]),
        (lambda x: F.relu(x) * torch.sigmoid(F.relu(x)), ["relu", "relu", "sigmoid"]),  # two executions, two sites
    ],
)
def test_what_is_no_rectifier(function: Callable[[Tensor], Tensor], ops: list[str]) -> None:
    torch.manual_seed(0)
    module = torch.fx.symbolic_trace(Bound(function))
    for node in module.graph.nodes:
        node.meta["fxpath_name"] = node.name
    found = activations_of(module)
    assert [activation.op for activation in found] == ops
    assert all(activation.rectifier == (activation.op in ("relu", "relu6", "clamp")) for activation in found)


class Parametric(nn.Module):
    """Formulas of x and what the module has learned or holds: a number, or one per channel."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], values: Tensor) -> None:
        super().__init__()
        self.fc, self.head, self.function = nn.Linear(5, 6), nn.Linear(6, 3), function
        self.learned = nn.Parameter(values.clone())
        self.register_buffer("held", values.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self, self.fc(x)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("values", [torch.zeros(()), torch.zeros(6), torch.tensor(3.0)], ids=["0", "zeros", "3"])
@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda m, x: x * torch.sigmoid(m.learned * x), "silu"),
        (lambda m, x: torch.where(x > 0, x, m.learned * x), "piecewise"),  # 0 today, and no rectifier for that
        (lambda m, x: torch.where(x > 0, x, m.held * x), "piecewise"),
        (lambda m, x: torch.where(x > m.learned, x, 0.0), "piecewise"),
        (lambda m, x: x * F.relu6(x + m.learned) / 6, "relu6"),  # a Hardswish were it 3 for good
    ],
)
def test_formulas_of_learned_values(
    function: Callable[[Any, Tensor], Tensor], op: str, values: Tensor, device: str
) -> None:
    """What they are does not depend on what has been learned."""
    module = torch.fx.symbolic_trace(Parametric(function, values).to(device))
    for node in module.graph.nodes:
        node.meta["fxpath_name"] = node.name
    assert [(found.op, found.rectifier) for found in activations_of(module)] == [(op, op == "relu6")]


def test_a_held_number_takes_part_by_its_value() -> None:
    def hardswish(m: Any, x: Tensor) -> Tensor:
        return x * F.relu6(x + m.held) / 6

    for device, op in (("cpu", "hardswish"), ("meta", "relu6")):
        module = torch.fx.symbolic_trace(Parametric(hardswish, torch.tensor(3.0)).to(device))
        for node in module.graph.nodes:
            node.meta["fxpath_name"] = node.name
        assert [found.op for found in activations_of(module)] == [op]


def test_formulas_are_read_under_modes_of_the_callers() -> None:
    graph = torch.fx.symbolic_trace(Bound(lambda x: x * (x > 0))).graph
    lower = torch.autocast("cpu", dtype=torch.bfloat16)
    modes = (torch.device("meta"), FakeTensorMode(), lower, torch.inference_mode())
    for mode in modes:
        with mode:
            assert [(found.op, found.rectifier) for found in formulas_of(graph)] == [("relu", True)]


def test_no_hooks_run_while_formulas_are_read() -> None:
    calls: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: calls.append(module))
    try:
        graph = torch.fx.symbolic_trace(Bound(OfModules(lambda m, x: x * m.act(x), nn.Sigmoid()))).graph
        calls.clear()
        (formula,) = formulas_of(graph)
    finally:
        handle.remove()
    assert (formula.op, calls) == ("silu", [])


def test_a_buffer_that_is_zero_today_makes_no_rectifier() -> None:
    class Thresholded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
            self.register_buffer("least", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            return self.head(torch.where(h > self.least, h, 0))

    (found,) = trace_any(Thresholded().eval(), torch.randn(2, 5)).sites
    assert found.op == "piecewise"


def test_whole_numbers_are_no_activations() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

        def forward(self, ids: Tensor) -> Tensor:
            known = torch.where(ids < 0, 0, ids)  # a rectifier, were these numbers
            return self.head(F.relu(self.table(known)).mean(1))

    network = fxpath.trace(Tokens().eval(), torch.tensor([[1, 2, -1], [3, 4, 5]]))
    assert [site.name for site in network.sites] == ["relu"]


class Values(torch.fx.Interpreter):
    """Runs a graph and keeps what each node gives."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[torch.fx.Node, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        with torch.no_grad():
            self.seen[n] = super().run_node(n)
        return self.seen[n]


NN = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(0, 4), nn.Threshold(0, 0),
    nn.LeakyReLU(), nn.LeakyReLU(inplace=True), nn.PReLU(), nn.PReLU(6), nn.RReLU(), nn.ELU(), nn.SELU(), nn.CELU(),
    nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.SiLU(inplace=True), nn.Mish(), nn.Hardswish(),
    nn.Hardswish(inplace=True), nn.Hardsigmoid(), nn.Softplus(), nn.Softsign(), nn.Softshrink(), nn.Hardshrink(),
    nn.Tanhshrink(), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(), nn.GLU(), nn.Hardshrink(0.1), nn.Softshrink(0.1),
    nn.Softplus(2.0), nn.CELU(0.5), nn.ELU(0.5),
]  # fmt: skip


@pytest.mark.parametrize("functionalise", [False, True])
@pytest.mark.parametrize("module", NN, ids=str)
def test_activations_of_torch_nn_in_exported_graphs(module: nn.Module, functionalise: bool) -> None:
    """aten's form of each, in place or not, is one activation of the kind that the module is."""
    model = nn.Sequential(nn.Linear(5, 6), module, nn.Linear(3 if isinstance(module, nn.GLU) else 6, 2)).eval()
    x = torch.randn(3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on its way
        graph = _export(model, Samples(x), functionalise=functionalise)
    found = activations_of(graph.graph_module)
    plain = activations_of(trace_any(model, x, sites="activations")._module)
    assert [a.rectifier for a in found] == [a.rectifier for a in plain]
    (one,) = found
    values = Values(graph.graph_module)
    values.run(x)
    with torch.no_grad():
        torch.testing.assert_close(values.seen[one.node], module(model[0](x)))  # of the whole, not of a part


def test_fused_linear_activations() -> None:
    """`aten._addmm_activation` is a linear layer and its activation in one."""

    class Fused(nn.Module):
        def __init__(self, *, gelu: bool) -> None:
            super().__init__()
            self.fc, self.head, self.gelu = nn.Linear(5, 6), nn.Linear(6, 3), gelu

        def forward(self, x: Tensor) -> Tensor:
            h = torch._addmm_activation(self.fc.bias, x, self.fc.weight.t(), use_gelu=self.gelu)
            return self.head(h)

    x = torch.randn(2, 5)
    for gelu, expected in ((False, ("addmm_activation", True)), (True, ("addmm_activation", False))):
        (found,) = activations_of(trace_any(Fused(gelu=gelu).eval(), x, sites="activations")._module)
        assert (found.op, found.rectifier) == expected


class Swish(nn.Module):
    """A user's own activation, of operations that are no activations one by one."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs()) + x.clamp(-1, 1)


class OwnActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.act = Swish()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.fc2(self.act(self.fc1(x)))))


class OwnActivationExported(OwnActivation):
    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("kind", [OwnActivation, OwnActivationExported])
@pytest.mark.parametrize("sites", [Swish, "act", ["act"]])
def test_own_activations_by_type_and_by_name(kind: type[OwnActivation], sites: Any) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(3, 5)
    network = trace_any(model, x, sites=sites)
    with torch.no_grad():
        first = model.act(model.fc1(x))
        second = model.act(model.fc2(first))
    assert [site.shape for site in network.sites] == [(6,), (6,)]
    for found, expected in zip(network.activations(x), (first, second), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_module_with_several_values_is_no_site() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x - 1

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.two(x)
            return one * other

    with pytest.raises(SiteError, match=r"'two' gives 2 values, expected one; name one of its nodes: two.add, two.sub"):
        trace_any(Both().eval(), torch.randn(2, 3), sites="two")
