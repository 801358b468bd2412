"""How what follows a site depends on α when the site's activation a is scaled to α·a.

Up to the next activation most networks are affine in α, v(α) = v(0) + α·(v(1) − v(0)) for α > 0: convolutions, average
pooling, concatenation, sums with what bypasses the site, and maxima too as long as nothing was added. Along a straight
path such values need computing twice and not once a step, and gradients need carrying back through them once.

Only operations that are known to keep this form count; whatever else there is ends the affine part.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from torch import fx, nn

from .narrowing import Narrowed
from .nodes import altered, called_module, carries_data, operation
from .rewriting import ancestors, descendants, gate


class Growth(IntEnum):
    """How a value depends on α > 0: not at all, v(α) = α·v(1), v(α) = v(0) + α·(v(1) − v(0)), or in any other way."""

    CONSTANT = 0
    HOMOGENEOUS = 1
    AFFINE = 2
    OTHER = 3


_LINEAR_MODULES: tuple[type[nn.Module], ...] = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ZeroPad2d,
    nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
)  # fmt: skip
_BIASED_MODULES: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_SHIFTING_MODULES: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MAXIMAL_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip

_LINEAR = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "squeeze", "unsqueeze",
    "expand", "contiguous", "clone", "mean", "sum", "neg", "select", "slice", "narrow", "chunk", "split", "unbind",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "_adaptive_avg_pool2d", "pixel_shuffle", "t", "flip", "roll",
}  # fmt: skip
_BIASED = {"linear", "conv1d", "conv2d", "conv3d", "convolution"}  # (x, weight, bias, …)
_PRODUCTS = {"matmul", "mm", "bmm", "mul", "multiply"}
_SUMS = {"add", "sub", "subtract"}
_QUOTIENTS = {"div", "divide", "true_divide"}
_JOINS = {"cat", "concat", "concatenate", "stack"}
_MAXIMAL = {
    "relu", "leaky_relu", "abs", "amax", "max_pool1d", "max_pool2d", "max_pool3d",
}  # fmt: skip
_OPERATORS: dict[Any, str] = {
    operator.add: "add", operator.iadd: "add", operator.sub: "sub", operator.isub: "sub", operator.mul: "mul",
    operator.imul: "mul", operator.truediv: "div", operator.itruediv: "div", operator.matmul: "matmul",
    operator.neg: "neg", operator.getitem: "select",
}  # fmt: skip


def _of_module(node: fx.Node, module: nn.Module, known: dict[fx.Node, Growth]) -> Growth:
    """A subclass may compute anything, and so may a hook: only the types themselves count."""
    sources = [known[source] for source in node.all_input_nodes]
    varying = [growth for growth in sources if growth is not Growth.CONSTANT]
    if len(varying) != 1 or altered(module):
        return Growth.OTHER
    kind, given = type(module), varying[0]
    if isinstance(module, Narrowed):
        return given if module.layer.bias is None else Growth.AFFINE
    if len(sources) != 1:
        return Growth.OTHER
    if kind in _LINEAR_MODULES:
        return given
    if kind in _BIASED_MODULES:
        return given if module.bias is None else Growth.AFFINE
    if kind in _SHIFTING_MODULES:
        return Growth.AFFINE if module.running_mean is not None else Growth.OTHER
    if kind in _MAXIMAL_MODULES and given is Growth.HOMOGENEOUS and not getattr(module, "return_indices", False):
        return given
    return Growth.OTHER


def _of_function(node: fx.Node, known: dict[fx.Node, Growth]) -> Growth:
    name = _OPERATORS.get(node.target) if node.op == "call_function" else None
    name = name or operation(node)
    sources = [known[source] for source in node.all_input_nodes]
    varying = [growth for growth in sources if growth is not Growth.CONSTANT]
    highest = max(varying)
    first = node.args[0] if node.args else None
    leading = isinstance(first, fx.Node) and known[first] is not Growth.CONSTANT
    if name is None or highest is Growth.OTHER:
        return Growth.OTHER
    if name in _JOINS:
        return Growth.AFFINE if len(varying) < len(sources) else highest
    if name in _SUMS:
        plain = len(node.args) >= 2 and all(isinstance(value, fx.Node) for value in node.args[:2])
        return highest if plain and len(varying) == len(sources) else Growth.AFFINE
    if name in _PRODUCTS:
        return highest if len(varying) == 1 and _reads_once(node) else Growth.OTHER
    if len(varying) != 1 or not leading or not _reads_once(node):
        return Growth.OTHER
    if name in _LINEAR or name in _QUOTIENTS:
        return highest if node.kwargs.get("rounding_mode") is None else Growth.OTHER
    if name in _BIASED:
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        return highest if bias is None else Growth.AFFINE
    if name in ("dropout", "feature_dropout"):
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        return highest if training is False else Growth.OTHER
    if name == "batch_norm":  # its statistics are the batch's own in training
        training = node.args[5] if len(node.args) > 5 else node.kwargs.get("training", False)
        return Growth.AFFINE if training is False else Growth.OTHER
    indices = node.args[6] if len(node.args) > 6 else node.kwargs.get("return_indices", False)
    if name in _MAXIMAL and highest is Growth.HOMOGENEOUS and indices is False:
        return highest
    return Growth.OTHER


def _reads_once(node: fx.Node) -> bool:
    """Whether no input appears twice among the arguments, as in x * x."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return len(found) == len(set(found))


def growth_of(node: fx.Node, known: dict[fx.Node, Growth]) -> Growth:
    """How a node that computes something depends on α, given how all that it reads does."""
    called = called_module(node)
    if called is None:
        return _of_function(node, known)
    if any(known[source] is Growth.OTHER for source in node.all_input_nodes):
        return Growth.OTHER
    return _of_module(node, called, known)


def growths(module: fx.GraphModule, site: fx.Node, *, gated: bool) -> dict[fx.Node, Growth]:
    """How each node of a gated graph depends on α when the gate node `site` gives α·a.

    `gated`: other gates may do anything; else they are open.
    """
    within = descendants([site])
    known = dict.fromkeys(module.graph.nodes, Growth.CONSTANT)
    known[site] = Growth.HOMOGENEOUS
    for node in module.graph.nodes:
        if node not in within:
            continue
        if node.op == "output" or not carries_data(node):
            known[node] = Growth.OTHER
        elif node.target is gate:
            known[node] = Growth.OTHER if gated else known[node.args[0]]
        else:
            known[node] = growth_of(node, known)
    return known


def frontier(module: fx.GraphModule, site: fx.Node, *, gated: bool) -> Sequence[fx.Node]:
    """The values affine in α that others read, in order of execution; empty where the output reads none of them."""
    known = growths(module, site, gated=gated)
    output = next(node for node in module.graph.nodes if node.op == "output")
    leading = ancestors([output]) | {output}
    return [
        node
        for node in module.graph.nodes
        if known[node] in (Growth.HOMOGENEOUS, Growth.AFFINE)
        and any(known[user] is Growth.OTHER and user in leading for user in node.users)
    ]
