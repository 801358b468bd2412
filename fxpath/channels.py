"""The channel axis of a site, in any layout: found where the channels are made, followed to the site."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from .nodes import argument, called_module, plain_name

Shape = tuple[int, ...]
Axes = tuple[int, ...]  # those that hold channels, the outermost part of a channel's number first; none known: ()

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
_PRODUCTS = {"matmul": 0, "mm": 0, "bmm": 0, "linalg_matmul": 0, "baddbmm": 1, "addbmm": 1}  # where operands begin
_RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "view_as", "reshape_as", "ravel"}
_SPREADS = {"expand", "expand_as", "expand_copy", "repeat", "tile", "broadcast_to", "broadcast_tensors"}
_TRANSPOSED = {"t", "mT", "mH", "adjoint", "matrix_H"}  # of the last two axes
_REVERSED = {"T", "H", "numpy_T"}  # of all
_FOLDS = (nn.Unfold, nn.Fold)
_AXES_THIRD = {"norm", "linalg_vector_norm", "quantile", "nanquantile", "kthvalue", "cosine_similarity"}


def channel_axis(site: fx.Node, shapes: Mapping[fx.Node, Shape], found: dict[fx.Node, Axes] | None = None) -> int:
    """The channel axis of a site's tensor, the batch axis counted: never 0 where there is another.

    `shapes` are those of all nodes that give floating-point tensors. Looks back for the operation that made the
    channels (a convolution or norm puts them on axis 1, a linear layer or embedding on the last, a product where its
    weights have them, unless these mix places), then follows them through permutations, reshapes, broadcasts and
    products of data, which keep the axes that are not summed over. Channels that were merged with other axes are on the
    merged one, those that were split on the first of the parts that are left. Where none made any, they are on axis 1.
    `found` has the axes of other nodes of the graph, and gets those of the nodes looked at.
    """
    found = {} if found is None else found
    sources: dict[fx.Node, list[fx.Node]] = {}
    waiting = [site]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        made = _made(node, shapes)
        if made is not None:
            found[node] = made
        elif node not in sources:
            sources[node] = _sources(node, shapes)
            waiting += sources[node]
    for node in sorted(sources):
        found[node] = _followed(node, sources[node], found, shapes)
    last = len(shapes[site]) - 1
    return min(next((axis for axis in found[site] if axis > 0), 1), last)


def _sources(node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> list[fx.Node]:
    """The inputs whose channels a node may hand on: the data of a product, the values of attention, else one."""
    product = _product(node, shapes)
    if product is not None:
        return [operand for operand in product.operands if not _is_weight(operand)]
    if _attends(node):
        values = argument(node, 2, "value")
        return [values] if values in shapes else []
    source = _main_source(node, shapes)
    return [source] if source is not None else []


def _main_source(node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> fx.Node | None:
    """The input that a value is mostly made of: not a parameter, a gate or a class token that is spread over it."""
    sources = [source for source in node.all_input_nodes if shapes.get(source)]
    moving = [source for source in sources if not _is_weight(source)] or sources
    return max(moving, key=lambda source: (math.prod(shapes[source]), len(shapes[source])), default=None)


def _followed(
    node: fx.Node, sources: Sequence[fx.Node], found: Mapping[fx.Node, Axes], shapes: Mapping[fx.Node, Shape]
) -> Axes:
    """The axes on which a node puts the channels of its sources."""
    product = _product(node, shapes)
    if product is not None:
        places: list[int] = []
        for source in sorted(sources, key=lambda each: _weighs(each, shapes)):  # the values before their weights
            places += product.kept(source, found[source])
        return tuple(dict.fromkeys(places)) or product.brought()
    if not sources:
        return ()
    before, after = shapes[sources[0]], shapes[node]
    if _attends(node):
        return tuple(axis + len(after) - len(before) for axis in found[sources[0]])
    return tuple(dict.fromkeys(place for axis in found[sources[0]] for place in _moved(node, axis, before, after)))


def _name(node: fx.Node) -> str | None:
    """The plain name of an operation, those of `torch.linalg` as aten calls them."""
    name = plain_name(node)
    own = str(getattr(node.target, "__name__", ""))
    return own if name is None and own.startswith("linalg_") else name


def _is_weight(value: Any, steps: int = 6) -> bool:
    """Whether a value is a parameter or buffer, or made of such alone in a few steps."""
    if not isinstance(value, fx.Node) or value.op == "placeholder" or not steps:
        return False
    sources = value.all_input_nodes
    return value.op == "get_attr" or (bool(sources) and all(_is_weight(source, steps - 1) for source in sources))


def _made(node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> Axes | None:
    """The axes on which a node puts channels, if it makes any."""
    module, shape = called_module(node), shapes[node]
    name = _name(node)
    if isinstance(module, _CHANNELS_FIRST) or name in _FIRST_NAMES or str(name).endswith("batch_norm"):
        return (1,)
    if isinstance(module, nn.LayerNorm) or name == "layer_norm":
        over = module.normalized_shape if isinstance(module, nn.LayerNorm) else argument(node, 1, "normalized_shape")
        return (len(shape) - 1,) if len(over) == 1 else None  # over several axes it says nothing of channels
    if isinstance(module, _CHANNELS_LAST) or name in _LAST_NAMES:
        return (len(shape) - 1,)
    product = _product(node, shapes)
    return (product.brought() or None) if product is not None and not product.mixes(shapes) else None


# --- products -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """A product as an einsum: a letter for each axis of the operands and of what it gives."""

    operands: Sequence[fx.Node]
    terms: Sequence[str]
    given: str

    def brought(self) -> Axes:
        """The axes that parameters alone bring in."""
        weights = [_is_weight(operand) for operand in self.operands]
        moving = "".join(term for term, weight in zip(self.terms, weights, strict=True) if not weight)
        own = "".join(term for term, weight in zip(self.terms, weights, strict=True) if weight)
        return tuple(place for place, letter in enumerate(self.given) if letter in own and letter not in moving)

    def mixes(self, shapes: Mapping[fx.Node, Shape]) -> bool:
        """Whether the parameters may mix places, as a graph's adjacency does: as many go in as come out.

        They make channels nonetheless where the data has them on the axes that go in.
        """
        weights = [number for number, operand in enumerate(self.operands) if _is_weight(operand)]
        if len(weights) != 1 or len(self.operands) != 2:
            return False
        own, data = self.terms[weights[0]], self.terms[1 - weights[0]]
        sizes = dict(zip(own, shapes[self.operands[weights[0]]], strict=True))
        made = [sizes[letter] for letter in own if letter not in data]
        over = [sizes[letter] for letter in own if letter not in self.given]
        return len(made) + len(over) == len(own) and set(made) <= set(over)

    def kept(self, operand: fx.Node, axes: Axes) -> Axes:
        """Where axes of an operand are afterwards: those that are summed over are gone."""
        letters = [
            term[axis] for each, term in zip(self.operands, self.terms, strict=True) if each is operand for axis in axes
        ]
        return tuple(self.given.index(letter) for letter in letters if letter in self.given)


def _product(node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> _Product | None:
    name = _name(node)
    if name == "einsum":
        return _of_einsum(node, shapes)
    if name not in _PRODUCTS and name != "cdist":
        return None
    at = _PRODUCTS.get(str(name), 0)
    one = argument(node, at, "input" if at == 0 else "batch1", "self", "x1")
    two = argument(node, at + 1, "other", "mat2", "batch2", "tensor2", "x2")
    if not isinstance(one, fx.Node) or not isinstance(two, fx.Node) or one not in shapes or two not in shapes:
        return None
    ahead = string.ascii_lowercase[: max(len(shapes[one]), len(shapes[two])) - 2]
    left = ahead[max(len(ahead) + 2 - len(shapes[one]), 0) :] + "MK"
    right = ahead[max(len(ahead) + 2 - len(shapes[two]), 0) :] + ("NK" if name == "cdist" else "KN")
    left, right = left[-len(shapes[one]) :], "K" if len(shapes[two]) == 1 else right
    given = "".join(letter for letter in "MN" if letter in left + right)
    return _Product((one, two), (left, right), ("" if name == "addbmm" else ahead) + given)


def _of_einsum(node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> _Product | None:
    equation: Any = node.args[0]
    operands: Any = node.args[1:]
    operands = operands[0] if operands and isinstance(operands[0], tuple | list) else operands
    if not isinstance(equation, str) or any(operand not in shapes for operand in operands):
        return None
    free = "".join(letter for letter in string.ascii_letters if letter not in equation)
    left, arrow, given = equation.replace(" ", "").partition("->")
    terms = []
    spread = ""
    for term, operand in zip(left.split(","), operands, strict=True):
        more = len(shapes[operand]) - len(term.replace("...", ""))
        dots = free[:more][::-1] if "..." in term else ""  # the same letters from the right
        spread = max(spread, dots, key=len)
        terms.append(term.replace("...", dots))
    if not arrow:
        letters = left.replace("...", "").replace(",", "")
        given = "..." + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    return _Product(operands, terms, given.replace("...", spread))


def _attends(node: fx.Node) -> bool:
    return "scaled_dot_product" in str(_name(node))


def _weighs(node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> bool:
    """Whether a value is the weights of an attention: a softmax, moved about."""
    source: fx.Node | None = node
    for _ in range(6):
        if source is None or _made(source, shapes) is not None:
            return False
        if "softmax" in str(_name(source)) or isinstance(called_module(source), nn.Softmax):
            return True
        source = _main_source(source, shapes)
    return False


# --- moves ----------------------------------------------------------------------------------------------------------


def _moved(node: fx.Node, axis: int, before: Shape, after: Shape) -> Axes:
    """Where a node puts an axis of its input: none where it is gone, several where it is split."""
    name = str(node.args[1]) if node.target is getattr else _name(node)
    size = len(before)
    if name == "permute":
        order: Any = argument(node, 1, "dims")
        order = order if isinstance(order, tuple | list) else node.args[1:]
        return ([int(place) % size for place in order].index(axis),)
    if name in ("transpose", "swapaxes", "swapdims"):
        return (_swapped(axis, argument(node, 1, "dim0", "axis0"), argument(node, 2, "dim1", "axis1"), size),)
    if name == "rot90":
        turns, plane = argument(node, 1, "k"), argument(node, 2, "dims")
        odd = turns is None or int(turns) % 2
        one, two = plane or (0, 1)
        return (_swapped(axis, one, two, size) if odd else axis,)
    if name in _REVERSED:
        return (size - 1 - axis,)
    if name in _TRANSPOSED:
        return (_swapped(axis, -2, -1, size) if size > 1 else axis,)
    if name in ("movedim", "moveaxis"):
        return (_after_movedim(node, axis, size),)
    if name in ("diagonal", "linalg_diagonal"):
        return _after_diagonal(node, axis, size)
    if name in ("unsqueeze", "stack"):
        place = argument(node, 1, "dim")
        place = (int(place) if isinstance(place, int) else 0) % len(after)
        return (axis + (axis >= place),)
    if name in _SPREADS:
        return (axis + len(after) - len(before),)
    if name == "getitem" and len(before) != len(after):
        return _after_getitem(node.args[1], axis, size, len(after) - len(before))
    if name in ("im2col", "col2im") or node.target in (F.unfold, F.fold) or isinstance(called_module(node), _FOLDS):
        return (1,)
    if name == "unfold":  # the windows are a new last axis
        return (axis,)
    if name in _RESHAPES or isinstance(called_module(node), nn.Flatten | nn.Unflatten):
        return _after_reshape(axis, before, after)
    if len(before) == len(after):
        return (axis,)
    if len(after) < len(before):
        gone = _gone(node, name, size)
        if gone is not None:
            return () if axis in gone else (axis - sum(place < axis for place in gone),)
    if len(after) > len(before) and len(node.all_input_nodes) > 1:  # spread over a value of more axes
        return (axis + len(after) - len(before),)
    return _after_reshape(axis, before, after)


def _swapped(axis: int, one: Any, two: Any, size: int) -> int:
    one, two = int(one) % size, int(two) % size
    return int(two if axis == one else one if axis == two else axis)


def _gone(node: fx.Node, name: str | None, size: int) -> set[int] | None:
    """The axes that a mean, a sum, `select` or `unbind` takes away, where it says which."""
    given = argument(node, 2 if name in _AXES_THIRD else 1, "dim", "axis") if name else None
    if given is None:
        given = {"unbind": 0, "cosine_similarity": 1}.get(str(name))
    listed: Sequence[Any] = given if isinstance(given, tuple | list) else [given]
    return {int(place) % size for place in listed} if all(isinstance(place, int) for place in listed) else None


def _after_movedim(node: fx.Node, axis: int, size: int) -> int:
    def listed(value: Any) -> list[int]:
        return [int(place) % size for place in (value if isinstance(value, tuple | list) else [value])]

    sources = listed(argument(node, 1, "source"))
    goals = listed(argument(node, 2, "destination"))
    order: dict[int, int] = dict(zip(goals, sources, strict=True))
    rest = iter(place for place in range(size) if place not in sources)
    return [order[place] if place in order else next(rest) for place in range(size)].index(axis)


def _after_diagonal(node: fx.Node, axis: int, size: int) -> Axes:
    """Two axes give one, which is the last."""
    first, second = (-2, -1) if _name(node) == "linalg_diagonal" else (0, 1)
    one, two = argument(node, 2, "dim1"), argument(node, 3, "dim2")
    pair = {int(first if one is None else one) % size, int(second if two is None else two) % size}
    return (size - 2,) if axis in pair else (axis - sum(place < axis for place in pair),)


def _after_getitem(key: Any, axis: int, size: int, more: int) -> Axes:
    """An index by numbers drops axes, None adds one, a tensor of places may do either: `more` says by how many."""
    at = place = 0
    items = key if isinstance(key, tuple) else (key,)
    taken = sum(item is not None and item is not Ellipsis for item in items)
    for item in items:
        if at > axis:
            break
        if item is None:
            place += 1
        elif item is Ellipsis:
            if at + size - taken > axis:
                break
            at, place = at + size - taken, place + size - taken
        elif isinstance(item, int):
            if at == axis:
                return ()
            at += 1
        elif isinstance(item, slice):
            if at == axis:
                return (place,)
            at, place = at + 1, place + 1
        else:  # places, in a tensor or a list
            return (axis + more if at < axis else place,)
    return (place + axis - at,)


def _after_reshape(axis: int, before: Shape, after: Sequence[int]) -> Axes:
    """The axes that hold parts of the old one; the merged one where it was merged."""
    start, end = math.prod(before[:axis]), math.prod(before[: axis + 1])
    spans = [(math.prod(after[:place]), math.prod(after[: place + 1])) for place in range(len(after))]
    if end == start:  # of length 1: an axis of length 1 at its place, or what it was merged with
        alike = [place for place, (first, last) in enumerate(spans) if first == start and last == end]
        within = [place for place, (first, last) in enumerate(spans) if first <= start < last]
        return tuple((alike or within or [len(after) - 1])[:1])
    return tuple(place for place, (first, last) in enumerate(spans) if first < end and start < last)
