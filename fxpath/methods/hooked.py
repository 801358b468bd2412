"""The methods that need hooks: guided backpropagation and GradCAM, by captum, on modules that are thrown away.

captum hooks `nn.Module`s, and a model's own will not do: a reused ReLU is one module with several calls, an in-place
one overwrites what a hook has seen, a functional one is no module at all. So the hooks go to modules that the gates of
the traced graph call, one of its own for each execution, and the model is never touched.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ..activations import activations_of, classify
from ..attribution import differentiable
from ..errors import ModelError, SiteError
from ..gates import Gates
from ..naming import NAME
from ..network import Network
from ..neurons import NeuronIndex, Site
from ..nodes import called_module, plain_name
from ..pathways import Pathways
from ..rewriting import GATES, gate
from ..samples import type_of_target
from .explained import Explained, captum, images
from .registry import Compared, register

_RECURRENT = {"rnn_relu", "rnn_relu_cell"}
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class _Rectified(nn.Module):
    """What a rectifier gives, rectified once more: that changes no value, and gives captum a ReLU of torch's to hook.

    Its rule, that no negative gradient passes, is the same before and after the rectifier, whatever form that has. What
    captum hooks is the tensor that the ReLU is given, and thereby all that read it: here nothing else does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, a: Tensor) -> Tensor:
        return self.relu(a) if a.requires_grad else a  # what passes no gradient back takes no hook


