"""Activations that are written out as formulas: `torch.where(x > 0, x, 0)`, `x * (x > 0)`, `x * sigmoid(x)` …

Which operations a formula is made of says what it may be, and its values at some points what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .curves import CASTS, Curve, curve, floating
from .nodes import altered, argument, called_module, plain_name

_SAME = {  # torch's other names
    "absolute": "abs", "negative": "neg", "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le",
}  # fmt: skip
_ABOVE, _BELOW = {"gt", "ge"}, {"lt", "le"}
_PRODUCT = {"mul"}
_QUOTIENT = {"div", "truediv"}
_DIFFERENCE = {"sub", "rsub"}
_LOGARITHM = {"log", "log1p"}
_GATES = {"sigmoid", "expit", "tanh", "erf", "hardsigmoid", "relu6", "hardtanh", "clamp", "clip", "softplus", "exp"}
_STEPS = _ABOVE | _BELOW | {"sign", "heaviside"}
_CLAMPS = {"clamp", "clip", "clamp_min"}
_ELEMENTWISE = (
    _PRODUCT | CASTS | _GATES | _STEPS | _CLAMPS
    | _QUOTIENT | _DIFFERENCE | _LOGARITHM
    | {"add", "pow", "square", "neg", "abs", "sqrt", "rsqrt", "reciprocal",
       "expm1", "where", "maximum", "minimum", "clamp_max"}
)  # fmt: skip
_MODULES: dict[type[nn.Module], str] = {  # those that formulas are made of
    getattr(nn, name): name.lower() for name in ("Sigmoid", "Tanh", "Hardsigmoid", "ReLU6", "Hardtanh", "Softplus")
}
_CONSTANTS = ("_tensor_constant", "lifted_tensor")
_MAXIMUM = {"maximum", "max", "fmax"}
_LAST = _PRODUCT | _QUOTIENT | _DIFFERENCE | _MAXIMUM | _LOGARITHM | {"where", "reciprocal"}  # of formulas of one x
_OF_RECTIFIERS = {"hardswish"}  # by definition; any other formula leaves a rectifier within it to be one
_FULL = {
    "scalar_tensor": (0, "s"), "tensor": (0, "data"), "full": (1, "fill_value"), "full_like": (1, "fill_value"),
    "new_full": (2, "fill_value"),
}  # fmt: skip
_LARGEST = 16  # nodes of a formula


def _name(node: fx.Node) -> str | None:
    """The plain name of what a node computes, also where a module of torch.nn's computes it that nothing alters."""
    module = called_module(node)
    if module is not None:
        return None if altered(module) else _MODULES.get(type(module))
    name = plain_name(node)
    return _SAME.get(name, name) if name is not None else None


@dataclass(frozen=True)
class Formula:
    """A written-out activation: its last node, its operation, whether it is a rectifier, and the nodes within it.

    It is one of `x`; `kinks` are the x between which it is linear, () where it is curved or that is not known.
    """

    node: fx.Node
    op: str
    rectifier: bool
    within: frozenset[fx.Node]
    x: fx.Node
    kinks: tuple[float, ...] = ()


def formulas_of(graph: fx.Graph) -> list[Formula]:
    """Every formula that the graph spells out; a node is part of one at most, the largest.

    One that is no rectifier gives way to a rectifier within it, unless it is made of one by definition.
    """
    candidates = [formula for node in reversed(graph.nodes) if (formula := _formula(node)) is not None]
    rectifiers = {formula.node for formula in candidates if formula.rectifier}
    found: list[Formula] = []
    taken: set[fx.Node] = set()
    for formula in candidates:
        gives_way = not formula.rectifier and formula.op not in _OF_RECTIFIERS
        if gives_way and any(each in rectifiers or _rectifies(each) for each in formula.within):
            continue
        if not taken & {formula.node, *formula.within}:
            found.append(formula)
            taken |= {formula.node, *formula.within}
    return found[::-1]


def _formula(node: fx.Node) -> Formula | None:
    name = _name(node)
    formula = _rectifier(node, name)
    return _of_one(node, str(name)) if formula is None and name in _LAST else formula


