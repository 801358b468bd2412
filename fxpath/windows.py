"""Max-pools and other maxima of a graph: which values each of their outputs is the largest of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .nodes import altered, argument, called_module, operation

_POOLS: dict[type[nn.Module], int] = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
_ADAPTIVE: dict[type[nn.Module], int] = {nn.AdaptiveMaxPool1d: 1, nn.AdaptiveMaxPool2d: 2, nn.AdaptiveMaxPool3d: 3}
_POOL_NAMES = {f"max_pool{axes}d{more}": axes for axes in (1, 2, 3) for more in ("", "_with_indices")}
_ADAPTIVE_NAMES = {f"adaptive_max_pool{axes}d": axes for axes in (1, 2, 3)}
_OF_TWO = {"maximum", "fmax", "max"}

Shape = tuple[int, ...]
Ranges = list[list[list[int]]]  # of each axis, for each output: the places that it reads


@dataclass(frozen=True, eq=False)
class Maximum:
    """A node whose outputs are maxima of values of `sources`.

    `candidates` takes the sources' shapes (batch axis included) and gives `(W, K)` int64: for each of a row's W windows
    the flat places of its candidates in what the sources hold one after the other, −1 where a window has fewer.
    Padding is no candidate.
    """

    node: fx.Node
    sources: tuple[fx.Node, ...]
    candidates: Callable[[Sequence[Shape]], Tensor]


def maximum(node: fx.Node) -> Maximum | None:
    """The maximum that a node computes, None where it computes something else."""
    module = called_module(node)
    if module is not None:
        return None if altered(module) else _of_module(node, module)
    name = operation(node) if node.op in ("call_function", "call_method") else None
    source, other = argument(node, 0, "input", "self"), argument(node, 1, "other")
    if name is None or not isinstance(source, fx.Node):
        return None
    if name in _POOL_NAMES:
        return _pool(
            node, source, _POOL_NAMES[name], argument(node, 1, "kernel_size"), argument(node, 2, "stride"),
            argument(node, 3, "padding"), argument(node, 4, "dilation"), argument(node, 5, "ceil_mode"),
        )  # fmt: skip
    if name in _ADAPTIVE_NAMES:
        return _adaptive(node, source, _ADAPTIVE_NAMES[name], argument(node, 1, "output_size"))
    if name in _OF_TWO and isinstance(other, fx.Node):
        return Maximum(node, (source, other), _pairs)
    if name in ("amax", "max"):
        axes = argument(node, 1, "dim")
        given = () if axes is None else (axes,) if isinstance(axes, int) else tuple(axes)
        return Maximum(node, (source,), lambda shapes: _reduced(shapes[0], given)) if given else None
    return None


def _of_module(node: fx.Node, module: nn.Module) -> Maximum | None:
    source = argument(node, 0, "input")
    kind, given = type(module), vars(module)
    if not isinstance(source, fx.Node):
        return None
    if kind in _POOLS:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        return _pool(node, source, _POOLS[kind], *(given[name] for name in names))
    return _adaptive(node, source, _ADAPTIVE[kind], given["output_size"]) if kind in _ADAPTIVE else None


def _pool(
    node: fx.Node, source: fx.Node, axes: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: Any
) -> Maximum:
    kernels = _each(kernel, axes)
    strides = _each(stride, axes) if stride not in (None, [], ()) else kernels
    paddings, dilations = _each(padding or 0, axes), _each(dilation or 1, axes)

    def candidates(shapes: Sequence[Shape]) -> Tensor:
        (shape,) = shapes
        numbers = zip(shape[-axes:], kernels, strides, paddings, dilations, strict=True)
        return _windows(shape, axes, [_read(*each, bool(ceil)) for each in numbers])

    return Maximum(node, (source,), candidates)


def _adaptive(node: fx.Node, source: fx.Node, axes: int, size: Any) -> Maximum:
    def candidates(shapes: Sequence[Shape]) -> Tensor:
        (shape,) = shapes
        wanted = [size] * axes if size is None or isinstance(size, int) else list(size)
        ranges = []
        for length, outputs in zip(shape[-axes:], wanted, strict=True):
            count = length if outputs is None else outputs
            ranges.append([list(range(out * length // count, -(-(out + 1) * length // count))) for out in range(count)])
        return _windows(shape, axes, ranges)

    return Maximum(node, (source,), candidates)


def _each(value: Any, axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _read(length: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> list[list[int]]:
    """The places of one axis that each output reads."""
    room = length + 2 * padding - dilation * (kernel - 1) - 1
    count = (-(-room // stride) if ceil else room // stride) + 1
    if ceil and (count - 1) * stride >= length + padding:  # the last window must begin inside
        count -= 1
    starts = (out * stride - padding for out in range(count))
    return [[at for at in range(start, start + dilation * kernel, dilation) if 0 <= at < length] for start in starts]


def _windows(shape: Shape, axes: int, ranges: Ranges) -> Tensor:
    """`(W, K)` for windows over the last `axes` axes; those in front, the batch left out, are apart."""
    inner = torch.zeros((1, 1), dtype=torch.int64)
    for length, places in zip(shape[-axes:], ranges, strict=True):
        width = max(map(len, places))
        own = torch.tensor([each + [-1] * (width - len(each)) for each in places])
        joined = inner[:, None, :, None] * length + own[None, :, None, :]
        missing = (inner < 0)[:, None, :, None] | (own < 0)[None, :, None, :]
        inner = joined.masked_fill(missing, -1).reshape(len(inner) * len(own), -1)
    block = math.prod(shape[-axes:])
    apart = torch.arange(math.prod(shape[1:-axes])) * block
    return torch.where(inner < 0, -1, apart[:, None, None] + inner).reshape(-1, inner.shape[1])


def _reduced(shape: Shape, axes: Shape) -> Tensor:
    """`(W, K)` for a maximum over whole axes."""
    gone = {axis % len(shape) for axis in axes}
    places = torch.arange(math.prod(shape[1:])).reshape(1, *shape[1:])
    kept = [axis for axis in range(1, len(shape)) if axis not in gone]
    width = math.prod(shape[axis] for axis in gone)
    return places.permute(0, *kept, *sorted(gone)).reshape(-1, width)


def _pairs(shapes: Sequence[Shape]) -> Tensor:
    """`(W, 2)` for the larger of two tensors of one shape, or of shapes that broadcast."""
    blocks = [torch.arange(math.prod(shape[1:])).reshape(shape[1:]) for shape in shapes]
    whole = torch.broadcast_shapes(*(block.shape for block in blocks))  # type: ignore[no-untyped-call]
    first, second = (block.expand(whole) for block in blocks)
    return torch.stack([first.flatten(), second.flatten() + blocks[0].numel()], dim=1)
