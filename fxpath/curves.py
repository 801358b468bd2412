"""Which activation an elementwise formula of one x is, by its values at some points."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .nodes import called_module, plain_name

_KEPT = {"detach", "clone", "lift_fresh_copy"}  # the type of what they are given
_KINDS = {
    "float": torch.float64, "double": torch.float64, "half": torch.float64, "bfloat16": torch.float64,
    "int": torch.int32, "long": torch.int64, "short": torch.int16, "byte": torch.uint8, "bool": torch.bool,
}  # fmt: skip
CASTS = _KEPT | set(_KINDS) | {"to", "type", "type_as", "_to_copy"}

_NEAR = [-3.5, -2.5, -1.5, -1e-3, -1e-2, -0.1, -0.25, 0.0, 1e-3, 1e-2, 0.1, 0.25, 1.5, 2.5, 3.5]
_FAR = [9.0, 12.0, 20.0, 50.0, 100.0]
_BASE = sorted({*(each / 4 for each in range(-32, 33)), *_NEAR, *_FAR, *(-far for far in _FAR)})
_CLOSE = 1e-3  # a formula's constants are rounded: 0.7979, 1.702, 0.1667


def floating(node: fx.Node) -> bool:
    """Whether a node is a cast that surely gives floating-point numbers as they were, or a copy."""
    name = plain_name(node)
    if name in _KEPT or name in _KINDS:
        return name in _KEPT or _KINDS[name].is_floating_point
    given = [*node.args[1:], *node.kwargs.values()]
    return name in ("to", "_to_copy") and not any(
        isinstance(each, fx.Node) or (isinstance(each, torch.dtype) and not each.is_floating_point) for each in given
    )


def _cast(name: str, value: Tensor, given: Iterable[Any]) -> Tensor:
    """As the cast does, with every floating-point type as the widest, and wherever the tensor is."""
    kind = _KINDS.get(name)
    for each in given:
        if isinstance(each, torch.dtype | Tensor):
            kind = each if isinstance(each, torch.dtype) else each.dtype
        elif name == "type" and isinstance(each, str):
            raise TypeError(f"{name} to {each!r}")  # one of torch's old types, as 'torch.IntTensor'
    if kind is None:
        return value
    return value.to(torch.float64 if kind.is_floating_point else kind)


@dataclass(frozen=True)
class Curve:
    """A formula's values at points: the ones that all formulas share, and others next to its own numbers."""

    points: Tensor
    values: Tensor

    def rectifier(self) -> tuple[str, float] | None:
        """`relu` where it is one but for a positive factor, `relu6` or `clamp` where it ends at 6 or elsewhere.

        And the factor.
        """
        above = self.points > 0
        slope = float(self.values[self.points == 1e-3][0]) / 1e-3
        if not slope > 0 or bool((self.values[~above] != 0).any()):
            return None
        line, given = slope * self.points[above], self.values[above]
        if torch.allclose(given, line, rtol=1e-6):
            return "relu", slope
        end = float(given.max())
        if not torch.allclose(given, line.clamp(max=end), rtol=1e-6):
            return None
        return "relu6" if abs(end - 6) < 1e-6 else "clamp", slope

    def kinks(self) -> tuple[float, ...]:
        """Where a rectifier, or one that leaks, bends: at 0, and where it ends if it does; () for anything else."""
        found = self.rectifier()
        if found is not None:
            return (0.0,) if found[0] == "relu" else (0.0, float(self.values.max()) / found[1])
        leak = float(self.values[self.points == -1e-3][0]) / -1e-3
        leaking = torch.allclose(self.values, F.leaky_relu(self.points, leak), rtol=1e-6)  # next to its numbers too
        return (0.0,) if leaking else ()

    def activation(self) -> tuple[str, float] | None:
        """The smooth activation that the values are a positive multiple of, and the factor."""
        x, y = (each[: len(_BASE)] for each in (self.points, self.values))
        if not bool(y.isfinite().all()):
            return None
        for name, reference in _REFERENCES.items():
            expected = reference(x)
            scale = float((y * expected).sum() / (expected * expected).sum())
            if scale > 0 and _alike(y, scale * expected, scale):
                return name, scale
        return _gated(x, y) or _bent(x, y)


def _alike(y: Tensor, expected: Tensor, scale: float = 1.0) -> bool:
    return torch.allclose(y, expected, rtol=1e-4, atol=_CLOSE * scale)


_REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "mish": F.mish, "hardswish": F.hardswish, "softplus": F.softplus, "softsign": F.softsign,
    "sigmoid": torch.sigmoid, "tanhshrink": F.tanhshrink, "hardsigmoid": F.hardsigmoid, "selu": F.selu,
}  # fmt: skip


def _at(x: Tensor, y: Tensor, point: float) -> float:
    return float(y[x == point][0])


def _gated(x: Tensor, y: Tensor) -> tuple[str, float] | None:
    """x · sigmoid(βx) with some β above 0: of 1.702 it is a quick GELU."""
    scale = _at(x, y, 1.0) - _at(x, y, -1.0)
    share = _at(x, y, 1.0) / scale if scale > 0 else 0.0
    if not 0.5 < share < 1:
        return None
    beta = math.log(share / (1 - share))
    if not _alike(y, scale * x * torch.sigmoid(beta * x), scale):
        return None
    return "quick_gelu" if abs(beta - 1.702) < _CLOSE else "silu", scale


def _bent(x: Tensor, y: Tensor) -> tuple[str, float] | None:
    """x above 0; below, a share of x or of exp(x) - 1."""
    below = -_at(x, y, -100.0)
    if 0 < below < 100 and torch.allclose(y, F.leaky_relu(x, below / 100), rtol=1e-6):
        return "leaky_relu", 1.0
    return ("elu", 1.0) if below > 10 * _CLOSE and _alike(y, F.elu(x, below)) else None


def curve(node: fx.Node, x: fx.Node, numbers: Mapping[fx.Node, float], own: Iterable[float]) -> Curve | None:
    """What a node makes of x, every other source a number; None where that cannot be run.

    Runs torch's own functions, and `forward` of its modules without hooks, on copies of some points. `own` are the
    numbers that the formula is made of: it may bend there.
    """
    bends = {sign * each + step for each in own for sign in (1, -1) for step in (-1e-3, 0, 1e-3) if abs(each) < 1e6}
    points = torch.tensor([*_BASE, *sorted(bends)], dtype=torch.float64, device="cpu")
    known: dict[fx.Node, Any] = {
        source: torch.tensor(value, dtype=torch.float64, device="cpu") for source, value in numbers.items()
    }
    known[x] = points
    try:
        with torch.no_grad():
            values = _value(node, known)
    except Exception:  # of whatever kind: what these points cannot be given to is judged by its structure
        return None
    real = type(values) is Tensor  # a fake one, under a mode of the caller's, has no values
    fits = real and values.shape == points.shape and values.is_floating_point()
    return Curve(points, values.double()) if fits else None


def _value(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node not in known:
        known[node] = _run(node, known)
    value = known[node]
    return value.clone() if isinstance(value, Tensor) else value  # some work in place


def _run(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: _value(each, known))
    name = plain_name(node)
    if name in CASTS:
        given = [*args, *kwargs.values()]
        value: Any = kwargs.get("input", kwargs.get("self", args[0] if args else None))
        return _cast(name, value, [each for each in given if each is not value])
    module = called_module(node)
    if module is not None:
        return module.forward(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op != "call_function" or not callable(node.target):
        raise TypeError(f"{node.op} of {node.target}")
    return node.target(*args, **kwargs)