def _rectifies(node: fx.Node) -> bool:
    """Whether a node is a rectifier by itself: `relu6`, a clamp or a Hardtanh that begins at 0."""
    name, module = _name(node), called_module(node)
    if name == "hardtanh":
        return is_zero(argument(node, 1, "min_val") if module is None else module.min_val)
    if name in _CLAMPS:
        return is_zero(argument(node, 1, "min")) and not isinstance(argument(node, 2, "max"), fx.Node)
    return name == "relu6"


def _number(value: Any) -> float | None:
    """A number, or the one that a tensor is full of which the graph makes or holds as a constant."""
    if isinstance(value, fx.Node):
        name = plain_name(value)
        if name in ("zeros_like", "zeros", "new_zeros"):
            return 0.0
        if name in ("ones_like", "ones", "new_ones"):
            return 1.0
        if name in _FULL:
            place, called = _FULL[name]
            return _number(argument(value, place, called))
        if name in CASTS:
            number = _number(argument(value, 0, "input", "self"))
            return number if number is None or floating(value) or number in (0, 1) else None
        constant = str(value.target).startswith(_CONSTANTS)  # made while tracing; a buffer may change
        return _held(value) if constant else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _held(node: fx.Node) -> float | None:
    """The one number that a graph's tensor holds, if it is no parameter."""
    if node.op != "get_attr" or node.graph.owning_module is None:
        return None
    held: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        held = getattr(held, part)
    plain = isinstance(held, torch.Tensor) and not isinstance(held, nn.Parameter) and not held.is_meta
    return float(held) if plain and held.numel() == 1 and not held.is_complex() else None


def is_zero(value: Any) -> bool:
    """A zero by number, or a tensor of zeros that the graph makes or holds."""
    return _number(value) == 0


def _uncast(node: Any, *, exactly: bool = False) -> Any:
    """What casts and copies were made of; exactly where none of them may have rounded it."""
    while isinstance(node, fx.Node) and (floating(node) if exactly else _name(node) in CASTS):
        node = argument(node, 0, "input", "self")
    return node


def _compared(node: Any) -> tuple[fx.Node, bool] | None:
    """x and whether it is `x > 0` rather than `x < 0` (or with equality); casts are looked through."""
    node = _uncast(node)
    if isinstance(node, fx.Node) and _name(node) == "heaviside":
        step = _uncast(argument(node, 0, "input", "self"), exactly=True)  # detached before: it has no gradient
        return (step, True) if isinstance(step, fx.Node) else None
    if not isinstance(node, fx.Node) or _name(node) not in _ABOVE | _BELOW:
        return None
    left, right = argument(node, 0, "input", "self"), argument(node, 1, "other")
    above = _name(node) in _ABOVE
    if isinstance(left, fx.Node) and is_zero(right):
        return left, above
    return (right, not above) if isinstance(right, fx.Node) and is_zero(left) else None


def _choice(node: fx.Node) -> tuple[Any, Any, Any]:
    """Condition, first and second value of a `where`, as a function or a method of the first."""
    if node.op == "call_method":
        return argument(node, 1, "condition"), node.args[0], argument(node, 2, "other")
    return argument(node, 0, "condition"), argument(node, 1, "input", "self"), argument(node, 2, "other")


def _rectifier(node: fx.Node, name: str | None) -> Formula | None:
    """`where(x > 0, x, 0)`, `masked_fill(x, x < 0, 0)`, `x * (x > 0)`, `maximum(x, 0)`, `(x + |x|) / 2`."""
    x: Any = None
    first, second = argument(node, 0, "input", "self"), argument(node, 1, "other")
    if name == "where":
        condition, one, two = _choice(node)
        compared = _compared(condition)
        if compared is not None:
            kept, other = (one, two) if compared[1] else (two, one)
            x = kept if kept is compared[0] and is_zero(other) else None
    elif name == "masked_fill":
        mask, value = argument(node, 1, "mask"), argument(node, 2, "value")
        x = first if _compared(mask) == (first, False) and is_zero(value) else None
    elif name in _PRODUCT:
        x = next((one for one, two in ((first, second), (second, first)) if _compared(two) == (one, True)), None)
        x = x or next((_halved(one) for one, two in ((first, second), (second, first)) if _positive(two)), None)
    elif name in _QUOTIENT:
        x = _halved(first) if _positive(second) else None
    elif name == "add":
        x = _doubled(node)
    elif name in _MAXIMUM:  # max(x, 0) with the number 0 is a maximum along axis 0
        x = first if isinstance(second, fx.Node) and is_zero(second) else None
        x = second if isinstance(first, fx.Node) and is_zero(first) else x
    if not isinstance(x, fx.Node):
        return None
    closed = _closure(node, x)
    drawn = _curve(node, x, closed) if closed is not None else None
    if drawn is not None and drawn.rectifier() is None:
        return None
    alone = closed is not None and _private(node, closed)
    within = frozenset(closed - {node}) if closed is not None and alone else frozenset[fx.Node]()
    return Formula(node, "relu", True, within, x, (0.0,) if drawn is None else drawn.kinks())


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _halved(node: Any) -> fx.Node | None:
    """As `_doubled` of a factor; a sum that is read elsewhere too is the rectifier itself."""
    return _doubled(node) if isinstance(node, fx.Node) and len(node.users) == 1 else None


