"""Guided backpropagation and GradCAM against hand-written ones, and what captum alone would make of such networks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import GuidedBackprop as CaptumsGuided
from footprint import unchanged
from networks import BY_NAME, CASES, Case, Head, image, trace_any, traced
from test_patterns import RECTIFIERS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fxpath
from fxpath.errors import InputError, ModelError, SiteError
from fxpath.images import load_images
from fxpath.methods import parse_method
from fxpath.methods.hooked import GradCAM, GuidedBackprop
from fxpath.responses import neuron
from fxpath.samples import Samples
from fxpath.zoo import load_model

SINGLE = [case for case in CASES if isinstance(case.x(1), Tensor)]
BROKEN = {"ResidualOntoReLU", "ChunkInPlace"}  # torch cannot differentiate the module


# --- guided backpropagation, written out ----------------------------------------------------------------------------


class Guided(torch.autograd.Function):
    """A rectifier that lets no negative gradient pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float) -> Tensor:
        ctx.save_for_backward((x > 0) & (x < top))
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (on,) = ctx.saved_tensors
        return slopes[0].clamp(min=0) * on, None


def top_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """Where a rectifier ends, None for other functions."""
    if name in ("relu", "threshold"):
        return torch.inf
    if name == "relu6":
        return 6.0
    low, high = {"hardtanh": ("min_val", "max_val"), "clamp": ("min", "max")}.get(name, ("", ""))
    given = dict(zip((low, high), args, strict=False)) | kwargs
    if not low or given.get(low) != 0:
        return None
    return torch.inf if given.get(high) is None else float(given[high])


class GuidedRectifiers(TorchFunctionMode):
    """Within, every rectifier that a module calls is a guided one, in place or not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        top = top_of(name.strip("_"), args[1:], kwargs)
        if top is None:
            return func(*args, **kwargs)
        self.calls += 1
        found = Guided.apply(args[0], top)
        in_place = kwargs.get("inplace") or (name.endswith("_") and not name.endswith("__"))
        return args[0].copy_(found) if in_place else found


def guided(model: nn.Module, network: fxpath.Network, x: Any) -> tuple[Tensor, int]:
    """The map by the untraced model, and how many rectifiers it called."""
    samples, target = network.samples(x), network.original(x).target
    given = samples.map(lambda leaf: leaf.clone().requires_grad_())
    inputs = given.map(lambda leaf: leaf * 1)
    with GuidedRectifiers() as rectifiers:
        value = network.response(model(*inputs.args, **inputs.kwargs), target)
    (leaf,) = given.tensors
    if not value.requires_grad:
        return torch.zeros_like(leaf), rectifiers.calls
    return torch.autograd.grad(value.sum(), leaf, allow_unused=True, materialize_grads=True)[0], rectifiers.calls


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.name)
def test_guided_backprop_of_any_network(case: Case) -> None:
    """Reused, in-place and functional rectifiers, residuals, bounded ones: as if each were a guided one."""
    model = case.model()
    network, x = case.trace(model), case.x(3)
    if case.name in ("Leaky", "Smooth"):
        with pytest.raises(
            ModelError, match=r"no rectifier .*in this network, whose sites are acts\.0, .*the gradient"
        ):
            GuidedBackprop().attribute(network, x)
        return
    with unchanged(model, network._module):
        found = GuidedBackprop().attribute(network, x)
    if case.name in BROKEN:
        with pytest.raises(RuntimeError):
            guided(model, network, x)
        assert bool(found.isfinite().all())
        return
    expected, calls = guided(model, network, x)
    assert calls == len(network.sites)
    assert torch.equal(found, expected)


DIFFERENT = ("ReusedReLU", "ReusedInPlaceReLU", "Functional", "ResidualIadd", "Depthwise", "MLP")


def test_guided_backprop_is_not_the_gradient() -> None:
    """The networks of this file tell the two apart."""
    for name in DIFFERENT:
        network, x = traced(name), BY_NAME[name].x(3)
        plain = fxpath.attribution.input_gradient(network, x)
        found = GuidedBackprop().attribute(network, x)
        assert float((found - plain).abs().max()) > 0.01 * float(plain.abs().max()), name
        assert bool(found.any()), name


class PreActivation(Head):
    """What an in-place ReLU is given is read by the skip connection, too."""

    def __init__(self, *, by_hand: bool = False) -> None:
        super().__init__(3)
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu, self.last = nn.ReLU(), nn.ReLU()
        self.by_hand = by_hand

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv1(x)
        a = Guided.apply(z, torch.inf) if self.by_hand else self.relu(z)
        z = z + self.conv2(a)
        return self.head(Guided.apply(z, torch.inf) if self.by_hand else self.last(z))


def pre_activation() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The network, an input, its classes, and the map by a twin of hand-written rectifiers."""
    torch.manual_seed(2)
    model, twin = PreActivation().double().eval(), PreActivation(by_hand=True).double().eval()
    twin.load_state_dict(model.state_dict())
    x = image(3)
    target = model(x).argmax(1)
    given = x.clone().requires_grad_()
    expected = torch.autograd.grad(twin(given).gather(1, target[:, None]).sum(), given)[0]
    return model, x, target, expected


