"""Exported modules: bit for bit the restricted network, inputs and outputs as the model's, and nothing of fxpath."""

from __future__ import annotations

import importlib
import inspect
import io
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from footprint import unchanged
from networks import BY_NAME, CASES, MLP, Case, DataBranch, SquaredReLU, TwoInputs, image, traced
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils import _pytree as pytree

import fxpath
from fxpath.errors import ModelError, RestrictionError, SmoothSitesWarning, TraceWarning
from fxpath.samples import Samples


def some(network: fxpath.Network, batch: int, share: float = 0.6, seed: int = 1) -> fxpath.Pathways:
    generator = torch.Generator().manual_seed(seed)
    return fxpath.Pathways(torch.rand(batch, network.index.size, generator=generator) < share, network.index)


def arguments(module: fx.GraphModule, x: Any) -> dict[str, Any]:
    """The inputs by the names that the module has for them; what is no tensor may be left out."""
    samples = Samples(x)
    parameters = inspect.signature(module.forward).parameters
    names = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    places = [arg for arg in samples.args if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(arg))]
    given = dict(zip(names, places, strict=False)) | samples.kwargs
    return {name: given[name] for name in names}


def answered(call: Callable[[Any], Any], x: Any) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The output, and the gradient of a bent sum of it in every input."""
    samples = Samples(x).map(lambda leaf: leaf.clone().requires_grad_(leaf.is_floating_point()))
    output = call(samples.inputs)
    bent = sum((leaf * leaf.cos()).sum() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    return output, torch.autograd.grad(bent, samples.tensors, allow_unused=True)


def slopes(call: Callable[[Any], Any], x: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The gradient of a bent sum of the output in parameters, by name."""
    bent = sum((leaf * leaf.cos()).sum() for leaf in pytree.tree_leaves(call(x)) if isinstance(leaf, Tensor))
    return dict(zip(tensors, torch.autograd.grad(bent, list(tensors.values()), allow_unused=True), strict=True))


def require_same_slopes(model: nn.Module, network: fxpath.Network, module: fx.GraphModule, x: Any) -> None:
    """The gradient in every parameter that the module has, bit for bit; `network` is restricted as it is."""
    found = slopes(lambda x: module(**arguments(module, x)), x, dict(module.named_parameters()))
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, slope in slopes(network, x, {name: named[name] for name in found}).items():
        require_same(found[name], slope)


def require_same(one: Any, two: Any) -> None:
    """Bit for bit, and alike in structure and memory."""
    (leaves, spec), (others, other_spec) = pytree.tree_flatten(one), pytree.tree_flatten(two)
    assert spec == other_spec
    for leaf, other in zip(leaves, others, strict=True):
        if isinstance(leaf, Tensor):
            assert torch.equal(leaf, other)
            assert (leaf.dtype, leaf.stride(), leaf.device) == (other.dtype, other.stride(), other.device)
        else:
            assert leaf is other is None


def require_plain(module: fx.GraphModule) -> None:
    """No object of fxpath anywhere within."""
    assert type(module).__mro__[1] is fx.GraphModule
    assert not module.training
    assert (module.meta, module.graph._tracer_cls) == ({}, None)
    for part in module.modules():
        assert not type(part).__module__.startswith("fxpath")
    for node in module.graph.nodes:
        assert not str(getattr(node.target, "__module__", "")).startswith("fxpath"), node
        assert "out_of_place" not in str(node.target)
        assert not [key for key in node.meta if key.startswith("fxpath")]