class _Layer(nn.Module):
    """An activation with its channels first, where captum expects them."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis, self.layer = axis, nn.Identity()

    def forward(self, a: Tensor) -> Tensor:
        return self.layer(a.movedim(self.axis, 1)).movedim(1, self.axis)  # type: ignore[no-any-return]


class _Through(Gates):
    """Gates that hand activations through modules; numbers beyond the index are of activations that are no sites."""

    def __init__(self, index: NeuronIndex, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(index)
        self.parts = parts

    def __call__(self, number: int, activation: Tensor) -> Tensor:
        value = super().__call__(number, activation) if number < len(self.index) else activation
        part = self.parts.get(str(number))
        return value if part is None else part(value)


class _Hookable(nn.Module):
    """Φ as captum wants it: a module whose only children are the parts that hooks are meant for."""

    def __init__(self, explained: Explained, parts: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.explained = explained
        self.parts = nn.ModuleDict({str(number): part for number, part in parts.items()})

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        parts = dict(self.parts.items())
        return self.explained.response(x, target, _Through(self.explained.network.index, parts))


@register
@dataclass(frozen=True)
class GuidedBackprop(Compared):
    """The gradient by backpropagation that lets no negative gradient pass a rectifier (Springenberg et al.).

    The rule is for every execution of a rectifier (ReLU, ReLU6, clamps and Hardtanh from 0 on, in all forms that can be
    sites), whether it is a site or not. All else passes its plain gradient: smooth activations, max-pooling, and what
    lies within leaf modules that are not torch's. Raises `ModelError` where there is no rectifier at all, and where a
    leaf module holds rectifiers that the graph does not show.
    """

    name: ClassVar[str] = "guided_backprop"

    @torch.inference_mode(False)
    def attribute(
        self, network: Network, x: Any, target: type_of_target = None, pathways: Pathways | None = None
    ) -> Tensor:
        explained = Explained.of(self.key, network, x, target)
        gated, numbers = _gated_rectifiers(self.key, network)
        module = _Hookable(replace(explained, network=gated), {number: _Rectified() for number in numbers})
        with differentiable(self.key), _without_noise():
            method = captum().GuidedBackprop(module)
            found: Tensor = method.attribute(explained.x.requires_grad_(), additional_forward_args=explained.target)
        return found.detach()


@register
@dataclass(frozen=True)
class GradCAM(Compared):
    """Channels of one site, weighted by their mean gradient and added up, where that is above 0 (Selvaraju et al.).

    Maps `(B, 1, H, W)`, interpolated linearly to the size of the input. `site` is the name of a site with as many axes
    in space as the input has, beside its channels, first or last; "" is the last one that leads to the response.
    Without `rectify` what is below 0 stays. Raises `SiteError` where there is no such site.
    """

    name: ClassVar[str] = "grad_cam"
    site: str = ""
    rectify: bool = True

    @torch.inference_mode(False)
    def attribute(
        self, network: Network, x: Any, target: type_of_target = None, pathways: Pathways | None = None
    ) -> Tensor:
        explained = Explained.of(self.key, network, x, target)
        axes = images(self.key, explained.x)
        site = self._site(network, axes)
        part = _Layer(site.axis + 1)
        module = _Hookable(explained, {network.index.number(site): part})
        method = captum().LayerGradCam(module, part.layer)
        with differentiable(self.key):
            coarse = method.attribute(
                explained.x.requires_grad_(), additional_forward_args=explained.target, relu_attributions=self.rectify,
                grad_kwargs={"allow_unused": True, "materialize_grads": True},
            )  # fmt: skip
        found: Tensor = captum().LayerAttribution.interpolate(
            coarse.detach(), tuple(explained.x.shape[2:]), interpolate_mode=_MODES[axes]
        )
        return found

    def _site(self, network: Network, axes: int) -> Site:
        leading = _leading(network)
        spatial = [site for number, site in enumerate(network.sites) if number in leading and _in_space(site, axes)]
        if self.site:
            site = network.index.site(self.site)
            if site not in spatial:
                known = f"; such are {', '.join(each.name for each in spatial[-5:])}" if spatial else ""
                raise SiteError(
                    f"{self.key}: expected a site that leads to the response, with channels and {axes} axes in space, "
                    f"found {_described(site)}{known}"
                )
            return site
        if not spatial:
            shown = ", ".join(map(_described, network.sites[-3:]))
            raise SiteError(
                f"grad_cam: no site of this network has channels and {axes} axes in space (the last ones: {shown}); "
                "choose other sites when tracing, sites=…, such as the last convolution, or another method"
            )
        return spatial[-1]


def _described(site: Site) -> str:
    folded = f", {site.fold} rows of which are folded into the batch" if site.fold > 1 else ""
    return f"{site.name} {site.shape}{folded}"


def _in_space(site: Site, axes: int) -> bool:
    """Whether a site has channels and so many axes in space, not all of one pixel."""
    sides = [size for axis, size in enumerate(site.shape) if axis != site.axis]
    return site.fold == 1 and len(sides) == axes and max(sides) > 1


def _leading(network: Network) -> set[int]:
    """The sites from which data flows to the response."""
    found = {len(network.index)}
    for source, target in sorted(network.edges, key=lambda edge: -edge[1]):  # edges lead forward
        if target in found:
            found.add(source)
    return found


def _gated_rectifiers(said: str, network: Network) -> tuple[Network, list[int]]:
    """A network with a gate after every rectifier of its graph, sites or not, and the numbers of these gates."""
    module = network._module
    _require_plain_leaves(said, module)
    rectifiers = [activation.node for activation in activations_of(module) if activation.rectifier]
    if not rectifiers:
        shown = ", ".join(site.name for site in network.sites[:3])
        raise ModelError(
            f"{said}: there is no rectifier (ReLU, ReLU6, clamp(min=0), Hardtanh(0, ·)) in this network, whose sites "
            f"are {shown}{' …' if len(network.sites) > 3 else ''}; its rule says nothing of other activations. Take "
            "the gradient, or another method"
        )
    gates = {node: next((user for user in node.users if user.target is gate), None) for node in rectifiers}
    bare = [node for node, own in gates.items() if own is None]
    numbers = [int(own.args[2]) for own in gates.values() if own is not None]  # type: ignore[arg-type]
    if not bare:
        return network, numbers
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(module.graph, copies))
    given = next(node for node in graph.nodes if node.op == "placeholder" and node.target == GATES)
    for number, node in enumerate((copies[node] for node in bare), len(network.index)):
        with graph.inserting_after(node):
            own = graph.call_function(gate, (node, given, number))
        node.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)  # type: ignore[misc]
        numbers.append(number)
    twin = copy.copy(network)
    twin._module = fx.GraphModule(module, graph, type(module).__name__)
    return twin, numbers


def _require_plain_leaves(said: str, module: fx.GraphModule) -> None:
    """Raise `ModelError` for what the graph calls as a whole and rectifies within, naming one of them."""
    for node in module.graph.nodes:
        called = called_module(node)
        parts = [] if called is None or classify(node) is not None else list(called.named_modules())
        within = [path or "itself" for path, part in parts if _rectifies(part)]
        if plain_name(node) in _RECURRENT:
            within = [str(plain_name(node))]
        if within:
            kind = f" ({type(called).__name__})" if called is not None else ""
            raise ModelError(
                f"{said}: {node.meta[NAME]}{kind} is called as a whole and rectifies within ({within[0]}), where the "
                "rule cannot reach. Write its steps out in forward, or trace without leaves=… and without making it a "
                "site, or take another method"
            )


def _rectifies(module: nn.Module) -> bool:
    """Whether a module is known to rectify in its forward; one of TorchScript goes by its name."""
    if isinstance(module, nn.RNN | nn.RNNCell):
        return module.nonlinearity in ("relu", "RNN_RELU")
    if isinstance(module, nn.Hardtanh):
        return module.min_val == 0
    if isinstance(module, nn.Threshold):
        return module.threshold == 0 == module.value
    return isinstance(module, nn.ReLU) or getattr(module, "original_name", "") in ("ReLU", "ReLU6")


@contextmanager
def _without_noise() -> Iterator[None]:
    """Keep back captum's remark that it sets hooks: none is on a module of the user's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting backward hooks on ReLU", category=UserWarning)
        yield
