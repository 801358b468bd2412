"""Which values behind a site are affine in a factor of its activation: by hand, and held against what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import CASES, Case, traced
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxpath
from fxpath.errors import ModelError
from fxpath.rewriting import gate
from fxpath.scaling import Growth, frontier, growths
from fxpath.selectors import NeuronIntGrad

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
CONSTANT, HOMOGENEOUS, AFFINE, OTHER = Growth

Body = Callable[..., Any]

W = torch.randn(5, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
V = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
B = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
M, S = torch.tensor([0.1, -0.2, 0.3]).double(), torch.tensor([0.5, 1.0, 2.0]).double()
WEIGHTS = {"W": W, "V": V, "B": B, "M": M, "S": S}


class Root(nn.Module):
    """What a graph reads: its modules, and weights of its own."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        for name, tensor in WEIGHTS.items():
            self.register_buffer(name, tensor)


class Appending(fx.proxy.GraphAppendingTracer):
    """Weights become nodes that read them."""

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self.graph.get_attr(next(name for name, tensor in WEIGHTS.items() if tensor is a))
        return super().create_arg(a)


def by_hand(body: Body, **modules: nn.Module) -> tuple[fx.GraphModule, fx.Node]:
    """A graph of a site's activation `a` and a value `skip` that bypasses it; also the site's gate node."""
    graph = fx.Graph()
    a, skip = graph.placeholder("a"), graph.placeholder("skip")
    site = graph.call_function(gate, (a, None, 0))
    tracer = Appending(graph)
    callers = {
        name: lambda given, name=name: fx.Proxy(graph.call_module(name, (given.node,)), tracer) for name in modules
    }
    result = body(fx.Proxy(site, tracer), fx.Proxy(skip, tracer), **callers)
    graph.output(pytree.tree_map(lambda proxy: proxy.node if isinstance(proxy, fx.Proxy) else proxy, result))
    graph.lint()
    return fx.GraphModule(Root(modules).double().eval(), graph), site


def growth(module: fx.GraphModule, site: fx.Node) -> Growth:
    """Of the value that the graph gives out."""
    (result,) = next(node for node in module.graph.nodes if node.op == "output").all_input_nodes
    return growths(module, site, gated=False)[result]


def values() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, skip = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, generator=generator)
    return 5 * a.relu(), skip


def is_affine(module: Callable[..., Any], *, homogeneous: bool = False) -> bool:
    """Whether v(α) = v(0) + α·(v(1) − v(0)), with v(0) = 0 where `homogeneous`."""
    a, skip = values()
    begin, end = (pytree.tree_leaves(module(factor * a, skip)) for factor in (0, 1))
    if homogeneous and any(bool((value != 0).any()) for value in begin):
        return False
    for alpha in (0.2, 0.7):
        for v, v0, v1 in zip(pytree.tree_leaves(module(alpha * a, skip)), begin, end, strict=True):
            if not torch.allclose(v.double(), v0 + alpha * (v1 - v0).double(), rtol=1e-9, atol=1e-12):
                return False
    return True