def saved(module: fx.GraphModule) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def require_equal(network: fxpath.Network, pathways: fxpath.Pathways, x: Any, at: Any) -> fx.GraphModule:
    """Export, compare with the restricted network with and without gradients, save, load and compare again."""
    with unchanged(network._module):
        module = network.export(pathways, at=at)
    require_plain(module)
    file = saved(module)
    loaded = torch.load(file, weights_only=False)
    assert loaded.state_dict().keys() == module.state_dict().keys()
    loaded.load_state_dict(module.state_dict())
    with network.masked(pathways) if at is None else network.frozen(pathways, at=at):
        expected = answered(network, x)
        with torch.no_grad():
            unasked = network(x)
    for found in (module, loaded):
        call = lambda inputs, found=found: found(**arguments(found, inputs))  # noqa: E731
        require_same(expected, answered(call, x))
        with torch.no_grad():
            require_same(unasked, call(x))
    return module


@pytest.mark.parametrize("granularity", ["unit", "channel"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equal_to_the_restricted_network(case: Case, granularity: str) -> None:
    network = traced(case.name, granularity)
    for batch in (1, 3):
        pathways = some(network, batch)
        require_equal(network, pathways, case.x(3, seed=5), None)
        require_equal(network, pathways, case.x(3, seed=5), case.x(batch))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_gradient_in_parameters_is_the_networks(case: Case) -> None:
    model = case.model()
    network = case.trace(model)
    x, at, pathways = case.x(3, seed=5), case.x(3), some(network, 3)
    module = network.export(pathways, at=at)
    with network.frozen(pathways, at=at):
        require_same_slopes(model, network, module, x)


@pytest.mark.parametrize("wide", [False, True], ids=["contiguous", "channels_last"])
def test_a_network_of_torchvision(wide: bool, one_thread: None) -> None:
    form = torch.channels_last if wide else torch.contiguous_format
    model = torchvision.models.resnet18(weights=None).eval().to(memory_format=form)
    x, at = (torch.randn(2, 3, 64, 64).contiguous(memory_format=form) for _ in range(2))
    for granularity in ("unit", "channel"):
        network = fxpath.trace(model, at, granularity=granularity)
        with unchanged(model):
            require_equal(network, some(network, 1), x, at)
            module = require_equal(network, some(network, 2), x, None)
        assert set(model.state_dict()) <= set(module.state_dict())


def test_values_lie_in_memory_as_the_networks() -> None:
    """The answer holds the last site's value, whose memory format is that of the input."""
    case = BY_NAME["DictOutput"]
    network, x = traced(case.name), case.x(3, seed=5).contiguous(memory_format=torch.channels_last)
    module = require_equal(network, some(network, 3), x, case.x(3))
    assert module(x)["features"]["last"].is_contiguous(memory_format=torch.channels_last)
    assert module(case.x(3))["features"]["last"].is_contiguous()


STRAIGHT = """
import torch
from torch import nn

class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, slope):
        return 2 * slope

class Rounded(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x):
        with torch.no_grad():
            scale = x.abs().amax(1, keepdim=True)
        return super().forward(Straight.apply(4 * x) * scale)
"""

ELSEWHERE = """
import sys, torch
from torch.utils import _pytree as pytree

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fxpath", "networks"):
            raise ImportError("refused: " + name)

sys.meta_path.insert(0, Refused())
sys.path.insert(0, ".")
try:
    import fxpath
except ImportError as problem:
    print(problem)
for name in sys.argv[1:]:
    module, x, expected, slopes = torch.load(name + ".pt", weights_only=False)
    tensors = [leaf.requires_grad_(leaf.is_floating_point()) for leaf in pytree.tree_leaves(x)]
    found = module(**x)
    bent = sum((leaf * leaf.cos()).sum() for leaf in pytree.tree_leaves(found))
    again = torch.autograd.grad(bent, tensors, allow_unused=True)
    pairs = zip(pytree.tree_leaves((expected, slopes)), pytree.tree_leaves((found, again)), strict=True)
    print(name, all(one is two is None or torch.equal(one, two) for one, two in pairs))
"""


def test_without_fxpath(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of all networks that need no class of the tests, in a process that refuses to import fxpath."""
    (tmp_path / "own_straight.py").write_text(STRAIGHT)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(TraceWarning, match="the gradient stops"):
        rounded = fxpath.trace(importlib.import_module("own_straight").Rounded().eval(), torch.randn(3, 4))
    given = {case.name: (traced(case.name, "channel"), case.x(3, seed=5), case.x(3)) for case in CASES}
    given["rounded"] = (rounded, torch.randn(3, 4), torch.randn(3, 4))
    del given["CustomLeaf"]
    for name, (network, x, at) in given.items():
        pathways = some(network, 3)
        module = network.export(pathways, at=at)
        own = arguments(module, x)
        order = {id(tensor): place for place, tensor in enumerate(Samples(x).tensors)}
        with network.frozen(pathways, at=at):
            expected, slopes = answered(network, x)
        slopes = tuple(slopes[order[id(tensor)]] for tensor in pytree.tree_leaves(own))
        torch.save((module, own, pytree.tree_map(Tensor.detach, expected), slopes), tmp_path / f"{name}.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, *given], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["refused: fxpath", *(f"{name} True" for name in given)]


@pytest.mark.parametrize("name", ["Plain", "BatchFolded", "ChunkInPlace", "TwoInputs"])
def test_exported_programs(name: str) -> None:
    network, x, at = traced(name), BY_NAME[name].x(3, seed=5), BY_NAME[name].x(3)
    pathways = some(network, 3)
    module = network.export(pathways, at=at)
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (), arguments(module, x)), file)
    file.seek(0)
    with network.frozen(pathways, at=at):
        assert torch.equal(torch.export.load(file).module()(**arguments(module, x)), network(x))


# --- tensors ---


class Tied(nn.Module):
    """One matrix as a layer's weight, as another's, and read by itself; one parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.fc2.weight = self.matrix = self.fc1.weight
        self.fc2.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x))) @ self.matrix.t()


