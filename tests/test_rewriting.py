"""The rewriting pass: which nodes are sites, how they are named and chosen, one gate a call, edges, sub-graphs."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import BY_NAME, CASES, SMOOTH, Activations, CustomLeaf, SquaredReLU, image, rows, traced
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import get_graph_node_names

import fxpath
from fxpath.activations import activations_of
from fxpath.errors import InputError, SiteError, SmoothSitesWarning
from fxpath.rewriting import GATES, cut, gate, site_edges
from fxpath.samples import Samples
from fxpath.tracing import NAME, trace_module
from fxpath.zoo import load_model


def meta(name: str, size: int) -> fxpath.Network:
    """A torchvision network traced without memory for weights or activations: shapes only."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(
            weights=None, **({"init_weights": False} if name == "googlenet" else {})
        )
        return fxpath.trace(model.eval(), torch.empty(1, 3, size, size), check=False)


@pytest.mark.parametrize(
    ("name", "size", "sites", "neurons"),
    [
        ("squeezenet1_1", 227, 26, 2_763_104),
        ("vgg16", 224, 15, 13_555_712),
        ("resnet18", 224, 17, 2_308_096),
        ("resnet50", 224, 49, 9_608_704),
    ],
)
def test_sites_of_real_networks(name: str, size: int, sites: int, neurons: int) -> None:
    index = meta(name, size).index
    assert (len(index), index.size, index.units) == (sites, neurons, neurons)


def test_sites_of_efficientnet_lite0() -> None:
    loaded = load_model("zoo:efficientnet_lite0")
    network = fxpath.trace(loaded.model, loaded.example())
    assert len(network.sites) == 33
    assert {site.op for site in network.sites} == {"relu6"}
    assert network.traced.difference == 0


@pytest.mark.parametrize(
    "name", ["resnet18", "squeezenet1_1", "densenet121", "googlenet", "shufflenet_v2_x0_5", "mnasnet0_5", "alexnet"]
)
def test_names_are_those_of_torchvision(name: str) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(
            weights=None, **({"init_weights": False} if name == "googlenet" else {})
        )
    network = fxpath.trace(model.eval(), torch.empty(1, 3, 64, 64, device="meta"), check=False)
    theirs = [found for found in get_graph_node_names(model, suppress_diff_warning=True)[1] if found != "x"]
    nodes = [node for node in network._module.graph.nodes if node.op.startswith("call_") and node.target is not gate]
    assert [node.meta[NAME] for node in nodes] == theirs
    assert {site.name for site in network.sites} <= set(theirs)


def test_names_of_a_residual_block() -> None:
    names = [site.name for site in meta("resnet18", 64).sites]
    assert names[:4] == ["relu", "layer1.0.relu", "layer1.0.relu_1", "layer1.1.relu"]
    assert names[-1] == "layer4.1.relu_1"


def test_both_tracers_give_the_same_names() -> None:
    """A guard that symbolic_trace cannot follow sends the same network to torch.export."""

    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True))
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            h = self.relu(h + F.relu(self.relu(h) - 0.1))
            return h.mean((2, 3)).clamp(min=0)

    class Guard(Guarded):
        def forward(self, x: Tensor) -> Tensor:
            if x.ndim != 4 or x.shape[1] != 2:
                raise ValueError("an image, please")
            return super().forward(x)

    plain = fxpath.trace(Guarded().eval(), image(2).float())
    guard = fxpath.trace(Guard().eval(), image(2).float())
    assert (plain.traced.tracer, guard.traced.tracer) == ("symbolic_trace", "torch.export")
    assert [site.name for site in plain.sites] == ["stem.1", "relu", "relu_1", "relu_2", "clamp"]
    assert [(s.name, s.shape) for s in guard.sites] == [(s.name, s.shape) for s in plain.sites]


# --- which nodes are activations ------------------------------------------------------------------------------------

