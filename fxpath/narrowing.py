"""A gated graph whose last layer gives the wanted classes alone.

A logit needs one row of the last layer. In SqueezeNet that layer is a convolution with 1000 channels, more than half of
what the later sites' suffixes compute; in most networks it is a small matrix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .naming import NAME
from .nodes import altered, called_module, carries_data, operation
from .rewriting import gate

CLASSES = "fxpath_classes"  # the placeholder through which the last layer gets the wanted classes

_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BY_CHANNEL: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.Identity,
    nn.Dropout, nn.Dropout2d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_BY_CHANNEL_NAMES = {
    "relu", "relu6", "hardtanh", "leaky_relu", "gelu", "silu", "hardswish", "sigmoid", "tanh", "dropout",
    "feature_dropout", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "contiguous", "clone",
}  # fmt: skip


class Narrowed(nn.Module):
    """Some rows of a layer: its outputs `classes`, `(U,)` int64; a linear layer's come last, a convolution's second."""

    def __init__(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, value: Tensor, classes: Tensor) -> Tensor:
        layer = self.layer
        if altered(layer):  # since the graph was made
            made: Tensor = layer(value)
            return made.index_select(made.ndim - 1 if isinstance(layer, nn.Linear) else 1, classes)
        bias = None if layer.bias is None else layer.bias.index_select(0, classes)
        weight = layer.weight.index_select(0, classes)
        if isinstance(layer, nn.Linear):
            return F.linear(value, weight, bias)
        convolved: Tensor = layer._conv_forward(value, weight, bias)
        return convolved


def narrow(module: fx.GraphModule, classes: int) -> tuple[fx.GraphModule, fx.Node] | None:
    """A copy of a gated graph in which the layer that makes the `classes` outputs makes some of them, and that layer.

    The copy takes one more argument, the classes `(U,)`, and gives `(B, U)`. None where what follows the layer may mix
    its channels, or anything else reads it.
    """
    found = _last_layer(module, classes)
    if found is None:
        return None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, copies)
    graph.output(output)
    narrowed = fx.GraphModule(module, graph, f"{type(module).__name__}Narrowed")
    for node, copy in copies.items():
        copy.meta = dict(node.meta)
    layer = copies[found]
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        wanted = graph.placeholder(CLASSES, default_value=None)
    wanted.meta[NAME] = CLASSES
    if layer.op == "call_module":
        narrowed.add_submodule(CLASSES, Narrowed(called_module(layer)))  # type: ignore[arg-type]
        layer.target, layer.args = CLASSES, (layer.args[0], wanted)
    else:
        with graph.inserting_before(layer):
            rows = [
                value if value is None else graph.call_function(torch.index_select, (value, 0, wanted))
                for value in (layer.args[1], _bias(layer))
            ]
        for row in rows:
            if row is not None:
                row.meta[NAME] = row.name
        layer.args = (layer.args[0], *rows, *layer.args[3:])
        layer.kwargs = {name: value for name, value in layer.kwargs.items() if name != "bias"}
    graph.lint()
    narrowed.recompile()
    return narrowed, layer


def _bias(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _last_layer(module: fx.GraphModule, classes: int) -> fx.Node | None:
    """The node that makes the classes, where all that follows it keeps them apart."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    reader, current = output, output.args[0]
    pooled: set[int] = set()  # numbers of axes that pools read
    while isinstance(current, fx.Node):
        if any(user is not reader and carries_data(user) for user in current.users):
            return None
        if (width := _width(current)) is not None:
            axes = _axes(current)
            fits = pooled <= {axes} if axes else _pointwise_to(reader, output)  # a linear layer's classes come last
            return current if width == classes and fits else None
        if not _keeps_apart(current):
            return None
        axes = _axes(current)
        if axes:
            pooled.add(axes)
        elif pooled and _drops_axes(current):
            return None
        reader, current = current, current.args[0] if current.args else None
    return None


def _axes(node: fx.Node) -> int:
    """How many axes behind the channels a convolution or a pool reads; 0 for all else."""
    module = called_module(node)
    name = type(module).__name__ if module is not None else operation(node) or ""
    found = re.search(r"(?i)(?:conv|pool)_?([123])d$", name)
    return int(found.group(1)) if found else 0


def _width(node: fx.Node) -> int | None:
    """How many outputs a linear layer or convolution has that can be narrowed; None for all else."""
    layer = called_module(node)
    if layer is not None:
        plain = type(layer) is nn.Linear or (type(layer) in _CONVOLUTIONS and layer.groups == 1)
        return int(layer.weight.shape[0]) if plain and not altered(layer) and len(node.args) == 1 else None  # type: ignore[index]
    if node.op != "call_function" or operation(node) not in ("linear", "conv1d", "conv2d", "conv3d"):
        return None
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    weight, module = node.args[1] if len(node.args) > 1 else None, node.graph.owning_module
    if groups != 1 or not isinstance(weight, fx.Node) or weight.op != "get_attr" or module is None:
        return None
    parent, _, name = str(weight.target).rpartition(".")
    return int(getattr(module.get_submodule(parent), name).shape[0])


def _pointwise_to(node: fx.Node, output: fx.Node) -> bool:
    while node is not output:
        plain = isinstance(called_module(node), nn.Dropout | nn.Identity | nn.ReLU | nn.ReLU6)
        if not plain and node.target is not gate:
            return False
        (node,) = (user for user in node.users if carries_data(user))
    return True


def _keeps_apart(node: fx.Node) -> bool:
    """Whether a node gives one value a channel from that channel alone, or only drops axes behind the channels."""
    module = called_module(node)
    if module is not None and altered(module):
        return False
    if type(module) in _BY_CHANNEL:
        return not getattr(module, "return_indices", False)
    return node.target is gate or operation(node) in _BY_CHANNEL_NAMES or _drops_axes(node)


def _drops_axes(node: fx.Node) -> bool:
    """Whether a node drops axes behind the channels and does no more."""
    module, name = called_module(node), operation(node)
    if module is not None:
        return type(module) is nn.Flatten and module.start_dim == 1
    if name == "flatten":
        return bool(_argument(node, 1, "start_dim", 0) == 1)
    if name in ("view", "reshape"):  # to (B, rest)
        return len(node.args) == 3 and isinstance(node.args[2], int) and node.args[2] == -1
    if name == "mean":
        axes = _argument(node, 1, "dim", None)
        axes = axes if isinstance(axes, Sequence) else (axes,)
        return all(isinstance(axis, int) and axis >= 2 for axis in axes)
    return False


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