def test_guided_backprop_where_a_preactivation_is_read_twice() -> None:
    model, x, _, expected = pre_activation()
    assert torch.equal(GuidedBackprop().attribute(fxpath.trace(model, x), x), expected)


def captums(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CaptumsGuided(model).attribute(x.clone().requires_grad_(), target=target)


def test_why_hooks_go_to_modules_of_our_own() -> None:
    """On the models themselves captum's own method is wrong, and says nothing.

    It does not see functional and bounded rectifiers; its hook on what a ReLU is given changes the gradient of all that
    read that tensor; and it hands an in-place ReLU a copy, so that others read what should have been overwritten.
    """
    model, x, target, expected = pre_activation()
    assert not torch.allclose(captums(model, x, target), expected)
    for name in ("Functional", "Depthwise", "InPlaceReadAgain", "Rectifiers"):
        model, x = BY_NAME[name].model(), BY_NAME[name].x(3)
        network = BY_NAME[name].trace(model)
        found = captums(model, x, network.original(x).target)
        assert float((found - guided(model, network, x)[0]).abs().max()) > 1e-3 * float(found.abs().max()), name


def test_hooks_never_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["ReusedInPlaceReLU"]
    model = case.model()
    network, x = case.trace(model), case.x(2)
    hooked: list[nn.Module] = []
    for name in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        plain = getattr(nn.Module, name)

        def register(self: nn.Module, *args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            hooked.append(self)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(nn.Module, name, register)
    for method in (GuidedBackprop(), GradCAM()):
        hooked.clear()
        method.attribute(network, x)
        assert hooked
        assert not {*map(id, hooked)} & {id(part) for root in (model, network._module) for part in root.modules()}


# --- all forms of rectifiers ----------------------------------------------------------------------------------------


class Formed(nn.Module):
    """Two rectifiers of one form; `by_hand` with the guided rule, f'(x) · max(0, gradient)."""

    def __init__(self, form: Callable[[Tensor], Tensor], *, by_hand: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)
        self.form, self.by_hand = form, by_hand

    def rectify(self, x: Tensor) -> Tensor:
        return ByRule.apply(x, self.form) if self.by_hand else self.form(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.rectify(self.fc2(self.rectify(4 * self.fc1(x)))))


class ByRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            given = x.detach().requires_grad_()
            found = form(given)
            ctx.save_for_backward(*torch.autograd.grad(found.sum(), given))
        return found.detach()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0].clamp(min=0) * ctx.saved_tensors[0], None


def forms() -> dict[str, Callable[[Tensor], Tensor]]:
    modules = {str(each): each for each in (nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0, 0.5), nn.Threshold(0, 0))}
    aten = {
        "aten relu": torch.ops.aten.relu.default, "aten clamp_min": lambda x: torch.ops.aten.clamp_min.default(x, 0),
        "aten hardtanh": lambda x: torch.ops.aten.hardtanh.default(x, 0, 2),
        "method": lambda x: x.relu(), "clip": lambda x: x.clip(0, 3), "function": F.relu,
    }  # fmt: skip
    return {**RECTIFIERS, **modules, **aten}


