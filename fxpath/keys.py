"""Names as text: `name[:param=value,…]`, and that of a stored pathway, `<selector>[:param=value,…][@<sparsity>]`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from .errors import InputError, SparsityError, StoreError, unknown

type_of_parameter = bool | int | float | str

_MAP_KEY = re.compile(r"[a-z][A-Za-z0-9_:=.,@*+-]{0,199}")
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
        text = text_form(self.selector, dict(sorted(self.parameters.items())))
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


def checked_map_key(text: str) -> str:
    """The key of stored attribution maps, such as `neuron_mct@0.9*`; raises `StoreError` where it has another form.

    Only the form is looked at, as what there is to be named needs torch: at most 200 letters, digits and `_:=.,@*+-`.
    """
    if not _MAP_KEY.fullmatch(text):
        raise StoreError(
            "map key: expected <method>[:param=value,…] or a pathway's key, of letters, digits and _:=.,@*+- (at most "
            f"200), found {text[:200]!r}; for example gradient or neuron_mct@0.9*"
        )
    return text


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


def text_form(name: str, parameters: Mapping[str, type_of_parameter | None]) -> str:
    """A name with its parameters, those that are None left out.

    >>> text_form("margin", {"against": 3, "output": None})
    'margin:against=3'
    """
    shown = ",".join(
        f"{key}={value!r}" if isinstance(value, float) else f"{key}={value}"
        for key, value in parameters.items()
        if value is not None
    )
    return f"{name}:{shown}" if shown else name


def parse_parameters(
    said: str, text: str, known: Iterable[str], types: Callable[[str], tuple[type, ...]]
) -> dict[str, Any]:
    """The parameters of `param=value,…`, each of one of its `types`; text is taken as it is where only text will do.

    Raises `InputError`, which begins with `said`, for a parameter that is not `known` and for a value of another type.

    >>> parse_parameters("selector", "seed=3,rule=1", ["seed", "rule"], lambda name: (int if name == "seed" else str,))
    {'seed': 3, 'rule': '1'}
    """
    names = list(known)
    given: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            takes = f"parameters are {', '.join(names)}" if names else "there are no parameters"
            raise InputError(f"{said}: expected param=value, found {item!r}; {takes}")
        if name not in names:
            raise InputError(f"{said}: " + unknown("parameter", name, names))
        if name in given:
            raise InputError(f"{said}: {name} is given twice")
        wanted = types(name)
        parsed = value if wanted == (str,) else parse_value(value)
        if float in wanted and int not in wanted and isinstance(parsed, int) and not isinstance(parsed, bool):
            parsed = float(parsed)
        if not isinstance(parsed, wanted) or (isinstance(parsed, bool) and bool not in wanted):
            shown = " or ".join(each.__name__ for each in wanted)
            raise InputError(f"{said}: expected {name} to be {shown}, found {value!r}")
        given[name] = parsed
    return given
