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
_CHANNELS_LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.Embedding, nn.MultiheadAttention, nn.RMSNorm, nn.RNNBase)
_FIRST_NAMES = (
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution",
    "batch_norm", "group_norm", "instance_norm",
)  # fmt: skip
_LAST_NAMES = ("linear", "bilinear", "layer_norm", "rms_norm", "addmm", "matmul", "mm", "bmm", "embedding", "einsum")
_RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "expand"}


def channel_axis(site: fx.Node, shapes: Mapping[fx.Node, Shape]) -> int:
    """The channel axis of a site's tensor, the batch axis counted: never 0 where there is another.

    Looks back along first arguments for the operation that made the channels (a convolution or norm puts them on axis
    1, a linear layer or embedding on the last), then follows that axis through permutations and reshapes. Channels
    that were merged with other axes are on the merged one. Where nothing made any, they are on axis 1.
    """
    way = [site]
    axis: int | None = None
    while axis is None:
        node = way[-1]
        if node not in shapes:
            break
        axis = _made(node, shapes[node])
        if axis is None:
            source = next((each for each in node.all_input_nodes if shapes.get(each)), None)
            if source is None:
                break
            way.append(source)
    dimensions = len(shapes[site])
    if axis is None:
        return min(1, dimensions - 1)
    for before, node in zip(way[:0:-1], way[-2::-1], strict=True):
        axis = _moved(node, axis, shapes[before], shapes[node])
    return min(max(axis, 1), dimensions - 1)


def _made(node: fx.Node, shape: Shape) -> int | None:
    """The axis on which a node puts channels, if it makes any."""
    module = called_module(node)
    name = plain_name(node)
    if isinstance(module, _CHANNELS_FIRST) or name in _FIRST_NAMES or str(name).endswith("batch_norm"):
        return 1
    if isinstance(module, _CHANNELS_LAST) or name in _LAST_NAMES:
        return len(shape) - 1
    return None


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
    if name == "getitem" and len(before) != len(after):
        return _after_getitem(node.args[1], axis)
    if name in _RESHAPES or isinstance(called_module(node), nn.Flatten | nn.Unflatten):
        return _after_reshape(axis, before, after)
    if len(before) == len(after):
        return axis
    dropped = argument(node, 1, "dim") if name else None  # a mean, a sum, select: axes that are gone
    listed: Sequence[Any] = dropped if isinstance(dropped, tuple | list) else [dropped]
    if len(after) < len(before) and all(isinstance(place, int) for place in listed):
        return axis - sum(int(place) % size < axis for place in listed)
    return _after_reshape(axis, before, after)


def _after_movedim(node: fx.Node, axis: int, size: int) -> int:
    def listed(value: Any) -> list[int]:
        return [int(place) % size for place in (value if isinstance(value, tuple | list) else [value])]

    sources = listed(argument(node, 1, "source"))
    goals = listed(argument(node, 2, "destination"))
    order: dict[int, int] = dict(zip(goals, sources, strict=True))
    rest = iter(place for place in range(size) if place not in sources)
    return [order[place] if place in order else next(rest) for place in range(size)].index(axis)


def _after_getitem(key: Any, axis: int) -> int:
    """An index by numbers drops axes, None adds one."""
    at = place = 0
    for item in key if isinstance(key, tuple) else (key,):
        if item is Ellipsis or at >= axis:
            break
        at += item is not None
        place += item is None or isinstance(item, slice)
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
