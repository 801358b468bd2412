"""Where a network bends: hinges (rectifiers), maxima, and what makes it no piecewise-linear function at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from .class_responses import Logit, Margin, Probability
from .curves import CASTS, floating
from .errors import LinearityError, unknown
from .hidden import Neuron
from .inplace import copied
from .nodes import altered, argument, called_module, carries_data, operation, plain_name
from .outputs import mapped
from .patterns import by_node, formulas_of
from .responses import respond
from .rewriting import GATES, ancestors, gate
from .scaling import Growth, growth_of
from .tracing import NAME
from .trials import random_like
from .windows import Maximum, maximum

if TYPE_CHECKING:
    from .network import Network

_AFFINE = {  # that neither trials nor integrals need to know of
    "pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
    "interpolate", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "channel_shuffle",
    "native_channel_shuffle", "pixel_unshuffle", "repeat", "tile", "cumsum", "unfold", "fold", "gather",
    "index_select", "_native_batch_norm_legit_no_training", "native_batch_norm", "tensor_split", "hstack", "vstack",
    "dstack", "diagonal", "rot90",
}  # fmt: skip
_JOINED = {"slice_scatter", "select_scatter", "diagonal_scatter", "copy"}  # affine in both of what they read
_AFFINE_MODULES = (
    nn.ConstantPad1d, nn.ConstantPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.CircularPad1d, nn.CircularPad2d, nn.Unfold, nn.Fold, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip
_BENT = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Threshold, nn.Hardsigmoid, nn.Softshrink)


@dataclass(frozen=True, eq=False)
class Hinge:
    """An activation that is linear between the values `kinks` of its `source`; `site` is its number, None for none."""

    node: fx.Node
    source: fx.Node
    kinks: tuple[float, ...]
    site: int | None


@dataclass(frozen=True, eq=False)
class Bends:
    """Everything at which a network bends, in order of execution, and the nodes that make it bend everywhere."""

    hinges: tuple[Hinge, ...]
    maxima: tuple[Maximum, ...]
    uncovered: tuple[str, ...]

    def require_covered(self, said: str) -> None:
        """Raise `LinearityError`, which names the nodes, for a network that is not piecewise linear."""
        if self.uncovered:
            shown = ", ".join(self.uncovered[:5]) + (" …" if len(self.uncovered) > 5 else "")
            raise LinearityError(
                f"{said}: expected a network whose only nonlinearities are piecewise-linear activations and "
                f"max-pools (Propositions 4 and 5), found {len(self.uncovered)} others: {shown}. Local linearity is "
                "not claimed for it; `gradient_stability` measures any network, and nodes that you know to be affine "
                "are named with affine=…"
            )


def bends(network: Network, affine: Sequence[str] = ()) -> Bends:
    """Where a network bends; `affine` names nodes whose function is affine though fxpath does not know it."""
    graph = network._module.graph
    sites = {node.args[0]: number for number, node in enumerate(network._gate_nodes)}
    read = network._read or next(node for node in graph.nodes if node.op == "output")
    needed = ancestors([read]) | {read}
    formulas, within = by_node(formulas_of(graph))
    given = set(affine)
    names = {str(node.meta[NAME]) for node in graph.nodes if NAME in node.meta}
    for name in sorted(given - names):
        raise LinearityError(f"affine: {unknown('node', name, sorted(names))}")
    hinges: list[Hinge] = []
    maxima: list[Maximum] = []
    uncovered: list[str] = []
    known: dict[fx.Node, Growth] = {}
    for node in graph.nodes:
        if node not in needed or node.op == "output":
            continue
        sources = [known[source] for source in node.all_input_nodes]
        if node.op == "placeholder":
            known[node] = Growth.CONSTANT if node.target == GATES else Growth.AFFINE
        elif node.target is gate:
            known[node] = known[node.args[0]]
        elif (
            not carries_data(node) or plain_name(node) == "fill" or all(growth is Growth.CONSTANT for growth in sources)
        ):
            known[node] = Growth.CONSTANT
        elif str(node.meta[NAME]) in given:
            known[node] = Growth.AFFINE
        else:
            formula = formulas.get(node)
            source = argument(node, 0, "input", "self") if formula is None else formula.x
            plain = formula is None and node not in within  # a formula bends where it says, not where its parts do
            kinks = formula.kinks if formula is not None else _kinks(node) if plain else ()
            found = maximum(node) if plain else None
            if kinks and isinstance(source, fx.Node) and (formula is not None or _alone(node, source, known)):
                hinges.append(Hinge(node, source, kinks, sites.get(node)))
            elif found is not None:
                maxima.append(found)
            elif node not in within and (formula is not None or _grown(node, known) is Growth.OTHER):
                uncovered.append(f"{node.meta[NAME]} ({_called(node) if formula is None else formula.op})")
            known[node] = Growth.AFFINE  # where it is not, what follows is not to blame
    if (why := _response(network)) is not None:
        uncovered.append(why)
    return Bends(tuple(hinges), tuple(maxima), tuple(uncovered))


def _alone(node: fx.Node, source: fx.Node, known: dict[fx.Node, Growth]) -> bool:
    """Whether all that an activation reads beside its source is given: slopes made of data are no slopes."""
    read: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), read.append)
    read.remove(source)
    return all(known[each] is Growth.CONSTANT for each in read)


def _kinks(node: fx.Node) -> tuple[float, ...]:
    """Where an activation, a clamp or an absolute value bends; () for all else."""
    module = called_module(node)
    if module is not None:
        return () if altered(module) else _kinks_of_module(module)
    name = operation(node) if node.op in ("call_function", "call_method") else None
    if name in ("relu", "leaky_relu", "prelu", "_prelu_kernel", "rrelu", "abs", "absolute"):
        return (0.0,)
    if name == "relu6":
        return (0.0, 6.0)
    if name == "hardtanh":
        return _numbers(_or(argument(node, 1, "min_val"), -1.0), _or(argument(node, 2, "max_val"), 1.0))
    if name in ("clamp", "clip", "clamp_min", "clamp_max"):
        low = argument(node, 1, "min") if name != "clamp_max" else None
        high = argument(node, 1 if name == "clamp_max" else 2, "max") if name != "clamp_min" else None
        return _numbers(*(each for each in (low, high) if each is not None))
    if name == "threshold":
        same = argument(node, 1, "threshold") == argument(node, 2, "value")  # else it jumps
        return _numbers(argument(node, 1, "threshold")) if same else ()
    if name == "hardsigmoid":
        return (-3.0, 3.0)
    if name == "softshrink":
        return _both(_or(argument(node, 1, "lambda", "lambd"), 0.5))
    return ()


def _kinks_of_module(module: nn.Module) -> tuple[float, ...]:
    """A subclass may compute anything, unless it is by the forward of torch's own."""
    if not any(type(module).forward is kind.forward for kind in _BENT if isinstance(module, kind)):
        return ()
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return (float(module.min_val), float(module.max_val))
    if isinstance(module, nn.Threshold):
        return (float(module.threshold),) if module.threshold == module.value else ()
    if isinstance(module, nn.Hardsigmoid):
        return (-3.0, 3.0)
    return _both(module.lambd) if isinstance(module, nn.Softshrink) else (0.0,)


