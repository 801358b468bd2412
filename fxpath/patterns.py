"""Activations that are written out as formulas: `torch.where(x > 0, x, 0)`, `x * (x > 0)`, `x * sigmoid(x)` …"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .nodes import altered, argument, called_module, plain_name

_SAME = {  # torch's other names
    "absolute": "abs", "negative": "neg", "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le",
}  # fmt: skip
_ABOVE, _BELOW = {"gt", "ge"}, {"lt", "le"}
_PRODUCT = {"mul"}
_QUOTIENT = {"div", "truediv"}
_DIFFERENCE = {"sub", "rsub"}
_CASTS = {
    "to", "float", "double", "half", "bfloat16", "type", "type_as", "_to_copy", "detach", "lift_fresh_copy", "clone",
}  # fmt: skip
_GATES = {"sigmoid", "expit", "tanh", "erf", "hardsigmoid", "relu6", "hardtanh", "clamp", "clip", "softplus", "exp"}
_ELEMENTWISE = (
    _ABOVE | _BELOW | _PRODUCT | _CASTS | _GATES
    | _QUOTIENT | _DIFFERENCE
    | {"add", "pow", "square", "neg", "abs", "sign", "log1p", "log", "sqrt", "rsqrt", "reciprocal",
       "expm1", "where", "maximum", "minimum", "clamp_min", "clamp_max", "heaviside"}
)  # fmt: skip
_MODULES: dict[type[nn.Module], str] = {  # those that formulas are made of
    getattr(nn, name): name.lower() for name in ("Sigmoid", "Tanh", "Hardsigmoid", "ReLU6", "Hardtanh", "Softplus")
}
_CONSTANTS = ("_tensor_constant", "lifted_tensor")
_MAXIMUM = {"maximum", "max", "fmax"}
_LAST = _PRODUCT | _QUOTIENT | _DIFFERENCE | _MAXIMUM | {"where", "log", "log1p", "reciprocal"}  # of formulas of one x
_QUOTIENTS = {frozenset({"abs", "add"}): "softsign", frozenset({"neg", "exp", "add"}): "silu"}  # of x, by these
_INVERSES = {frozenset({"neg", "exp", "add"}): "sigmoid"}  # of what these make of x
_LOGARITHMS = {("log1p", frozenset({"exp"})): "softplus", ("log", frozenset({"exp", "add"})): "softplus"}
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
    """A written-out activation: its last node, its operation, whether it is a rectifier, and the nodes within it."""

    node: fx.Node
    op: str
    rectifier: bool
    within: frozenset[fx.Node]


def formulas_of(graph: fx.Graph) -> list[Formula]:
    """Every formula that the graph spells out; a node is part of one at most, the largest."""
    found: list[Formula] = []
    taken: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        name = _name(node)
        formula = _rectifier(node, name)
        if formula is None and name in _LAST:
            formula = _of_one(node, str(name))
        if formula is not None and not taken & {formula.node, *formula.within}:
            found.append(formula)
            taken |= {formula.node, *formula.within}
    return found[::-1]


def _number(value: Any) -> float | None:
    """A number, or the one that a tensor is full of which the graph makes or holds as a constant."""
    if isinstance(value, fx.Node):
        name = plain_name(value)
        if name in ("zeros_like", "zeros", "new_zeros"):
            return 0.0
        if name in ("scalar_tensor", "tensor", "full_like", "full", "new_full"):
            return _number(value.args[-1] if value.args else None)
        if name in _CASTS:
            return _number(value.args[0])
        constant = str(value.target).startswith(_CONSTANTS)  # made while tracing; a buffer may change
        if value.op == "get_attr" and constant and value.graph.owning_module is not None:
            held: Any = value.graph.owning_module
            for part in str(value.target).split("."):
                held = getattr(held, part)
            plain = isinstance(held, torch.Tensor) and not isinstance(held, torch.nn.Parameter) and not held.is_meta
            return float(held) if plain and held.numel() == 1 and not held.is_complex() else None
        return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def is_zero(value: Any) -> bool:
    """A zero by number, or a tensor of zeros that the graph makes or holds."""
    return _number(value) == 0


def _compared(node: Any) -> tuple[fx.Node, bool] | None:
    """x and whether it is `x > 0` rather than `x < 0` (or with equality); casts are looked through."""
    while isinstance(node, fx.Node) and _name(node) in _CASTS:
        node = node.args[0]
    if isinstance(node, fx.Node) and _name(node) == "heaviside":
        step = argument(node, 0, "input", "self")
        while isinstance(step, fx.Node) and _name(step) in _CASTS:  # it has no gradient: x is detached before
            step = step.args[0]
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
    return Formula(node, "relu", True, _between(node, x))


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


def _leak(node: fx.Node, x: fx.Node) -> bool:
    """Whether a maximum is one of x and a share of it, `max(x, 0.1 * x)`."""
    others = [each for each in node.all_input_nodes if each is not x]
    if x not in node.args or len(others) != 1 or _name(others[0]) not in _PRODUCT:
        return False
    factors = [each for each in others[0].args if each is not x]
    return len(factors) == 1 and isinstance(factors[0], int | float) and 0 < factors[0] < 1


def _between(node: fx.Node, x: fx.Node) -> frozenset[fx.Node]:
    """The nodes that lead from x to the node and serve nothing else."""
    closed = _closure(node, x, zeros=True)
    return frozenset() if closed is None else frozenset(closed - {node})


def _closure(node: fx.Node, x: fx.Node, *, zeros: bool = False) -> set[fx.Node] | None:
    """Everything that an elementwise formula of x alone is made of; None where it reads anything else.

    Parameters and numbers may take part, and where it says so tensors of zeros.
    """
    inside = {node}
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source is x or source.op == "get_attr" or source in inside:
                continue
            if zeros and is_zero(source):
                continue
            if _name(source) not in _ELEMENTWISE or len(inside) >= _LARGEST:
                return None
            inside.add(source)
            waiting.append(source)
    if any(user not in inside for each in inside - {node} for user in each.users):
        return None
    return inside


def _of_one(node: fx.Node, name: str) -> Formula | None:
    """A formula of one x that is no rectifier.

    x · g(x) with g made of sigmoid, tanh, erf … (SiLU, GELU, Mish, Hardswish); x / (1 + |x|); 1 / (1 + exp(-x));
    log(1 + exp(x)); x - tanh(x); max(x, 0.1 x); what `where` puts together of pieces, by comparing x or |x|.
    """
    sources = [node]
    seen: set[fx.Node] = set()
    while sources:  # nearest x first, so that what made x is no part of the formula
        x = sources.pop(0)
        closed = _closure(node, x) if x is not node else None
        if closed is not None:
            within = {str(_name(each)) for each in closed if each is not node and _reads(each, x, closed)}
            kinds = {each for each in within if each in _GATES}
            if name == "where":
                return Formula(node, "piecewise", False, frozenset(closed - {node})) if _decides(node, closed) else None
            op = None if name in _PRODUCT else _by_inner(node, name, x, frozenset(within), closed)
            if op is not None:
                return Formula(node, op, False, frozenset(closed - {node}))
            if name in _PRODUCT and kinds and _reaches_plainly(node, x, closed):
                last, more = _scaled(node, kinds)
                return Formula(last, _called(kinds, closed), False, frozenset((closed | more) - {last}))
        for source in x.all_input_nodes:
            if source not in seen and len(seen) < _LARGEST and (x is node or _name(x) in _ELEMENTWISE):
                seen.add(source)
                sources.append(source)
    return None


def _by_inner(node: fx.Node, name: str, x: fx.Node, within: frozenset[str], closed: set[fx.Node]) -> str | None:
    """The activation that a quotient, an inverse, a logarithm, a difference or a maximum is, by what is within."""
    if name in _MAXIMUM:
        return "leaky_relu" if _leak(node, x) else None
    first, second = argument(node, 0, "input", "self"), argument(node, 1, "other")
    if name in _DIFFERENCE:
        from_x, taken = (second, first) if name == "rsub" else (first, second)
        shrinks = from_x is x and within == {"tanh"} and len(closed) == 2 and _name(taken) == "tanh"
        return "tanhshrink" if shrinks and node.kwargs.get("alpha", 1) == 1 else None
    if "add" in within and not _plus_one(closed):
        return None
    if name in ("log", "log1p"):
        return _LOGARITHMS.get((name, within))
    if name == "reciprocal" or _number(first) == 1:
        return _INVERSES.get(within)
    return _QUOTIENTS.get(within) if first is x else None


def _plus_one(closed: set[fx.Node]) -> bool:
    """Whether every sum in a formula adds 1."""
    sums = [each for each in closed if _name(each) == "add"]
    return all(
        each.kwargs.get("alpha", 1) == 1 and any(_number(term) == 1 for term in (*each.args, *each.kwargs.values()))
        for each in sums
    )


def _decides(node: fx.Node, closed: set[fx.Node]) -> bool:
    """Whether what `where` decides by is a comparison within the formula."""
    condition = _choice(node)[0]
    return isinstance(condition, fx.Node) and condition in closed and _name(condition) in (*_ABOVE, *_BELOW)


def _reads(node: fx.Node, x: fx.Node, closed: set[fx.Node]) -> bool:
    sources = node.all_input_nodes
    return x in sources or any(_reads(source, x, closed) for source in sources if source in closed)


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


def _scaled(node: fx.Node, kinds: set[str]) -> tuple[fx.Node, set[fx.Node]]:
    """The formula's last node where a factor of its own (½ of GELU, 1/6 of Hardswish) comes after the product."""
    factor = 2.0 if kinds & {"erf", "tanh"} else 6.0 if kinds & {"relu6", "hardtanh", "clamp", "clip"} else None
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if factor is None or user is None or len(user.args) != 2:
        return node, set()
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, int | float):
        return node, set()
    divided = _name(user) in _QUOTIENT and user.args[0] is node and abs(other - factor) < 1e-6
    times = _name(user) in _PRODUCT and abs(other * factor - 1) < 1e-6
    return (user, {node, user}) if divided or times else (node, set())


def _called(kinds: set[str], closed: set[fx.Node]) -> str:
    by_exp = _plus_one(closed)
    if "erf" in kinds:
        return "gelu"
    if "tanh" in kinds:
        return "gelu" if not kinds & {"softplus", "exp"} else "mish" if "exp" not in kinds or by_exp else "self_gated"
    if kinds & {"relu6", "hardtanh", "hardsigmoid", "clamp", "clip"}:
        return "hardswish"
    if kinds & {"sigmoid", "expit"} or (
        kinds == {"exp"} and by_exp and {"neg", "add"} <= {_name(each) for each in closed}
    ):
        scaled = [each for each in closed if _name(each) in _PRODUCT and any(_near(a, 1.702) for a in each.args)]
        return "quick_gelu" if scaled else "silu"
    return "self_gated"


def _near(value: Any, number: float) -> bool:
    return isinstance(value, int | float) and abs(value - number) < 1e-3


def by_node(formulas: list[Formula]) -> tuple[Mapping[fx.Node, Formula], frozenset[fx.Node]]:
    """The formulas by their last nodes, and all the nodes within them."""
    within: frozenset[fx.Node] = frozenset().union(*(formula.within for formula in formulas))
    return {formula.node: formula for formula in formulas}, within