def test_tensors_are_copies_and_stay_tied() -> None:
    model, x = Tied().eval(), torch.randn(3, 4)
    network = fxpath.trace(model, x)
    pathways = some(network, 3)
    module = network.export(pathways)
    loaded = torch.load(saved(module), weights_only=False)
    with network.masked(pathways):
        before = network(x)
    for found in (module, loaded):
        assert found.fc1.weight is found.fc2.weight
        assert {name: p.requires_grad for name, p in found.named_parameters()} == {
            "fc1.weight": True, "fc1.bias": True, "fc2.bias": False,
        }  # fmt: skip
        assert not hasattr(found, "spare")
        for own in found.parameters():
            assert own.data_ptr() not in {theirs.data_ptr() for theirs in model.parameters()}
    with torch.no_grad():
        model.fc1.weight.zero_()
    pathways.mask.logical_not_()
    for found in (module, loaded):
        assert torch.equal(found(x), before)


class Scaled(nn.Module):
    """In place where it is told to, with a part and tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inplace, self.inner, self.weight = True, nn.Linear(5, 5), nn.Parameter(torch.rand(5))
        self.register_buffer("shift", torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x.relu_() if self.inplace else x.relu()) * self.weight) + self.shift


def test_parts_and_tensors_of_a_leaf_keep_their_names() -> None:
    """They are read and called outside of the leaf, too, which is in the graph in its out-of-place form."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.last = nn.Linear(4, 5), Scaled(), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.act(self.first(x)) + self.act.weight)
            return self.last(F.relu(self.act.inner(h) + self.act.shift))

    model, x = Reads().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    network = fxpath.trace(model, x, leaves=Scaled)
    pathways = some(network, 3)
    module = require_equal(network, pathways, x, x)
    assert set(module.state_dict()) - set(model.state_dict()) == {
        f"pathway.{name}_{number}" for name in ("mask", "constant") for number in (0, 1)
    }
    with network.frozen(pathways, at=x):
        require_same_slopes(model, network, module, x)