RECTIFIERS: dict[str, Callable[[Tensor], Tensor]] = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "nn.ReLU6": nn.ReLU6(),
    "nn.Hardtanh(0, 1)": nn.Hardtanh(0, 1),
    "nn.Hardtanh(0, 6) in place": nn.Hardtanh(0.0, 6.0, inplace=True),
    "nn.Threshold(0, 0)": nn.Threshold(0, 0),
    "F.relu": F.relu,
    "F.relu in place": lambda h: F.relu(h, inplace=True),
    "F.relu6": F.relu6,
    "F.relu6 in place": lambda h: F.relu6(h, True),
    "F.hardtanh": lambda h: F.hardtanh(h, 0.0, 2.0),
    "F.hardtanh by name": lambda h: F.hardtanh(h, min_val=0.0, max_val=2.0),
    "F.threshold": lambda h: F.threshold(h, 0.0, 0.0),
    "torch.threshold": lambda h: torch.threshold(h, 0.0, 0.0),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "relu method": lambda h: h.relu(),
    "relu_ method": lambda h: h.relu_(),
    "torch.clamp(min)": lambda h: torch.clamp(h, min=0),
    "torch.clamp(0, 6)": lambda h: torch.clamp(h, 0, 6.0),
    "torch.clip": lambda h: torch.clip(h, 0.0),
    "torch.clamp_min": lambda h: torch.clamp_min(h, 0),
    "clamp method": lambda h: h.clamp(min=0.0),
    "clamp_ method": lambda h: h.clamp_(0),
    "clamp_min method": lambda h: h.clamp_min(0),
    "clip method": lambda h: h.clip(0, 1),
}
SMOOTH_ONES: dict[str, Callable[[Tensor], Tensor]] = {
    "nn.GELU": nn.GELU(),
    "nn.GELU(tanh)": nn.GELU(approximate="tanh"),
    "nn.SiLU": nn.SiLU(inplace=True),
    "nn.Hardswish": nn.Hardswish(),
    "nn.LeakyReLU": nn.LeakyReLU(0.1, inplace=True),
    "nn.PReLU": nn.PReLU(),
    "nn.RReLU": nn.RReLU(),
    "nn.ELU": nn.ELU(inplace=True),
    "nn.SELU": nn.SELU(),
    "nn.CELU": nn.CELU(),
    "nn.Mish": nn.Mish(),
    "nn.Softplus": nn.Softplus(),
    "nn.Softsign": nn.Softsign(),
    "nn.Softshrink": nn.Softshrink(),
    "nn.Hardshrink": nn.Hardshrink(),
    "nn.Tanhshrink": nn.Tanhshrink(),
    "nn.Tanh": nn.Tanh(),
    "nn.Sigmoid": nn.Sigmoid(),
    "nn.Hardsigmoid": nn.Hardsigmoid(),
    "nn.LogSigmoid": nn.LogSigmoid(),
    "nn.Hardtanh": nn.Hardtanh(),
    "nn.Hardtanh(0.5, 1)": nn.Hardtanh(0.5, 1),
    "nn.Threshold(0.1, 20)": nn.Threshold(0.1, 20),
    "F.gelu": F.gelu,
    "F.silu": F.silu,
    "F.hardswish": F.hardswish,
    "F.leaky_relu": F.leaky_relu,
    "F.leaky_relu in place": lambda h: F.leaky_relu(h, 0.2, True),
    "F.leaky_relu_": lambda h: F.leaky_relu_(h, 0.2),
    "F.elu_": F.elu_,
    "F.selu": F.selu,
    "F.celu": F.celu,
    "F.mish": F.mish,
    "F.softplus": F.softplus,
    "F.softsign": F.softsign,
    "F.softshrink": F.softshrink,
    "F.hardshrink": F.hardshrink,
    "F.tanhshrink": F.tanhshrink,
    "F.tanh": torch.tanh,
    "F.hardsigmoid": F.hardsigmoid,
    "F.logsigmoid": F.logsigmoid,
    "F.threshold above 0": lambda h: F.threshold(h, 0.5, 0.0),
    "tanh method": lambda h: h.tanh_(),
    "sigmoid method": lambda h: h.sigmoid(),
    "torch.special.expit": torch.special.expit,
}
NONE: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp between": lambda h: h.clamp(-1, 1),
    "clamp from above": lambda h: torch.clamp(h, max=0),
    "clamp at one": lambda h: h.clamp(min=1),
    "softmax": lambda h: h.softmax(1),
    "nn.Identity": nn.Identity(),
    "nn.Dropout": nn.Dropout(),
    "abs": torch.abs,
}


EXPORTED = (  # a choice: exporting takes a good part of a second
    "nn.ReLU6", "F.relu6", "nn.Hardtanh(0, 1)", "clamp_ method", "torch.clamp_min", "nn.Threshold(0, 0)", "nn.RReLU",
    "nn.LeakyReLU", "nn.GELU", "nn.PReLU", "F.logsigmoid", "nn.Hardswish", "nn.Tanhshrink", "F.threshold above 0",
    "relu_ method", "clamp between",
)  # fmt: skip