@pytest.mark.parametrize("name", forms())
def test_guided_backprop_of_any_form(name: str) -> None:
    torch.manual_seed(6)
    form = forms()[name]
    model, twin = Formed(form).double().eval(), Formed(form, by_hand=True).double().eval()
    twin.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(4, 5, dtype=torch.float64)
    network = trace_any(model, x)
    if name == "times heaviside of copies":
        with pytest.raises(ModelError, match=r"guided_backprop: .*torch cannot differentiate aten::heaviside"):
            GuidedBackprop().attribute(network, x)
        return
    found = GuidedBackprop().attribute(network, x)
    given = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(twin(given).amax(1).sum(), given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert bool(found.any())
    assert not torch.allclose(found, fxpath.attribution.input_gradient(network, x))


def test_what_torch_cannot_differentiate_is_said() -> None:
    class Fused(nn.Module):
        """A linear layer and its ReLU in one operation, which has no derivative."""

        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch._addmm_activation(self.fc.bias, x, self.fc.weight.t()))

    x = torch.randn(4, 5, 1)[:, :, 0]
    network = fxpath.trace(Fused().eval(), x)
    assert [site.op for site in network.sites] == ["addmm_activation"]
    everything = fxpath.Pathways(torch.ones((1, 6), dtype=torch.bool), network.index)
    calls: dict[str, Callable[[], Any]] = {
        text: partial(parse_method(text).attribute, network, x)
        for text in ("gradient", "input_mct", "input_intgrad", "smooth_grad", "guided_backprop")
    } | {"pathway_gradient": lambda: fxpath.pathway_gradient(network, x, everything)}
    for name, call in calls.items():
        said = "input_gradient" if name == "gradient" else name
        with pytest.raises(ModelError, match=rf"^{said}: the model has no gradient: .*differentiate aten::_addmm_act"):
            call()
    with pytest.raises(ModelError, match=r"pathway_gradient: the model has no gradient"):
        fxpath.pathway_gradient(network, x, everything, wrt="t")


def test_rectifiers_that_are_no_sites_are_guided_all_the_same() -> None:
    for name in ("ReusedInPlaceReLU", "Functional", "ResidualIadd", "OperatorForms", "Concat"):
        case = BY_NAME[name]
        model, x = case.model(), case.x(2)
        expected = GuidedBackprop().attribute(case.trace(model), x)
        for chosen in case.sites:
            network = case.trace(model, sites=chosen)
            code = network._module.code
            with unchanged(model, network._module):
                assert torch.equal(GuidedBackprop().attribute(network, x), expected)
            assert network._module.code == code
            assert len(network.sites) == 1
    case = BY_NAME["Plain"]
    network = case.trace(sites="conv1")  # no activation is a site
    assert torch.equal(
        GuidedBackprop().attribute(network, case.x(2)), GuidedBackprop().attribute(case.trace(), case.x(2))
    )
    hidden = case.trace(response=neuron("conv2", channel=1))  # the graph ends there
    given = case.x(2).requires_grad_()
    model = case.model()
    h = model.conv2(Guided.apply(model.conv1(given), torch.inf))
    (expected,) = torch.autograd.grad(h[:, 1].mean((1, 2)).sum(), given)
    torch.testing.assert_close(GuidedBackprop().attribute(hidden, case.x(2)), expected, rtol=1e-12, atol=1e-15)