def test_constants_share_no_memory_with_the_input() -> None:
    """A site whose value is a view of the input."""

    class Views(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.flatten(x, 1))

    x = torch.randn(2, 2, 2)
    with pytest.warns(SmoothSitesWarning):
        network = fxpath.trace(Views().eval(), x, sites=["flatten", "rectifiers"])
    mask = torch.ones(2, network.index.size, dtype=torch.bool)
    mask[:, :4] = False
    module = network.export(fxpath.Pathways(mask, network.index), at=x)
    before = module(x)
    assert torch.equal(before, network(x))
    x.zero_()
    assert torch.equal(module(torch.ones(2, 2, 2)), before)


def test_only_what_is_needed_is_kept() -> None:
    network = traced("MLP")
    mask = torch.ones(1, 12, dtype=torch.bool)
    x = BY_NAME["MLP"].x()
    whole = network.export(fxpath.Pathways(mask.clone(), network.index), at=x[:1])
    assert [node.op for node in whole.graph.nodes] == ["placeholder"] + 5 * ["call_module"] + ["output"]
    assert torch.equal(whole(x), network(x))
    mask[0, 8] = False
    part = network.export(fxpath.Pathways(mask, network.index), at=x[:1])
    added = part.state_dict().keys() - whole.state_dict().keys()
    assert added == {"pathway.mask_1", "pathway.constant_1"}
    assert part.pathway.mask_1.untyped_storage().nbytes() == 5
    assert part.pathway.constant_1.untyped_storage().nbytes() == 5 * 8


def test_a_model_with_a_part_of_the_same_name() -> None:
    model = nn.Sequential()
    model.pathway = nn.Linear(4, 6)
    model.relu = nn.ReLU()
    x = torch.randn(2, 4)
    network = fxpath.trace(model.eval(), x)
    module = require_equal(network, some(network, 2), x, None)
    assert set(module.state_dict()) == {"pathway.weight", "pathway.bias", "pathway_.mask_0"}