HOMOGENEOUS_BODIES: dict[str, Body] = {
    "itself": lambda a, skip: a,
    "negated": lambda a, skip: -a,
    "twice": lambda a, skip: 2 * a,
    "a third": lambda a, skip: a / 3,
    "over the skip": lambda a, skip: torch.div(2 * a, skip),
    "times the skip": lambda a, skip: skip * a,
    "itself added": lambda a, skip: a + a,
    "two sums": lambda a, skip: torch.sub(a * skip, a.mean((2, 3), keepdim=True), alpha=2),
    "mean": lambda a, skip: a.mean((2, 3)),
    "views": lambda a, skip: a.flatten(2).permute(0, 2, 1).unsqueeze(1).reshape(-1, 16, 3).transpose(1, 2)[:, :, 1:],
    "pieces": lambda a, skip: torch.cat(a.chunk(2, 1)[:1], 1),
    "joined": lambda a, skip: torch.cat([a, 2 * a], 1),
    "stacked": lambda a, skip: torch.stack([a, -a]),
    "rectified": lambda a, skip: torch.relu(a * skip),
    "leaky": lambda a, skip: F.leaky_relu(-a, 0.2),
    "absolute": lambda a, skip: (a * skip).abs(),
    "maxima": lambda a, skip: F.max_pool2d(a, 2),
    "largest": lambda a, skip: (a * skip).amax((2, 3)),
    "averages": lambda a, skip: F.adaptive_avg_pool2d(F.avg_pool2d(a, 2, 1), 1),
    "convolved": lambda a, skip: F.conv2d(a, W),
    "linear": lambda a, skip: F.linear(a, V),
    "product": lambda a, skip: a @ skip.transpose(2, 3),
    "no dropout": lambda a, skip: F.dropout(a, 0.5, training=False),
    "no dropout by place": lambda a, skip: F.dropout(a, 0.5, False),
}
AFFINE_BODIES: dict[str, Body] = {
    "a number more": lambda a, skip: a + 1,
    "a number less": lambda a, skip: a - 0.5,
    "from a number": lambda a, skip: 1 - a,
    "the skip more": lambda a, skip: skip + 2 * a,
    "shifted twice": lambda a, skip: (a + 1) + (a - skip),
    "shifted, then scaled": lambda a, skip: ((a + 1) * skip / 2).mean(1),
    "joined with the skip": lambda a, skip: torch.cat([a, skip], 1),
    "joined with a shifted one": lambda a, skip: torch.cat([a, a + 1], 1),
    "stacked with the skip": lambda a, skip: torch.stack([skip, a]),
    "convolved with bias": lambda a, skip: F.conv2d(a, W, B),
    "convolved with bias by name": lambda a, skip: F.conv2d(a, W, bias=B),
    "linear with bias": lambda a, skip: F.linear(a, V, B),
    "batch norm": lambda a, skip: F.batch_norm(a, M, S),
    "batch norm of all places": lambda a, skip: F.batch_norm(a, M, S, S, M, False),
    "averages of a shifted one": lambda a, skip: F.avg_pool2d(a + skip, 2),
}
OTHER_BODIES: dict[str, Body] = {
    "square": lambda a, skip: a * a,
    "power": lambda a, skip: a**2,
    "product with itself": lambda a, skip: torch.matmul(a, a),
    "product with a part of itself": lambda a, skip: a * a.mean(1, keepdim=True),
    "inverse": lambda a, skip: skip / (a + 1),
    "rounded quotient": lambda a, skip: torch.div(a, 0.3, rounding_mode="floor"),
    "softmax": lambda a, skip: a.softmax(1),
    "sigmoid": lambda a, skip: torch.sigmoid(a),
    "relu6": lambda a, skip: F.relu6(9 * a),
    "rounded": lambda a, skip: torch.round(a),
    "which": lambda a, skip: torch.where(a > 0.5, a, skip),
    "rectified after a shift": lambda a, skip: torch.relu(a - 0.3),
    "rectified after the skip": lambda a, skip: F.leaky_relu(a + skip),
    "absolute after a shift": lambda a, skip: (a - 0.3).abs(),
    "maxima after a bias": lambda a, skip: F.max_pool2d(F.linear(a / 5, V, B), 2),
    "maxima after the skip": lambda a, skip: F.max_pool2d(a + skip, 2),
    "largest after the skip": lambda a, skip: torch.cat([a, skip], 1).amax(1),
    "layer norm": lambda a, skip: F.layer_norm(a, (4, 4)),
    "batch norm in training": lambda a, skip: F.batch_norm(a, None, None, training=True),
    "batch norm in training by place": lambda a, skip: F.batch_norm(a, None, None, None, None, True),
    "a sum of a square": lambda a, skip: a + a * a,
    "linear after a square": lambda a, skip: F.linear(a * a, V),
}
NEITHER_BODIES: dict[str, Body] = {  # affine, or now and then, and yet not to be taken as such
    "its own weights": lambda a, skip: F.conv2d(skip, a[:1]),
    "detached": lambda a, skip: a.detach(),  # its value is, its gradient is not
    "dropout": lambda a, skip: F.dropout(a, 0.5),
    "dropout as a graph may call it": lambda a, skip: fx.Proxy(
        a.node.graph.call_function(F.dropout, (a.node, 0.5)), a.tracer
    ),
    "dropout in training": lambda a, skip: F.dropout(a, 0.5, training=True),
    "dropout in training by place": lambda a, skip: F.dropout(a, 0.5, True),
    "maxima and their places": lambda a, skip: F.max_pool2d(a, 2, return_indices=True)[1],
    "maxima and their places by place": lambda a, skip: F.max_pool2d(a, 2, 1, 0, 1, False, True)[1],
}