def test_smooth_activations_beside_rectifiers_keep_their_gradient() -> None:
    class Mixed(nn.Module):
        def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3, self.relu = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), relu

        def forward(self, x: Tensor) -> Tensor:
            return self.fc3(F.hardswish(self.fc2(self.relu(F.gelu(self.fc1(x))))))

    torch.manual_seed(0)
    model, twin = Mixed(F.relu).double().eval(), Mixed(lambda x: Guided.apply(x, torch.inf)).double().eval()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(3, 4, dtype=torch.float64)
    given = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(twin(given).amax(1).sum(), given)
    for sites in ("rectifiers", "activations"):
        found = GuidedBackprop().attribute(trace_any(model, x, sites=sites), x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


class Holding(nn.Module):
    """A block that a user asks to be passed over."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), act

    def forward(self, x: Tensor) -> Tensor:
        found = self.act(self.fc(x))
        return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize(
    "act",
    [nn.ReLU(), nn.ReLU6(inplace=True), nn.Hardtanh(0, 1), nn.Threshold(0, 0), nn.RNNCell(4, 4, nonlinearity="relu")],
    ids=str,
)
def test_rectifiers_within_leaves_are_refused(act: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Holding(act), nn.Linear(4, 3)).eval()
    x = torch.randn(2, 4)
    said = r"guided_backprop: 2 \(Holding\) is called as a whole and rectifies within \(act\)"
    with pytest.raises(ModelError, match=said):
        GuidedBackprop().attribute(fxpath.trace(model, x, leaves=Holding), x)
    with pytest.raises(ModelError, match=said):
        GuidedBackprop().attribute(trace_any(model, x, sites=[Holding]), x)
    if not isinstance(act, nn.RNNCell):
        GuidedBackprop().attribute(fxpath.trace(model, x), x)


def test_leaves_that_do_not_rectify_are_not_refused() -> None:
    for act in (nn.GELU(), nn.Hardtanh(-1, 1), nn.Threshold(0.5, 0), nn.RNNCell(4, 4)):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Holding(act), nn.Linear(4, 3)).eval()
        x = torch.randn(2, 4)
        found = GuidedBackprop().attribute(fxpath.trace(model, x, leaves=Holding), x)
        assert bool(found.isfinite().all())


@pytest.mark.filterwarnings("ignore::fxpath.errors.TraceWarning")
def test_torchscript_and_recurrent_rectifiers_are_refused() -> None:
    x = torch.randn(2, 3, 4)
    recurrent = Holding(nn.RNN(4, 4, nonlinearity="relu", batch_first=True))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), recurrent, nn.Flatten(), nn.Linear(12, 3)).eval()
    with pytest.raises(ModelError, match=r"2\.act_1 is called as a whole and rectifies within \(rnn_relu\)"):
        GuidedBackprop().attribute(fxpath.trace(model, x), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), script, nn.Linear(4, 3)).eval()
    with pytest.raises(ModelError, match=r"2 \(.*\) is called as a whole and rectifies within \(1\)"):
        GuidedBackprop().attribute(fxpath.trace(model, x[:, 0]), x[:, 0])


def test_rectifiers_of_frozen_parts_are_passed_over() -> None:
    """Where no gradient comes back captum cannot set its hooks."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc3(F.relu(self.fc1(x.detach())) * F.relu(self.fc2(x)))

    torch.manual_seed(0)
    model, x = Constant().double().eval().requires_grad_(False), torch.randn(3, 4, dtype=torch.float64)
    network = fxpath.trace(model, x)
    assert torch.equal(GuidedBackprop().attribute(network, x), guided(model, network, x)[0])


# --- GradCAM --------------------------------------------------------------------------------------------------------


def cam(a: Tensor, value: Tensor, size: tuple[int, ...], *, rectify: bool = True, mode: str = "bilinear") -> Tensor:
    """GradCAM, written out, of activations with the channels first."""
    (slopes,) = torch.autograd.grad(value.sum(), a)
    weights = slopes.flatten(2).mean(2)
    coarse = torch.einsum("bc,bcp->bp", weights, a.detach().flatten(2)).view(len(a), 1, *a.shape[2:])
    return F.interpolate(coarse.clamp(min=0) if rectify else coarse, size=size, mode=mode)


def test_grad_cam_of_each_site() -> None:
    case = BY_NAME["Plain"]
    model, x = case.model(), case.x(3)
    network, target = case.trace(model), model(x).argmax(1)[:, None]
    one = model.relu1(model.conv1(x)).detach().requires_grad_()
    two = model.relu2(model.conv2(one)).detach().requires_grad_()
    for site, a in (("relu1", one), ("relu2", two)):
        for rectify in (True, False):
            last = a if a is two else model.relu2(model.conv2(a))
            expected = cam(a, model.head(last).gather(1, target), (5, 5), rectify=rectify)
            with unchanged(model, network._module):
                found = GradCAM(site, rectify=rectify).attribute(network, x)
            assert found.shape == (3, 1, 5, 5)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
            assert bool((found < 0).any()) == (not rectify and site == "relu1")
            assert bool(found.any())
    default, last = GradCAM().attribute(network, x), GradCAM("relu2").attribute(network, x)
    assert torch.equal(default, last)
    assert not torch.allclose(GradCAM("relu1").attribute(network, x), last)


def test_grad_cam_of_calls_of_one_module() -> None:
    """Each call is a layer of its own, in place or not; the second one's gradient passes no first one's."""
    case = BY_NAME["ReusedInPlaceReLU"]
    model, x = case.model(), case.x(2)
    network, target = case.trace(model), case.model()(x).argmax(1)[:, None]
    one = F.relu(model.bn(model.conv1(x))).detach().requires_grad_()
    two = F.relu(model.conv2(one))
    value = model.head(two).gather(1, target)
    torch.testing.assert_close(
        GradCAM("relu", rectify=False).attribute(network, x), cam(one, value, (5, 5), rectify=False), rtol=1e-12, atol=0
    )
    two = two.detach().requires_grad_()
    torch.testing.assert_close(
        GradCAM(rectify=False).attribute(network, x),
        cam(two, model.head(two).gather(1, target), (5, 5), rectify=False), rtol=1e-12, atol=0,
    )  # fmt: skip


class ChannelsLast(nn.Module):
    """As ConvNeXt and Swin have it: linear layers on the last axis; then tokens, then nothing in space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(2, 3, 2), nn.Linear(3, 6), nn.Linear(6, 3)
        self.token, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(F.relu(self.up(self.stem(x).permute(0, 2, 3, 1))))
        h = F.relu(self.token(h.flatten(1, 2)))
        return self.head(F.relu(h.mean(1)))


def test_grad_cam_of_channels_last() -> None:
    torch.manual_seed(0)
    model, x = ChannelsLast().double().eval(), torch.randn(3, 2, 6, 8, dtype=torch.float64)
    network = fxpath.trace(model, x)
    assert [(site.shape, site.axis) for site in network.sites] == [((5, 7, 6), 2), ((35, 5), 1), ((5,), 0)]
    a = F.relu(model.up(model.stem(x).permute(0, 2, 3, 1))).movedim(3, 1).detach().requires_grad_()
    last = F.relu(model.token(model.down(a.movedim(1, 3)).flatten(1, 2)).clone()).mean(1)
    value = model.head(F.relu(last)).gather(1, model(x).argmax(1)[:, None])
    found = GradCAM(rectify=False).attribute(network, x)
    assert found.shape == (3, 1, 6, 8)
    torch.testing.assert_close(found, cam(a, value, (6, 8), rectify=False), rtol=1e-12, atol=1e-15)
    with pytest.raises(
        SiteError, match=r"grad_cam:site=relu_1: .*2 axes in space, found relu_1 \(35, 5\); such are relu$"
    ):
        GradCAM("relu_1").attribute(network, x)
    with pytest.raises(SiteError, match=r"there is no site 'rele'; nearest: relu"):
        GradCAM("rele").attribute(network, x)


def test_grad_cam_of_one_axis_in_space() -> None:
    case = BY_NAME["Conv1d"]
    model, x = case.model(), case.x(2)
    a = model.body[:3](x).detach().requires_grad_()
    value = model.fc(model.body[3](a).flatten(1)).gather(1, model(x).argmax(1)[:, None])
    found = GradCAM().attribute(case.trace(model), x)
    torch.testing.assert_close(found, cam(a, value, (6,), mode="linear"), rtol=1e-12, atol=1e-15)


def test_sites_that_grad_cam_takes() -> None:
    """The last one in space that leads to the response; not one of single pixels, nor a dead end, nor a fold."""
    for name, expected in (
        ("SqueezeExcitation", "relu_2"),
        ("Unused", "relu_2"),
        ("Concat", "relu_2"),
        ("Functional", "relu_1"),
    ):
        network, x = traced(name), BY_NAME[name].x(2)
        assert torch.equal(GradCAM().attribute(network, x), GradCAM(expected).attribute(network, x))
    for name, site, found in (
        ("SqueezeExcitation", "relu_1", r"relu_1 \(2, 1, 1\); such are relu, relu_2$"),
        ("Unused", "relu_1", r"relu_1 \(2, 3, 3\); such are relu_2$"),
        ("Functional", "relu_2", r"relu_2 \(27,\); such are relu, relu_1$"),
    ):
        said = rf"expected a site that leads to the response, with channels and 2 axes in space, found {found}"
        with pytest.raises(SiteError, match=said):
            GradCAM(site).attribute(traced(name), BY_NAME[name].x(2))

    class Ending(Head):
        """The last site is a pixel for each channel."""

        def __init__(self) -> None:
            super().__init__(3)
            self.conv = nn.Conv2d(2, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.conv(x))
            return self.head(F.relu(h.mean((2, 3), keepdim=True) - 0.01))

    network, x = fxpath.trace(Ending().double().eval(), image(2)), image(2)
    assert torch.equal(GradCAM().attribute(network, x), GradCAM("relu").attribute(network, x))


class Rows(nn.Module):
    """Each row of an image is folded into the batch, so that a site's block has three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(2, 3, 3), nn.Linear(45, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x.transpose(1, 2).flatten(0, 1)))
        return self.fc(h.reshape(x.shape[0], -1))


def test_networks_without_a_site_for_grad_cam() -> None:
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.ReLU(), nn.Linear(6, 4)).double().eval()
    for model, shown in (
        (flat, r"2 \(6,\)"),
        (Rows().double().eval(), r"relu \(5, 3, 3\), 5 rows of which are folded"),
    ):
        network = fxpath.trace(model, image(2))
        with pytest.raises(
            SiteError, match=rf"grad_cam: no site of this network has .*2 axes in space.*{shown}.*sites=…"
        ):
            GradCAM().attribute(network, image(2))
    with pytest.raises(SiteError, match=r"found relu \(5, 3, 3\), 5 rows of which are folded into the batch$"):
        GradCAM("relu").attribute(network, image(2))
    with pytest.raises(InputError, match=r"grad_cam: expected inputs \(B, C, H, W\), .*found \(2, 4\)"):
        GradCAM().attribute(traced("MLP"), BY_NAME["MLP"].x(2))
    chosen = BY_NAME["Plain"].trace(sites="conv2")  # the way out
    assert bool(GradCAM(rectify=False).attribute(chosen, image(2)).any())