def test_what_never_changes_is_one_buffer() -> None:
    """torch.export leaves operations on buffers and numbers in the graph; loading a module would run them."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))
            self.register_buffer("order", torch.tensor([2, 0, 1]))
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 3:
                raise ValueError("three rows, please")
            shift = torch.arange(3, dtype=x.dtype).unsqueeze(1).expand(3, 4)
            return F.relu(self.fc(x + self.weight[self.order + 0]) - shift) * self.scale

    x = torch.randn(2, 3, 4)
    network = fxpath.trace(Positions().eval(), x)
    assert network.traced.tracer == "torch.export"
    module = require_equal(network, some(network, 2), x, None)
    names = set(module.state_dict())
    assert {"fc.weight", "fc.bias", "weight", "scale", "pathway.mask_0"} < names
    assert len([name for name in names if name.startswith("pathway.fixed_")]) == len(names) - 5 == 2


# --- inputs and outputs ---


class ShapeChecked(TwoInputs):
    """Read by torch.export alone; takes tensors in a dict, a tuple and by keyword."""

    def forward(self, batch: dict[str, Any], *, shift: Tensor, name: str = "") -> Tensor:
        if shift.shape[1] != 4:
            raise ValueError("four, please")
        return super().forward(batch["pair"][1], batch["right"]) + shift * batch["pair"][0]


def test_inputs_are_the_models_own() -> None:
    expected = {
        "Plain": ["x"], "TwoInputs": ["left", "right"], "DictInput": ["left", "right"], "NestedInput": ["batch"],
        "OptionalGiven": ["x", "mask", "double"], "OptionalByName": ["x", "scale"], "PairArgument": ["x"],
        "StarArguments": ["inputs_0", "inputs_1"], "GatesArgument": ["left", "fxpath_gates"], "ChunkInPlace": ["x"],
    }  # fmt: skip
    for name, names in expected.items():
        module = traced(name).export(some(traced(name), 1))
        found = inspect.signature(module.forward).parameters
        assert list(found) == names
        fixed = {name: each.default for name, each in found.items() if each.default is not inspect.Parameter.empty}
        assert fixed == {"OptionalGiven": {"double": True}, "OptionalByName": {"scale": 2.0}}.get(name, {})
    x = {
        "shift": torch.randn(3, 4),
        "batch": {"right": torch.randn(3, 4), "pair": (torch.randn(3, 1), torch.randn(3, 3), 2.5)},
        "name": "any",
    }
    network = fxpath.trace(ShapeChecked().eval(), x)
    assert network.traced.tracer == "torch.export"
    module = require_equal(network, some(network, 3), x, None)
    assert list(inspect.signature(module.forward).parameters) == ["batch", "shift", "name"]


Pair = namedtuple("Pair", ["last", "first"])


@dataclass
class Answer:
    """What many libraries give."""

    logits: Tensor
    hidden: Any = None
    loss: Tensor | None = None


torch.export.register_dataclass(Answer)


@pytest.mark.parametrize("checked", [False, True], ids=["symbolic_trace", "torch.export"])
def test_outputs_have_the_models_structure(checked: bool) -> None:
    class Structured(MLP):
        kind = ""

        def forward(self, x: Tensor) -> Any:
            if checked and x.shape[1] != 4:
                raise ValueError("four, please")
            h = self[1](self[0](x))
            y = self[4](self[3](self[2](h)))
            if self.kind == "dataclass":
                return Answer(y, hidden=(h, {"twice": 2 * h}))
            return Pair({"y": [y, None]}, (h,)) if self.kind == "namedtuple" else {"y": y, 3: [h, (y,)]}

    x = torch.randn(3, 4)
    for kind in ("dict", "namedtuple", "dataclass"):
        model = Structured().eval()
        model.kind = kind
        network = fxpath.trace(model, x)
        assert (network.traced.tracer == "torch.export") == checked
        pathways = some(network, 3)
        module = network.export(pathways)
        with network.masked(pathways):
            expected = network(x)
        if kind == "dataclass":
            expected = {"logits": expected.logits, "hidden": expected.hidden}
        if kind == "namedtuple":
            expected = tuple(expected)
        require_plain(module)
        assert "Answer" not in module.code
        assert "Pair" not in module.code
        assert type(module(x)) is type(expected)
        require_same(module(x), expected)
        require_same(torch.load(saved(module), weights_only=False)(x), expected)


def test_leaves_of_ones_own_stay_themselves() -> None:
    network = traced("CustomLeaf")
    module = network.export(some(network, 1))
    assert type(module.act) is SquaredReLU
    assert module.act is not network._module.act


@fx.wrap
def bent(x: Tensor) -> Tensor:
    """A function that no tracer looks into: it branches on values."""
    return x / 2 if x.sum() > 0 else x / 3


@pytest.mark.parametrize("normed", [weight_norm, spectral_norm])
def test_what_torch_cannot_save_runs(normed: Callable[[nn.Module], nn.Module]) -> None:
    """Parametrized layers, which torch keeps as state_dict or exported program alone."""
    model = nn.Sequential(normed(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 3)).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    network = fxpath.trace(model, x)
    pathways = some(network, 3)
    module = network.export(pathways, at=x)
    with network.frozen(pathways, at=x):
        require_same(answered(module, x), answered(network, x))
        require_same_slopes(model, network, module, x)
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
        saved(module)
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (x,)), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), module(x))


def test_functions_of_ones_own_stay_themselves() -> None:
    class Bends(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return bent(super().forward(x))

    x = torch.randn(3, 4)
    network = fxpath.trace(Bends().eval(), x)
    module = require_equal(network, some(network, 3), x, x)
    assert bent in [node.target for node in torch.load(saved(module), weights_only=False).graph.nodes]


def test_hooks_of_the_model_stay() -> None:
    case = BY_NAME["Norms"]
    model = case.model()
    model.attention.register_forward_hook(lambda module, given, output: (output[0].cumsum(1), output[1]))
    network = case.trace(model)
    pathways, x = some(network, 3), case.x()
    module = network.export(pathways)
    with network.masked(pathways):
        assert torch.equal(module(x), network(x))


# --- gradients and code of the model's own ---


class Rectified(torch.autograd.Function):
    """A rectifier whose own gradient is not the derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return slopes[0] * torch.where(x > 0, 1.0, ctx.slope), None