def _doubled(node: Any) -> fx.Node | None:
    """The x of `x + |x|`, which is twice its rectifier."""
    if not isinstance(node, fx.Node) or _name(node) != "add" or node.kwargs.get("alpha", 1) != 1:
        return None
    first, second = argument(node, 0, "input", "self"), argument(node, 1, "other")
    for one, two in ((first, second), (second, first)):
        if isinstance(one, fx.Node) and isinstance(two, fx.Node) and _name(two) == "abs":
            return one if argument(two, 0, "input", "self") is one else None
    return None


def _elementwise(node: fx.Node) -> bool:
    if _name(node) in ("max", "min"):  # of two tensors, and along no axis
        return isinstance(argument(node, 1, "other"), fx.Node)
    return _name(node) in _ELEMENTWISE or (node.target is getattr and node.args[1] in ("dtype", "device"))


def _closure(node: fx.Node, x: fx.Node) -> set[fx.Node] | None:
    """Everything that an elementwise formula of x alone is made of; None where it reads anything else.

    Numbers, parameters and buffers may take part.
    """
    inside = {node}
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source is x or source in inside or source.op == "get_attr" or _number(source) is not None:
                continue
            if not _elementwise(source) or len(inside) >= _LARGEST:
                return None
            inside.add(source)
            waiting.append(source)
    return inside


def _private(node: fx.Node, closed: set[fx.Node]) -> bool:
    """Whether nothing else reads what leads to the node; export's checks of a cast's type read no values."""
    users = {user for each in closed - {node} for user in each.users} - closed
    return all(_name(user) == "_assert_tensor_metadata" for user in users)


def _curve(node: fx.Node, x: fx.Node, closed: set[fx.Node]) -> Curve | None:
    """What the formula makes of some x: a parameter stands for 1, as does a buffer of several numbers."""
    numbers: dict[fx.Node, float] = {}
    for source in _given(x, closed):
        number = _number(source)
        number = _held(source) if number is None else number
        numbers[source] = 1.0 if number is None else number
    own = [each for inner in closed for given in (inner.args, inner.kwargs.values()) for each in given]
    return curve(node, x, numbers, [*numbers.values(), *(each for each in own if isinstance(each, int | float))])


def _given(x: fx.Node, closed: set[fx.Node]) -> list[fx.Node]:
    """What a formula reads besides x."""
    return [each for inner in closed for each in inner.all_input_nodes if each is not x and each not in closed]


def _of_one(node: fx.Node, name: str) -> Formula | None:
    """A formula of one x.

    x · g(x) with g made of sigmoid, tanh, erf … (SiLU, GELU, Mish, Hardswish); x / (1 + |x|); 1 / (1 + exp(-x));
    log(1 + exp(x)); x - tanh(x); max(x, 0.1 x); what `where` puts together of pieces, by comparing x or |x|. Of these,
    a product with a step and the pieces of `where` may be rectifiers, by constants alone.
    """
    sources = [node]
    seen: set[fx.Node] = set()
    while sources:  # nearest x first, so that what made x is no part of the formula
        x = sources.pop(0)
        closed = _closure(node, x) if x is not node else None
        if closed is not None and _private(node, closed):
            names = {str(_name(each)) for each in _led(x, closed) - {node}}
            formula = _read(node, name, x, names, closed) if _may_be(node, name, x, names, closed) else None
            if formula is not None:
                return formula
        for source in x.all_input_nodes:
            if source not in seen and len(seen) < _LARGEST and (x is node or _elementwise(x)):
                seen.add(source)
                sources.append(source)
    return None