class Detached(Head):
    """No gradient comes back to the first site, though the response depends on it."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)).detach())))


def test_grad_cam_is_zero_where_no_gradient_comes_back() -> None:
    x = image(2)
    for model in (Detached(), Detached().requires_grad_(False)):
        network = fxpath.trace(model.double().eval(), x)
        assert not bool(GradCAM("relu", rectify=False).attribute(network, x).any())
        assert bool(GradCAM("relu_1", rectify=False).attribute(network, x).any())
    network = traced("Break")  # rounded
    assert not bool(GradCAM("relu", rectify=False).attribute(network, x).any())
    assert bool(GradCAM("relu_2", rectify=False).attribute(network, x).any())


# --- photos ---------------------------------------------------------------------------------------------------------


def photographs(name: str) -> tuple[nn.Module, fxpath.Network, Tensor, Tensor]:
    loaded = load_model(f"zoo:{name}")
    data = load_images("foolbox:imagenet", loaded.preprocess, classes=loaded.classes, limit=2)
    x = torch.stack([data[row][0] for row in range(2)])
    with torch.no_grad():
        return loaded.model, fxpath.trace(loaded.model, x), x, loaded.model(x).argmax(1)


@pytest.mark.parametrize("name", ["squeezenet1_1", "efficientnet_lite0"])
def test_guided_backprop_of_photos(name: str) -> None:
    model, network, x, _ = photographs(name)
    found = GuidedBackprop().attribute(network, Samples(x))
    expected, calls = guided(model, network, x)
    assert calls == len(network.sites) == {"squeezenet1_1": 26, "efficientnet_lite0": 33}[name]
    assert torch.equal(found, expected)


def test_grad_cam_of_photos() -> None:
    model, network, x, target = photographs("squeezenet1_1")
    target = target[:, None]
    last = model.classifier[:3](model.features(x)).detach().requires_grad_()
    expected = cam(last, model.classifier[3](last).flatten(1).gather(1, target), (227, 227))
    torch.testing.assert_close(GradCAM().attribute(network, x), expected, rtol=1e-4, atol=1e-6)
    # two sites are joined in a fire module: their maps add up to that of what they are joined to
    joined = model.features(x).detach().requires_grad_()
    value = model.classifier(joined).flatten(1).gather(1, target)
    expected = cam(joined, value, (227, 227), rectify=False)
    sites = [site.name for site in network.sites if site.name.startswith("features.12.")][-2:]
    one, two = (GradCAM(site, rectify=False).attribute(network, x) for site in sites)
    torch.testing.assert_close(one + two, expected, rtol=1e-4, atol=1e-5)
    assert float(expected.max()) > 0.01