class Twin(torch.autograd.Function):
    """Another of the same name, of two tensors in a tuple."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.round(), x.sign()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return slopes[0] + 3 * slopes[1]


Twin.__name__ = "Rectified"


def test_autograd_functions_keep_their_gradient() -> None:
    class Own(MLP):
        def forward(self, x: Tensor) -> Tensor:
            h = Rectified.apply(self[1](self[0](x)) - 0.2, 0.5)
            rounded, signs = Twin.apply(self[2](h))
            return Rectified.apply(self[4](self[3](rounded + signs)), 0.25)

    model, x = Own().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    network = fxpath.trace(model, x)
    assert network.traced.tracer == "symbolic_trace"
    pathways = some(network, 3, share=0.9)
    module = require_equal(network, pathways, x, x)
    with network.frozen(pathways, at=x):
        require_same_slopes(model, network, module, x)
        assert answered(network, x)[1][0].any()  # type: ignore[union-attr]


def test_gradients_stop_where_the_models_do() -> None:
    """Tensors, tuples of them and numbers that are made without gradients."""

    class Stops(MLP):
        def forward(self, x: Tensor) -> Tensor:
            h = self[1](self[0](x))
            with torch.no_grad():
                turned = torch.roll(h, 1, 1)
                parts, width, (first, last) = h.chunk(3, 1), h.size(1), torch.aminmax(h, dim=1, keepdim=True)
            h = h * turned + torch.cat(parts, 1) / width + parts[0][:, :1] * (last - first)
            return self[4](self[3](self[2](h)))

    model, x = Stops().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    with pytest.warns(TraceWarning, match="the gradient stops"):
        network = fxpath.trace(model, x)
    pathways = some(network, 3, share=0.9)
    module = require_equal(network, pathways, x, x)
    with network.frozen(pathways, at=x):
        require_same_slopes(model, network, module, x)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_the_graph_calls_are_refused(kind: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), nn.Linear(5, 3)).eval()
    seen: list[Any] = []
    x = torch.randn(3, 4)
    handle = getattr(model[0], kind)(lambda *given: seen.append(given[-1]))
    network = fxpath.trace(model, x)
    seen.clear()
    with pytest.raises(ModelError, match=r"export: 0 has forward hooks or pre-hooks.*remove them before.*leaves=\("):
        network.export(some(network, 1))
    assert not seen
    leaf = fxpath.trace(nn.Sequential(model, nn.ReLU()).eval(), x, leaves=nn.Sequential)  # the other way out
    assert torch.equal(leaf.export(fxpath.Pathways(torch.ones(1, 3, dtype=torch.bool), leaf.index))(x), leaf(x))
    handle.remove()
    network = fxpath.trace(model, x)
    require_equal(network, some(network, 1), x, None)


def test_fixed_branches_are_not_checked() -> None:
    """A restricted network keeps the example's branches."""

    class Asking(DataBranch):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.conv(x))
            if h.sum() > 0:
                h = h * int((h > 0).any()) * 2
            return self.head(h)

    model, x = Asking().double().eval(), image(3)
    with pytest.warns(TraceWarning, match="a branch is fixed"):
        network = fxpath.trace(model, x, fix_branches=True)
    pathways = some(network, 3)
    module = require_equal(network, pathways, x, x)
    called = [str(node.target) for node in module.graph.nodes]
    assert not [name for name in called if "gt" in name or "any" in name]
    with network.frozen(pathways, at=x):
        require_same_slopes(model, network, module, x)
    nothing = fxpath.Pathways(torch.zeros(1, network.index.size, dtype=torch.bool), network.index)
    require_equal(network, nothing, x, None)


