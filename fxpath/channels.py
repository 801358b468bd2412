"""The channel axis of a site, in any layout: found where the channels are made, followed to the site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from .nodes import argument, called_module, plain_name

Shape = tuple[int, ...]

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
)
_CHANNELS_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.MultiheadAttention, nn.RMSNorm, nn.RNNBase)
_FIRST_NAMES = (
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution",
    "batch_norm", "group_norm", "instance_norm",
)  # fmt: skip
_LAST_NAMES = ("linear", "bilinear", "rms_norm", "addmm", "embedding", "tensordot", "_addmm_activation")
_PRODUCTS = ("matmul", "mm", "bmm")
_RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "view_as"}


def channel_axis(site: fx.Node, shapes: Mapping[fx.Node, Shape]) -> int:
    """The channel axis of a site's tensor, the batch axis counted: never 0 where there is another.

    `shapes` are those of all nodes that give floating-point tensors. Looks back for the operation that made the
    channels (a convolution or norm puts them on axis 1, a linear layer or embedding on the last, a product where its
    weights have them), then follows that axis through permutations, reshapes and broadcasts. Channels that were merged
    with other axes are on the merged one. Where nothing made any, they are on axis 1.
    """
    way = [site]
    axis: int | None = None
    while axis is None and way[-1] in shapes:
        axis = _made(way[-1], shapes)
        if axis is None:
            source = _main_source(way[-1], shapes)
            if source is None:
                break
            way.append(source)
    dimensions = len(shapes[site])
    if axis is None:
        return min(1, dimensions - 1)
    for before, node in zip(way[:0:-1], way[-2::-1], strict=True):
        axis = _moved(node, axis, shapes[before], shapes[node])
    return min(max(axis, 1), dimensions - 1)


def _main_source(node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> fx.Node | None:
    """The input that a value is mostly made of: not a parameter, a gate or a class token that is spread over it."""
    sources = [source for source in node.all_input_nodes if shapes.get(source)]
    moving = [source for source in sources if not _is_weight(source)] or sources
    return max(moving, key=lambda source: (math.prod(shapes[source]), len(shapes[source])), default=None)


def _is_weight(value: Any, steps: int = 6) -> bool:
    """Whether a value is a parameter or buffer, or made of such alone in a few steps."""
    if not isinstance(value, fx.Node) or value.op == "placeholder" or not steps:
        return False
    sources = value.all_input_nodes
    return value.op == "get_attr" or (bool(sources) and all(_is_weight(source, steps - 1) for source in sources))


def _made(node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> int | None:
    """The axis on which a node puts channels, if it makes any."""
    module, shape = called_module(node), shapes[node]
    name = plain_name(node)
    if isinstance(module, _CHANNELS_FIRST) or name in _FIRST_NAMES or str(name).endswith("batch_norm"):
        return 1
    if isinstance(module, nn.LayerNorm) or name == "layer_norm":
        over = module.normalized_shape if isinstance(module, nn.LayerNorm) else argument(node, 1, "normalized_shape")
        return len(shape) - 1 if len(over) == 1 else None  # over several axes it says nothing of channels
    if isinstance(module, _CHANNELS_LAST) or name in _LAST_NAMES:
        return len(shape) - 1
    if name in _PRODUCTS:
        return max(len(shape) - 2, 0) if _is_weight(node.args[0]) else len(shape) - 1
    return _of_einsum(node, shapes) if name == "einsum" else None


def _of_einsum(node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> int:
    """The axis that the weights of an einsum bring in; the last where no operand is a parameter."""
    last = len(shapes[node]) - 1
    equation: Any = node.args[0]
    operands: Any = node.args[1:]
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], tuple | list) else operands
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return last
    terms, _, given = equation.replace(" ", "").partition("->")
    weights = [term for term, operand in zip(terms.split(","), operands, strict=False) if _is_weight(operand)]
    moving = "".join(term for term in terms.split(",") if term not in weights)
    brought = [place for place, letter in enumerate(given) if letter in "".join(weights) and letter not in moving]
    return brought[0] if brought else last


def _moved(node: fx.Node, axis: int, before: Shape, after: Shape) -> int:
    """Where a node puts the axis of its input."""
    name = str(node.args[1]) if node.target is getattr else plain_name(node)
    size = len(before)
    if name == "permute":
        order: Any = argument(node, 1, "dims")
        order = order if isinstance(order, tuple | list) else node.args[1:]
        places = [int(place) % size for place in order]
        return places.index(axis)
    if name in ("transpose", "swapaxes", "swapdims"):
        pair = [argument(node, 1, "dim0", "axis0"), argument(node, 2, "dim1", "axis1")]
        one, two = (int(place) % size for place in pair)
        return two if axis == one else one if axis == two else axis
    if name in ("t", "T", "mT", "adjoint"):
        return 2 * size - 3 - axis if axis >= size - 2 else axis
    if name == "movedim":
        return _after_movedim(node, axis, size)
    if name in ("unsqueeze", "stack"):
        place = argument(node, 1, "dim")
        place = (int(place) if isinstance(place, int) else 0) % len(after)
        return axis + (axis >= place)
    if name in ("expand", "expand_as", "repeat", "broadcast_to"):
        return axis + len(after) - len(before)
    if name == "getitem" and len(before) != len(after):
        return _after_getitem(node.args[1], axis, len(after) - len(before))
    if name in _RESHAPES or isinstance(called_module(node), nn.Flatten | nn.Unflatten):
        return _after_reshape(axis, before, after)
    if len(before) == len(after):
        return axis
    dropped = argument(node, 1, "dim") if name else None  # a mean, a sum, select: axes that are gone
    listed: Sequence[Any] = dropped if isinstance(dropped, tuple | list) else [dropped]
    if len(after) < len(before) and all(isinstance(place, int) for place in listed):
        return axis - sum(int(place) % size < axis for place in listed)
    if len(after) > len(before) and len(node.all_input_nodes) > 1:  # spread over a value of more axes
        return axis + len(after) - len(before)
    return _after_reshape(axis, before, after)


def _after_movedim(node: fx.Node, axis: int, size: int) -> int:
    def listed(value: Any) -> list[int]:
        return [int(place) % size for place in (value if isinstance(value, tuple | list) else [value])]

    sources = listed(argument(node, 1, "source"))
    goals = listed(argument(node, 2, "destination"))
    order: dict[int, int] = dict(zip(goals, sources, strict=True))
    rest = iter(place for place in range(size) if place not in sources)
    return [order[place] if place in order else next(rest) for place in range(size)].index(axis)


def _after_getitem(key: Any, axis: int, more: int) -> int:
    """An index by numbers drops axes, None adds one, a tensor of places may do either: `more` says by how many."""
    at = place = 0
    items = key if isinstance(key, tuple) else (key,)
    tensors = any(isinstance(item, fx.Node) for item in items)
    for item in items:
        if item is Ellipsis or at >= axis + (item is None):
            break
        if isinstance(item, fx.Node) and at < axis:
            return axis + more
        at += item is not None
        place += item is None or isinstance(item, slice) or (tensors and not isinstance(item, int))
    return place + (axis - at)


def _after_reshape(axis: int, before: Shape, after: Sequence[int]) -> int:
    """The axis that starts where the old one did; the merged one where it was merged."""
    ahead = math.prod(before[:axis])
    for place in range(len(after)):
        start, end = math.prod(after[:place]), math.prod(after[: place + 1])
        if start == ahead and (after[place] == before[axis] or (end > ahead and after[place] > 1)):
            return place
        if start < ahead < end:
            return place
    return len(after) - 1