def _may_be(node: fx.Node, name: str, x: fx.Node, within: set[str], closed: set[fx.Node]) -> bool:
    """Whether a formula is made as activations are, by its last operation and the names of those that x leads to."""
    first, second = argument(node, 0, "input", "self"), argument(node, 1, "other")
    if name == "where":
        return _decides(node, closed)
    if name in _PRODUCT:
        return bool(within & (_GATES | _STEPS)) and _reaches_plainly(node, x, closed)
    if name in _MAXIMUM:
        return first is x or second is x
    if name in _DIFFERENCE:
        return (second if name == "rsub" else first) is x and "tanh" in within
    if name in _QUOTIENT and first is x:
        return bool(within & {"exp", "abs"})
    return "exp" in within and (name not in _QUOTIENT or _number(first) == 1)


def _read(node: fx.Node, name: str, x: fx.Node, within: set[str], closed: set[fx.Node]) -> Formula | None:
    """The formula by its values; a product with a gate and what `where` puts together are activations in any case."""
    drawn = _curve(node, x, closed)
    constant = all(_number(each) is not None for each in _given(x, closed))  # parameters and buffers may change
    product, pieces = name in _PRODUCT, name == "where"
    bends = constant and (pieces or (product and bool(within & _STEPS)))
    found = drawn.rectifier() if drawn is not None and bends else None
    rectifier = found is not None
    if drawn is not None and not rectifier:
        found = drawn.activation()
    if found is None or not (rectifier or product or abs(found[1] - 1) < 1e-3):
        found = ("piecewise", 1.0) if pieces else ("self_gated", 1.0) if product and within & _GATES else None
    if found is None:
        return None
    op, scale = found
    last = _scaled(node, scale) if product else node
    kinks = drawn.kinks() if drawn is not None and constant and (rectifier or op == "leaky_relu") else ()
    return Formula(last, op, rectifier, frozenset((closed | {node}) - {last}), x, kinks)


def _led(x: fx.Node, closed: set[fx.Node]) -> set[fx.Node]:
    """The nodes of a formula that depend on x."""
    led: set[fx.Node] = set()
    waiting = [x]
    while waiting:
        more = {user for user in waiting.pop().users if user in closed and user not in led}
        led |= more
        waiting += more
    return led


def _decides(node: fx.Node, closed: set[fx.Node]) -> bool:
    """Whether what `where` decides by is a comparison within the formula."""
    condition = _choice(node)[0]
    return isinstance(condition, fx.Node) and condition in closed and _name(condition) in (*_ABOVE, *_BELOW)


def _reaches_plainly(node: fx.Node, x: fx.Node, closed: set[fx.Node]) -> bool:
    """Whether x is a factor of the product itself, by no more than a number."""
    factors = [each for each in node.args if isinstance(each, fx.Node)]
    while factors:
        factor = factors.pop()
        if factor is x:
            return True
        if factor in closed and _name(factor) in _PRODUCT | _QUOTIENT:
            inner = factor.all_input_nodes
            factors += inner if len(inner) == 1 else []
    return False


def _scaled(node: fx.Node, scale: float) -> fx.Node:
    """The formula's last node where a factor that undoes its scale (½ of GELU, 1/6 of Hardswish) comes after it."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if abs(scale - 1) < 1e-3 or user is None or len(user.args) != 2:
        return node
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, int | float) or other == 0 or user.kwargs:
        return node
    divided = _name(user) in _QUOTIENT and user.args[0] is node and abs(scale / other - 1) < 1e-3
    times = _name(user) in _PRODUCT and abs(scale * other - 1) < 1e-3
    return user if divided or times else node


def by_node(formulas: list[Formula]) -> tuple[Mapping[fx.Node, Formula], frozenset[fx.Node]]:
    """The formulas by their last nodes, and all the nodes within them."""
    within: frozenset[fx.Node] = frozenset().union(*(formula.within for formula in formulas))
    return {formula.node: formula for formula in formulas}, within
