"""The name of a stored pathway: `<selector>[:param=value,…][@<sparsity>]`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from .errors import SparsityError, StoreError

type_of_parameter = bool | int | float | str

_KEY = re.compile(r"(?P<selector>[a-z][a-z0-9_]*)(?::(?P<parameters>[^@/]+))?(?:@(?P<sparsity>[^@/]+))?")


def exact_sparsity(sparsity: float | str | Decimal) -> Decimal:
    """A sparsity κ in [0, 1) as the exact decimal that was typed: 0.9 is 9/10, not its binary neighbour.

    Raises `SparsityError` for anything outside [0, 1) or not a number.

    >>> exact_sparsity(0.9)
    Decimal('0.9')
    """
    try:
        exact = Decimal(repr(float(sparsity)) if isinstance(sparsity, float) else str(sparsity))
    except InvalidOperation:
        raise SparsityError(f"sparsity: expected a number in [0, 1), found {sparsity!r}; for example 0.9") from None
    if not (exact.is_finite() and 0 <= exact < 1):
        raise SparsityError(
            f"sparsity: expected a share in [0, 1), found {sparsity}; it is the share of all neurons that is left "
            "out, so 0.9 keeps one neuron in ten"
        )
    return exact


def checked_sparsities(sparsities: Any) -> tuple[float, ...]:
    """Several sparsities, each in [0, 1); raises `SparsityError` for one that is not, and for a bare number."""
    if isinstance(sparsities, str) or not isinstance(sparsities, Iterable):
        raise SparsityError(f"sparsities: expected a sequence such as (0.8, 0.9), found {sparsities!r}")
    levels = tuple(sparsities)
    for level in levels:
        exact_sparsity(level)
    return levels


@dataclass(frozen=True)
class PathwayKey:
    """Selector, its non-default parameters and the sparsity of one stored pathway.

    >>> str(PathwayKey("random", {"seed": 3}, 0.9))
    'random:seed=3@0.9'
    >>> PathwayKey.parse("active")
    PathwayKey(selector='active', parameters={}, sparsity=None)
    """

    selector: str
    parameters: Mapping[str, type_of_parameter] = field(default_factory=dict)
    sparsity: float | None = None

    @property
    def family(self) -> str:
        """The key without its sparsity: pathways of one family differ in sparsity alone."""
        return str(PathwayKey(self.selector, self.parameters))

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        text = self.selector
        if self.parameters:
            shown = (
                f"{name}={value!r}" if isinstance(value, float) else f"{name}={value}"
                for name, value in sorted(self.parameters.items())
            )
            text += ":" + ",".join(shown)
        return text if self.sparsity is None else f"{text}@{float(self.sparsity)!r}"

    @classmethod
    def parse(cls, text: str) -> PathwayKey:
        """Read a key back; raises `StoreError` where the text is none."""
        match = _KEY.fullmatch(text)
        if match is None:
            raise StoreError(
                f"pathway key: expected <selector>[:param=value,…][@<sparsity>], found {text!r}; "
                "for example neuron_mct@0.9"
            )
        parameters: dict[str, type_of_parameter] = {}
        for item in filter(None, (match["parameters"] or "").split(",")):
            name, equals, value = item.partition("=")
            if not (name and equals):
                raise StoreError(f"pathway key {text!r}: expected param=value, found {item!r}")
            parameters[name] = parse_value(value)
        sparsity = match["sparsity"]
        return cls(match["selector"], parameters, None if sparsity is None else float(exact_sparsity(sparsity)))


def parse_value(text: str) -> type_of_parameter:
    """A parameter's value as it is typed: true/false, a whole number, a decimal number, or text.

    >>> parse_value("1"), parse_value("0.5"), parse_value("True"), parse_value("r")
    (1, 0.5, True, 'r')
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