def test_a_response_within_the_network() -> None:
    """Of a layer whose rows are folded into the batch, which the network's output unfolds."""

    class Checked(BY_NAME["BatchFolded"].build):  # type: ignore[misc,name-defined]
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 3:
                raise ValueError("three rows, please")
            return super().forward(x)  # type: ignore[no-any-return]

    case = BY_NAME["BatchFolded"]
    response = fxpath.responses.neuron("relu_1", (2, 1))
    for model, tracer in ((case.model(), "symbolic_trace"), (Checked().double().eval(), "torch.export")):
        network = fxpath.trace(model, case.x(), response=response)
        assert network.traced.tracer == tracer
        module = require_equal(network, some(network, 3), case.x(3, seed=5), case.x(3))
        assert module(case.x(3)).shape == (3, 3, 3)


@dataclass
class Strict:
    """An answer that looks at what it is made of."""

    logits: Any
    probability: Any = None

    def __post_init__(self) -> None:
        if self.probability is None:
            self.probability = self.logits.softmax(1)
        if len(self.logits.shape) != 2:
            raise ValueError("two axes, please\nnot more")


torch.export.register_dataclass(Strict)


def test_what_has_no_plain_form() -> None:
    class Answers(MLP):
        def forward(self, x: Tensor) -> Any:
            if x.shape[1] != 4:
                raise ValueError("four, please")
            return Strict(super().forward(x))

    x = torch.randn(3, 4)
    network = fxpath.trace(Answers().eval(), x, response=fxpath.responses.Logit(output="logits"))
    with pytest.raises(
        ModelError, match=r"^export: the output of Answers has no plain form: .*; trace a module around"
    ) as caught:
        network.export(some(network, 1))
    assert "\n" not in str(caught.value)
    assert network._restriction is None


# --- everything that can be wrong ---


def test_one_pathway_for_any_batch_or_one_a_sample() -> None:
    for name in ("Plain", "BatchFolded"):
        network, case = traced(name), BY_NAME[name]
        single = network.export(some(network, 1), at=case.x(1))
        assert [single(case.x(batch)).shape[0] for batch in (1, 2, 5)] == [1, 2, 5]
        for module in (
            network.export(some(network, 3)),
            network.export(some(network, 1), at=case.x(3)),
            torch.load(saved(network.export(some(network, 3))), weights_only=False),
        ):
            assert module(case.x(3)).shape[0] == 3
            for batch in (1, 2):
                with pytest.raises(
                    AssertionError, match="restricted to 3 pathways, one a sample: expected a batch of 3"
                ):
                    module(case.x(batch))


def test_what_does_not_fit() -> None:
    network, x = traced("MLP"), BY_NAME["MLP"].x()
    pathways = some(network, 3)
    with unchanged(network._module):
        with pytest.raises(RestrictionError, match="they are of another index"):
            network.export(some(traced("Plain"), 1))
        with pytest.raises(RestrictionError, match="they are on meta, the model on cpu"):
            network.export(fxpath.Pathways(pathways.mask.to("meta"), network.index))
        with pytest.raises(RestrictionError, match="expected Pathways, found Tensor"):
            network.export(pathways.mask)
        with pytest.raises(RestrictionError, match="there are 3 pathways and 2 samples"):
            network.export(pathways, at=x[:2])
        with pytest.raises(fxpath.FxpathError, match=r"expected inputs \(B, 4\)"):
            network.export(pathways, at=x[:, :3])
        for restricted in (network.masked(pathways), network.frozen(pathways, at=x)):
            with restricted, pytest.raises(RestrictionError, match="it is restricted already; leave the outer with"):
                network.export(pathways)
        assert network._restriction is None