def _or(value: Any, default: float) -> Any:
    return default if value is None else value


def _both(value: Any) -> tuple[float, ...]:
    return _numbers(-value, value) if isinstance(value, int | float) else ()


def _numbers(*values: Any) -> tuple[float, ...]:
    """The values where all are numbers: a bound that is a tensor may be anything."""
    return tuple(map(float, values)) if all(isinstance(value, int | float) for value in values) else ()


def _grown(node: fx.Node, known: dict[fx.Node, Growth]) -> Growth:
    """Whether a node is affine in what varies."""
    module = called_module(node)
    if module is not None:
        plain = type(module) in _AFFINE_MODULES and not altered(module)
    else:
        name = plain_name(node)
        varying = [source for source in node.all_input_nodes if known[source] is not Growth.CONSTANT]
        plain = name in _AFFINE and varying == [argument(node, 0, "input", "self")]
        if name in _JOINED or node.target is copied:
            plain = True
        if name in ("alpha_dropout", "feature_alpha_dropout"):
            plain = argument(node, 2, "training", "train") is False
        if name in CASTS:
            plain = name != "detach" and floating(node)
        if node.target is getattr:  # the values of a maximum along an axis, not where they are
            plain = bool(node.args[1] == "values")
        if name == "getitem":
            plain = all(known[source] is Growth.CONSTANT for source in node.all_input_nodes[1:])
        if name in ("_native_batch_norm_legit_no_training", "native_batch_norm"):
            plain = plain and not (name == "native_batch_norm" and argument(node, 5, "training") is not False)
    return Growth.AFFINE if plain else growth_of(node, known)


def _called(node: fx.Node) -> str:
    module = called_module(node)
    return type(module).__name__ if module is not None else str(plain_name(node) or node.target)


def _response(network: Network) -> str | None:
    """What of the response is not affine in the output, None where all is, or where only a trial can tell."""
    response = network.response
    if isinstance(response, Probability):
        return f"the response {response.name} (a softmax)"
    if isinstance(response, Margin) and response.against is None:
        return f"the response {response.name} (the largest of the other classes; take against=…)"
    return None


def require_affine(network: Network, output: Any, target: Tensor | None, batch: int) -> None:
    """Raise `LinearityError` for a response, a function of one's own, that is not affine in the network's output.

    Tried on the output itself, on other values, and half-way.
    """
    if isinstance(network.response, Logit | Margin | Neuron):
        return
    with torch.no_grad():
        first, middle, last = (
            respond(network.response, mapped(partial(_moved, share=share), output), target, batch)
            for share in (0.0, 0.5, 1.0)
        )
    error = (middle - (first + last) / 2).abs()
    if bool((error > 1e-4 * (first.abs() + last.abs() + middle.abs())).any()):
        raise LinearityError(
            f"response {network.response.name!r}: expected one that is affine in the network's output, such as a logit "
            "or a margin of two given classes; local linearity is not claimed for this one"
        )


def _moved(leaf: Tensor, share: float) -> Tensor:
    return leaf + share * random_like(leaf) * (1 + leaf.abs().amax()) if leaf.is_floating_point() else leaf