@pytest.mark.parametrize("name", HOMOGENEOUS_BODIES)
def test_homogeneous(name: str) -> None:
    module, site = by_hand(HOMOGENEOUS_BODIES[name])
    assert growth(module, site) is HOMOGENEOUS
    assert is_affine(module, homogeneous=True)


@pytest.mark.parametrize("name", AFFINE_BODIES)
def test_affine(name: str) -> None:
    module, site = by_hand(AFFINE_BODIES[name])
    assert growth(module, site) is AFFINE
    assert is_affine(module)
    assert not is_affine(module, homogeneous=True)


@pytest.mark.parametrize("name", [*OTHER_BODIES, *NEITHER_BODIES])
def test_other(name: str) -> None:
    module, site = by_hand({**OTHER_BODIES, **NEITHER_BODIES}[name])
    assert growth(module, site) is OTHER
    assert name in NEITHER_BODIES or not is_affine(module)


def test_what_does_not_read_the_site_is_constant() -> None:
    module, site = by_hand(lambda a, skip: torch.relu(skip * 2) + a)
    known = {node.name: found for node, found in growths(module, site, gated=False).items()}
    assert known == {
        "a": CONSTANT, "skip": CONSTANT, "gate": HOMOGENEOUS, "mul": CONSTANT, "relu": CONSTANT, "add": AFFINE,
        "output": OTHER,
    }  # fmt: skip
    assert CONSTANT < HOMOGENEOUS < AFFINE < OTHER


# --- modules --------------------------------------------------------------------------------------------------------


class Conv2dOfMine(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) ** 2


class ReLUOfMine(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(input - 1)


MODULES: dict[str, tuple[Callable[[], nn.Module], Growth, Growth]] = {  # given what is homogeneous, and affine
    "Conv2d": (lambda: nn.Conv2d(3, 2, 3, bias=False), HOMOGENEOUS, AFFINE),
    "Conv2d with bias": (lambda: nn.Conv2d(3, 2, 3), AFFINE, AFFINE),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 2, 3, bias=False), HOMOGENEOUS, AFFINE),
    "Linear": (lambda: nn.Linear(4, 2, bias=False), HOMOGENEOUS, AFFINE),
    "Linear with bias": (lambda: nn.Linear(4, 2), AFFINE, AFFINE),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), HOMOGENEOUS, AFFINE),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(1), HOMOGENEOUS, AFFINE),
    "Flatten": (nn.Flatten, HOMOGENEOUS, AFFINE),
    "Identity": (nn.Identity, HOMOGENEOUS, AFFINE),
    "Dropout": (nn.Dropout, HOMOGENEOUS, AFFINE),
    "Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), HOMOGENEOUS, AFFINE),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), AFFINE, AFFINE),
    "ReLU": (nn.ReLU, HOMOGENEOUS, OTHER),
    "LeakyReLU": (nn.LeakyReLU, HOMOGENEOUS, OTHER),
    "PReLU": (nn.PReLU, HOMOGENEOUS, OTHER),
    "MaxPool2d": (lambda: nn.MaxPool2d(2, 1, 1), HOMOGENEOUS, OTHER),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(2), HOMOGENEOUS, OTHER),
    "ReLU6": (nn.ReLU6, OTHER, OTHER),
    "GELU": (nn.GELU, OTHER, OTHER),
    "Sigmoid": (nn.Sigmoid, OTHER, OTHER),
    "Softmax": (lambda: nn.Softmax(1), OTHER, OTHER),
    "LayerNorm": (lambda: nn.LayerNorm(4), OTHER, OTHER),
    "GroupNorm": (lambda: nn.GroupNorm(1, 3), OTHER, OTHER),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3), OTHER, OTHER),
    "BatchNorm2d of the batch's own": (lambda: nn.BatchNorm2d(3, track_running_stats=False), OTHER, OTHER),
    "a subclass of Conv2d": (lambda: Conv2dOfMine(3, 2, 3, bias=False), OTHER, OTHER),
    "a subclass of ReLU": (ReLUOfMine, OTHER, OTHER),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    make, of_homogeneous, of_affine = MODULES[name]
    torch.manual_seed(5)
    called = make()
    for tensor in (*called.parameters(), *called.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.3, 0.9)
    for body, expected in ((lambda a, skip, m: m(a), of_homogeneous), (lambda a, skip, m: m(a + skip), of_affine)):
        module, site = by_hand(body, m=called)
        assert growth(module, site) is expected
        assert is_affine(module, homogeneous=expected is HOMOGENEOUS) == (expected is not OTHER)