def rectifiers_found(model: nn.Module, tracer: str) -> list[bool]:
    found = trace_module(model.eval(), Samples(torch.randn(2, 4)))
    assert found.tracer == tracer
    return [activation.rectifier for activation in activations_of(found.graph_module)]


@pytest.mark.parametrize("name", [*RECTIFIERS, *SMOOTH_ONES, *NONE])
def test_what_is_an_activation(name: str) -> None:
    model = Activations((RECTIFIERS | SMOOTH_ONES | NONE)[name])
    assert rectifiers_found(model, "symbolic_trace") == ([] if name in NONE else [name in RECTIFIERS])


@pytest.mark.parametrize("name", EXPORTED)
def test_what_is_an_activation_in_exported_graphs(name: str) -> None:
    class Guard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Activations((RECTIFIERS | SMOOTH_ONES | NONE)[name])

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if x.shape[1] == 4 else x

    assert rectifiers_found(Guard(), "torch.export") == ([] if name in NONE else [name in RECTIFIERS])


def test_functions_of_other_libraries_are_no_activations() -> None:
    """A `relu` that is not torch's is none; nor is what depends on parameters or shapes alone."""

    def relu(h: Tensor) -> Tensor:
        return h + 1

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x * torch.relu(self.weight) * torch.sigmoid(torch.zeros_like(x))) + relu(x)

    network = fxpath.trace(Own().eval(), torch.randn(2, 4), sites="activations")
    assert [site.name for site in network.sites] == ["relu_1"]


# --- choosing sites -------------------------------------------------------------------------------------------------


def test_choosing_sites() -> None:
    case = BY_NAME["Concat"]
    names = ["relu", "relu_1", "relu_2"]

    def chosen(sites: object) -> list[str]:
        return [site.name for site in case.trace(sites=sites).sites]

    assert chosen("rectifiers") == chosen("activations") == chosen(nn.ReLU) == chosen("relu*") == names
    assert chosen("relu_1") == ["relu_1"]
    assert chosen(["relu_2", "relu"]) == ["relu", "relu_2"]  # in order of execution
    assert chosen("relu_?") == ["relu_1", "relu_2"]
    assert chosen(["relu", nn.ReLU, "relu_[12]*", "relu_2"]) == names
    assert chosen(lambda node: node.target is torch.cat) == ["cat"]
    assert chosen(["squeeze", "relu"]) == ["squeeze", "relu"]
    assert chosen([nn.Conv2d, "rectifiers"]) == ["squeeze", "relu", "small", "relu_1", "large", "relu_2"]


def test_a_module_type_is_a_leaf() -> None:
    network = BY_NAME["CustomLeaf"].trace(leaves=(), sites=SquaredReLU)
    assert [(site.name, site.op) for site in network.sites] == [("act", "squaredrelu")]