def test_training_mode_is_refused() -> None:
    case = BY_NAME["Plain"]
    model = case.model()
    network = case.trace(model)
    model.conv2.train()
    with pytest.raises(ModelError, match=r"in training mode since it was traced; call model\.eval\(\)"):
        network.export(some(network, 1))
    assert network._restriction is None
    model.conv2.eval()
    network.export(some(network, 1))


def test_what_cannot_be_copied() -> None:
    class Holder(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copies\nof this")

    model = nn.Sequential(Holder(4, 3), nn.ReLU()).eval()
    network = fxpath.trace(model, torch.randn(2, 4), leaves=(Holder,))
    with pytest.raises(ModelError, match="export: a part of Sequential cannot be copied: RuntimeError: no copies;"):
        network.export(some(network, 1))


def test_in_inference_mode() -> None:
    """Buffers made in inference mode would be of no use to a later gradient."""
    case = BY_NAME["Plain"]
    with torch.inference_mode():
        network, x = traced("Plain"), case.x()
        module = network.export(some(network, 3), at=x)
    assert not any(tensor.is_inference() for tensor in module.state_dict().values())
    answered(module, case.x())


def test_arguments_are_counted_through_all_inputs() -> None:
    def forward(first: Any, *rest: Any, scale: float = 1, **more: Any) -> None: ...

    x = torch.ones(1)
    signature = inspect.signature(forward)
    assert Samples((x, x, {"a": x, "b": "no tensor"})).places(signature) == {
        "first": 0, "rest_0": 1, "rest_1": {"a": 2, "b": None},
    }  # fmt: skip
    found = Samples({"late": x, "scale": 2.0, "first": [x, x]}).places(signature)
    assert list(found.items()) == [("first", [2, 3]), ("scale", None), ("late", 0)]


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, double: bool = False, *more: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(x))) * (2 if double else 1)


class Bound(Flagged):
    def forward(self, x: Tensor, double: bool = False) -> Tensor:  # type: ignore[override]
        return super().forward(x, double)


@pytest.mark.parametrize("kind", [Bound, Flagged])
def test_arguments_that_are_no_tensors_are_taken_with_their_value(kind: type[Flagged]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 4)
    example = {"x": x, "double": True}
    network = fxpath.trace(model, example)
    module = network.export(fxpath.NeuronMCT().scores(network, example).pathways(0.2), at=example)
    assert torch.equal(module(**example), model(**example))
    assert torch.equal(module(x), model(**example)), "and may be left out"
    with pytest.raises(AssertionError, match="double: expected True, as in the example"):
        module(x=x, double=False)


class Positions(nn.Module):
    """Tables of positions and of a causal mask, cut to the length of what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("places", torch.randn(1, 10, 4))
        self.register_buffer("causal", torch.ones(10, 10).tril().bool())
        self.register_buffer("order", torch.arange(10).unsqueeze(0))
        self.embed = nn.Embedding(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        length = x.size(1)
        h = F.relu(self.fc(x + self.places[:, :length] + self.embed(self.order[:, :length])))
        attention = (h @ h.mT).masked_fill(~self.causal[:length, :length], -1e9).softmax(-1)
        return self.head((attention @ h).mean(1))


class PositionsExported(Positions):
    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("kind", [Positions, PositionsExported], ids=["symbolic_trace", "torch.export"])
def test_tables_that_are_cut_to_a_length_can_be_loaded(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = kind().double().eval(), torch.randn(2, 5, 4, dtype=torch.float64)
    network = fxpath.trace(model, x)
    module = network.export(fxpath.NeuronMCT().scores(network, x).pathways(0.5), at=x)
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    assert torch.equal(loaded(x), model(x))
    assert [name for name, tensor in loaded.named_parameters() if tensor.requires_grad] == [
        name for name, tensor in module.named_parameters() if tensor.requires_grad
    ]