def test_modules_of_what_is_neither() -> None:
    module, site = by_hand(lambda a, skip, m: m(a * a), m=nn.Conv2d(3, 2, 1))
    assert growth(module, site) is OTHER


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 2, 1), nn.ReLU, nn.Identity], ids=["Conv2d", "ReLU", "Identity"])
def test_a_module_with_a_hook_may_compute_anything(make: Callable[[], nn.Module], kind: str) -> None:
    called = make()
    module, site = by_hand(lambda a, skip, m: m(a), m=called)
    assert growth(module, site) is not OTHER
    handle = getattr(called, f"register_{kind}_hook")(lambda *_: None)
    assert growth(module, site) is OTHER
    handle.remove()
    assert growth(module, site) is not OTHER


def test_maxima_with_their_places() -> None:
    module, site = by_hand(lambda a, skip, m: m(a)[0], m=nn.MaxPool2d(2, return_indices=True))
    assert growth(module, site) is OTHER


def test_networks_in_training_are_refused() -> None:
    """So that a module's batch norm and dropout are those of evaluation."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.ReLU(), nn.BatchNorm2d(3), nn.Dropout(), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)
    ).eval()
    x = torch.randn(2, 2, 4, 4)
    network = fxpath.trace(model, x)
    for number in (2, 3):
        model[number].train()
        with pytest.raises(ModelError, match="training mode"):
            NeuronIntGrad(steps=2).scores(network, x)
        model[number].eval()


# --- gates further on -----------------------------------------------------------------------------------------------


def test_gates_further_on() -> None:
    module, site = by_hand(lambda a, skip: fx.Proxy(a.node.graph.call_function(gate, ((2 * a).node, None, 1))))
    later = [node for node in module.graph.nodes if node.target is gate][1]
    assert growths(module, site, gated=False)[later] is HOMOGENEOUS
    assert growths(module, site, gated=True)[later] is OTHER
    assert growths(module, site, gated=True)[site] is HOMOGENEOUS


# --- the frontier ---------------------------------------------------------------------------------------------------


def edge(body: Body, **modules: nn.Module) -> list[str]:
    module, site = by_hand(body, **modules)
    return [node.name for node in frontier(module, site, gated=False)]


def test_the_frontier() -> None:
    conv = nn.Conv2d(3, 3, 1)
    plain = {"conv": conv, "other": nn.Conv2d(3, 3, 1)}
    assert edge(lambda a, skip: a * a) == ["gate"]
    assert edge(lambda a, skip: a) == ["gate"]  # the output itself reads it
    assert edge(lambda a, skip, conv: conv(a).mean(1), conv=conv) == ["mean"]
    assert edge(lambda a, skip, conv: torch.relu(conv(a)), conv=conv) == ["conv"]
    assert edge(lambda a, skip, conv: torch.relu(conv(a) + a), conv=conv) == ["add"]
    assert edge(lambda a, skip, conv: torch.relu(conv(torch.relu(a))), conv=conv) == ["conv"]
    assert edge(lambda a, skip, conv: torch.relu(conv(torch.relu(a + 1))), conv=conv) == ["add"]
    assert edge(lambda a, skip, conv: torch.sigmoid(a) * conv(a), conv=conv) == ["gate", "conv"]
    assert edge(
        lambda a, skip, conv, other: torch.cat([torch.relu(conv(a)), torch.relu(other(a))], 1), **plain
    ) == ["conv", "other"]  # fmt: skip
    assert edge(lambda a, skip, conv: {"y": torch.relu(conv(a)), "z": a}, conv=conv) == ["gate", "conv"]


def test_the_frontier_of_what_leads_nowhere() -> None:
    def aside(a: Any, skip: Any, conv: Any) -> Any:
        torch.relu(conv(a))
        return skip * 2

    def partly(a: Any, skip: Any, conv: Any) -> Any:
        torch.sigmoid(conv(a))
        return torch.relu(a - 1)

    assert edge(aside, conv=nn.Conv2d(3, 3, 1)) == []
    assert edge(partly, conv=nn.Conv2d(3, 3, 1)) == ["sub"]


def gate_nodes(network: fxpath.Network) -> list[fx.Node]:
    return [node for node in network.traced.graph_module.graph.nodes if node.target is gate]


def test_the_frontier_of_squeezenet() -> None:
    """What a fire module's squeeze feeds is two convolutions; what they feed is, with its twin, one squeeze or pool."""
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(weights=None).eval()
    network = fxpath.trace(model, torch.randn(2, 3, 48, 48))
    found = {
        site.name: [n.name for n in frontier(network.traced.graph_module, node, gated=False)]
        for site, node in zip(network.sites, gate_nodes(network), strict=True)
    }
    assert found["features.1"] == ["features_3_squeeze"]  # a maximum without a bias before it is homogeneous
    assert found["features.3.squeeze_activation"] == ["features_3_expand1x1", "features_3_expand3x3"]
    assert found["features.3.expand1x1_activation"] == ["features_4_squeeze"]
    assert found["features.4.expand3x3_activation"] == ["cat_1"]  # a pool follows, and its twin stands beside it
    assert found["features.12.expand1x1_activation"] == ["classifier_1"]
    assert found["classifier.2"] == ["flatten"]