def test_smooth_sites_are_warned_of() -> None:
    model, x = BY_NAME["Smooth"].model(), rows(4)(2)
    with pytest.warns(SmoothSitesWarning, match=r"5 sites are no rectifiers \(acts\.0, silu, acts\.1 …\)"):
        fxpath.trace(model, x, sites="activations")


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("relu_3", r"there is no node or module 'relu_3'; nearest: relu_2, relu_1, relu \(all: squeeze, relu"),
        (
            "x*",
            r"'x\*' matches no node. Activations there are \(3\): relu \(relu\), relu_1 \(relu\), relu_2 \(relu\)\.",
        ),
        (nn.GELU, r"'GELU' matches no node"),
        (lambda node: False, r"'<lambda>' matches no node"),
        ([3], r"expected names, globs, module types or a callable, found 3"),
        (["relu", "gelu"], r"there is no node or module 'gelu'; nearest: relu"),
        ("output", r"there is no node or module 'output'"),
    ],
)
def test_sites_that_do_not_exist(sites: object, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        BY_NAME["Concat"].trace(sites=sites)


def test_no_activation_found() -> None:
    linear = nn.Sequential(nn.Linear(4, 4)).eval()
    for sites in ("rectifiers", "activations"):
        with pytest.raises(
            SiteError, match=r"no (rectifier|activation).*in this network.*no activation that fxpath knows"
        ):
            fxpath.trace(linear, torch.ones(2, 4), sites=sites)
    with pytest.raises(SiteError, match=r"Activations there are \(5\): acts\.0 \(gelu\), silu.*sites='activations'"):
        BY_NAME["Smooth"].trace(sites="rectifiers")
    with pytest.warns(SmoothSitesWarning, match="1 sites are no rectifiers"):
        assert [site.name for site in fxpath.trace(linear, torch.ones(2, 4), sites=nn.Linear).sites] == ["0"]


def test_sites_that_cannot_be_neurons() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            h = self.fc(x)
            return F.relu(h).argmax(1), F.relu(h.t()).t(), F.relu(h.mean()), h

    model, x = Odd().eval(), torch.randn(3, 4)
    with (
        pytest.warns(SmoothSitesWarning, match="argmax"),
        pytest.raises(SiteError, match=r"site argmax: expected a floating-point tensor, found torch\.int64 \(1,\)"),
    ):
        fxpath.trace(model, x, sites="argmax")
    with pytest.raises(SiteError, match=r"relu_1: expected its first axis to grow.*\(4, 1\) for one.*\(4, 2\) for two"):
        fxpath.trace(model, x, sites=["relu", "relu_1"])
    with pytest.raises(SiteError, match=r"relu_2: expected a floating-point tensor, found torch\.float32 \(\)"):
        fxpath.trace(model, x, sites="relu_2")
    assert len(fxpath.trace(model, x, sites="relu").sites) == 1


# --- gates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_gate_a_call_and_every_user_reads_it(case: object) -> None:
    network = traced(case.name)  # type: ignore[attr-defined]
    gates = [node for node in network._module.graph.nodes if node.target is gate]
    assert gates == network._gate_nodes
    assert [node.args[2] for node in gates] == list(range(len(network.sites)))
    for node, site in zip(gates, network.sites, strict=True):
        activation = node.args[0]
        assert isinstance(activation, fx.Node)
        assert list(activation.users) == [node]
        assert activation.meta[NAME] == site.name
        assert activation.next is node
    placeholders = [node for node in network._module.graph.nodes if node.op == "placeholder"]
    assert [node.target for node in placeholders].count(GATES) == 1
    assert placeholders[-1].target == GATES


EDGES = {
    "Plain": {(-1, 0), (0, 1), (1, 2)},
    "ReusedReLU": {(-1, 0), (0, 1), (1, 2)},
    "ResidualIadd": {(-1, 0), (0, 1), (1, 2)},
    "InPlaceReadAgain": {(-1, 0), (0, 1), (0, 2), (1, 2)},
    "InPlaceReadBefore": {(-1, 0), (-1, 2), (0, 1), (1, 2)},
    "Alias": {(-1, 0), (-1, 1), (0, 1)},
    "Concat": {(-1, 0), (0, 1), (0, 2), (1, 3), (2, 3)},
    "Unused": {(-1, 0), (0, 1), (-1, 2), (2, 3)},
    "TwoInputs": {(-1, 0), (-1, 1), (0, 2), (1, 2)},
    "SqueezeExcitation": {(-1, 0), (0, 1), (0, 2), (1, 2), (2, 3)},
    "SizeReshape": {(-1, 0), (0, 1), (1, 2)},
    "Norms": {(-1, 0), (-1, 1), (0, 1)},
    "ViewSlice": {(-1, 0), (-1, 1), (0, 1)},
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_of_the_site_graph(name: str) -> None:
    network = traced(name)
    assert set(network.edges) == EDGES[name]
    assert site_edges(network._module) == sorted(EDGES[name])


def test_a_shape_is_no_data() -> None:
    """The second site takes only the size of the first; ones_like and zeros_like take no data either."""

    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.fc1(x))
            other = F.relu(self.fc2(x)).view(h.size(0), h.shape[1])
            return other * torch.ones_like(h)

    class Guard(Sizes):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[1] == 4 else x

    for kind in (Sizes, Guard):
        network = fxpath.trace(kind().eval(), torch.randn(2, 4))
        assert set(network.edges) == {(-1, 0), (-1, 1), (1, 2)}, kind


def test_edges_agree_with_gradients() -> None:
    """An edge to the response or to a site exists only where data flows: cut all others, and the gradient says so."""
    for name in ("Concat", "InPlaceReadAgain", "SqueezeExcitation", "InPlaceReadBefore"):
        network, case = traced(name), BY_NAME[name]
        count = len(network.sites)
        x = case.x(12)  # enough for a unit of every site to be live
        values = network.activations(x)
        for source in range(count):
            start = values[source].clone().requires_grad_()
            # all other sites frozen to their values: only direct ways are left
            flowing = _direct(network, x, source, start, values)
            expected = {target for s, target in network.edges if s == source}
            assert flowing == expected, (name, source)


def _direct(network: fxpath.Network, x: Tensor, source: int, start: Tensor, values: list[Tensor]) -> set[int]:
    reached: dict[int, Tensor] = {}

    class Frozen:
        def __call__(self, number: int, activation: Tensor) -> Tensor:
            if number == source:
                return start
            reached[number] = activation
            return values[number]

    output = network._module(*network.traced.bind(Samples(x)), Frozen())
    reached[len(network.sites)] = output
    found = set()
    for number, value in reached.items():
        if value.requires_grad:
            (slope,) = torch.autograd.grad(value.sum(), start, retain_graph=True, allow_unused=True)
            if slope is not None and bool(slope.any()):
                found.add(number)
    return found


# --- channels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "axes", "channels"),
    [
        ("Plain", [0, 0], [3, 3]),
        ("Functional", [0, 0, 0], [3, 3, 27]),
        ("Concat", [0, 0, 0], [2, 2, 3]),
        ("MLP", [0, 0], [7, 5]),
        ("Norms", [1], [6]),
        ("Transformer", [1], [6]),
        ("BatchFolded", [1, 1], [5, 3]),
        ("Conv1d", [0], [3]),
        ("ScalarOutput", [0, 0], [3, 1]),
        ("ShapeBranch", [0, 0, 0], [3, 3, 3]),
    ],
)
def test_channel_axes(name: str, axes: list[int], channels: list[int]) -> None:
    index = traced(name, "channel").index
    assert [site.axis for site in index.sites] == axes
    assert [site.neurons for site in index.sites] == channels
    assert index.units == traced(name).index.size