# --- what is claimed is so ------------------------------------------------------------------------------------------


class Noting(fx.Interpreter):
    """Runs a graph and keeps every node's value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def noted(network: fxpath.Network, x: Any, gates: Callable[[int, Tensor], Tensor]) -> dict[fx.Node, list[Any]]:
    run = Noting(network.traced.graph_module)
    with torch.no_grad():
        run.run(*network.traced.bind(network.samples(x)), gates)
    return {node: pytree.tree_leaves(value) for node, value in run.seen.items()}


ALPHAS = (0.0, 1.0, 0.3, 0.85)


def hold(network: fxpath.Network, number: int, x: Any, gated: bool) -> int:
    """Check what is claimed of every node behind a site; how many are claimed to be more than constant."""
    module, site = network.traced.graph_module, gate_nodes(network)[number]

    def gates(alpha: float) -> Callable[[int, Tensor], Tensor]:
        def apply(other: int, a: Tensor) -> Tensor:
            return alpha * a if other == number else (torch.sin(3 * a) + 0.1 if gated and other > number else a)

        return apply

    runs = [noted(network, x, gates(alpha)) for alpha in ALPHAS]
    claims = 0
    for node, found in growths(module, site, gated=gated).items():
        if found is OTHER or node.target == "fxpath_gates":
            continue
        claims += found is not CONSTANT
        begin, end = runs[0][node], runs[1][node]
        for alpha, run in zip(ALPHAS, runs, strict=True):
            for v, v0, v1 in zip(run[node], begin, end, strict=True):
                if not isinstance(v, Tensor):
                    assert v == v0
                elif found is CONSTANT:
                    assert torch.equal(v, v0), node
                else:
                    start = 0 if found is HOMOGENEOUS else v0
                    torch.testing.assert_close(v, start + alpha * (v1 - start), rtol=1e-10, atol=1e-12, msg=str(node))
    return claims


@pytest.mark.parametrize("gated", [False, True], ids=["open", "gated"])
@every
def test_what_is_claimed_is_so(case: Case, gated: bool) -> None:
    network, x = traced(case.name), case.x(3, seed=8)
    for number in range(len(network.sites)):
        assert hold(network, number, x, gated) >= 1


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "googlenet"])
def test_what_is_claimed_of_large_networks_is_so(name: str) -> None:
    torch.manual_seed(1)
    more = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **more).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    network = fxpath.trace(model, x)
    count = len(network.sites)
    for number in sorted({0, count // 3, 2 * count // 3, count - 1}):
        assert hold(network, number, x, False) > 1