def test_granularity_is_checked() -> None:
    with pytest.raises(InputError, match="expected 'unit' or 'channel', found 'pixel'"):
        BY_NAME["Plain"].trace(granularity="pixel")


class TimeFirst(nn.Module):
    """Folds time before the batch: the rows of the samples come in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x.transpose(0, 1).reshape(-1, 4)))
        return F.relu(self.fc2(h.view(x.shape[1], x.shape[0], 5).transpose(0, 1).mean(1)))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_fold_that_mixes_samples_is_refused(batch: int) -> None:
    torch.manual_seed(0)
    model, x = TimeFirst().eval(), torch.randn(batch, 6, 4)
    with pytest.raises(SiteError, match=r"site relu: expected the rows of a sample one after the other"):
        fxpath.trace(model, x)
    assert [site.shape for site in fxpath.trace(model, x, sites="relu_1").sites] == [(3,)]


def test_folds() -> None:
    assert [site.fold for site in traced("BatchFolded").sites] == [3, 3]
    assert {site.fold for site in traced("Norms").sites} == {1}


# --- sub-graphs -----------------------------------------------------------------------------------------------------


def test_segment_between_two_sites() -> None:
    """From one gate to the next activation: what lies between, and nothing else."""
    network, case = traced("Plain"), BY_NAME["Plain"]
    first, second = network._gate_nodes
    segment = cut(network._module, [first], [second.args[0]])
    model, x = case.model(), case.x()
    start = torch.rand(3, 3, 5, 5, dtype=torch.float64)
    (end,) = segment.module(start)
    assert torch.equal(end, F.relu(model.conv2(start)))
    assert (segment.starts, segment.boundary) == (("relu1:gate",), ())
    assert re.search("conv2", segment.module.code)
    assert not re.search("conv1|mean", segment.module.code)
    del x


def test_segments_share_parameters_and_name_their_boundary() -> None:
    network = traced("InPlaceReadAgain")
    part = cut(network._module, [network._gate_nodes[1]])
    assert len(part.boundary) == 1
    assert {p.data_ptr() for p in part.module.parameters()} <= {p.data_ptr() for p in network._module.parameters()}


def test_custom_leaf_is_called_not_copied() -> None:
    network = BY_NAME["CustomLeaf"].trace()
    assert sum(isinstance(module, SquaredReLU) for module in network._module.modules()) == 1
    model = CustomLeaf().double().eval()
    again = fxpath.trace(model, image(2), leaves=SquaredReLU)
    assert model.act in set(again._module.modules())


def test_options_of_smooth_cases() -> None:
    assert SMOOTH == {"sites": "activations"}
    assert [site.op for site in traced("Smooth").sites] == ["gelu", "silu", "hardswish", "tanh", "sigmoid"]
    assert [site.op for site in traced("Leaky").sites] == ["leakyrelu", "leaky_relu", "prelu", "elu"]
    assert [site.op for site in traced("Rectifiers").sites] == ["relu6", "hardtanh", "clamp", "threshold", "relu6"]
