"""The registry of selectors, and the text form `name:param=value,…` of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, get_args, get_type_hints, runtime_checkable

from ..errors import InputError, unknown
from ..keys import PathwayKey, parse_parameters
from ..pathways import Selection

if TYPE_CHECKING:
    from ..network import Network

GROUP = "fxpath.selectors"
_registered: dict[str, type[Selector]] = {}


@runtime_checkable
class Selector(Protocol):
    """A frozen dataclass of parameters that selects pathways.

    `key` is its name in the registry. `single` selectors have one pathway and no sparsity.
    """

    key: ClassVar[str]
    single: ClassVar[bool]

    def select(self, network: Network, samples: Any, sparsities: Sequence[float]) -> Selection:
        """Pathways for each sparsity that was reached, diagnostics, and scores where the method has them."""


S = TypeVar("S", bound=type[Any])


def register(selector: S) -> S:
    """Class decorator: make a selector known under its `key`."""
    if not dataclasses.is_dataclass(selector) or not isinstance(getattr(selector, "key", None), str):
        raise InputError(f"selector {selector.__name__}: expected a dataclass with a class attribute `key`")
    _registered[selector.key] = selector  # type: ignore[attr-defined,assignment]
    return selector


def names() -> tuple[str, ...]:
    """Keys of all selectors, those that entry points add included."""
    return tuple(sorted({*_registered, *(point.name for point in entry_points(group=GROUP))}))


def selector_type(key: str) -> type[Selector]:
    """The class of a key; raises `InputError` with the nearest names."""
    if key not in _registered:
        for point in entry_points(group=GROUP, name=key):
            register(point.load())
    if key not in _registered:
        raise InputError(unknown("selector", key, names()))
    return _registered[key]


def parameters(selector: Selector) -> dict[str, Any]:
    """The whole parameter set of a selector."""
    return dataclasses.asdict(selector)  # type: ignore[call-overload,no-any-return]


def family(selector: Selector) -> PathwayKey:
    """The selector's name in a store: its key and the parameters that are not at their default.

    Those that a class attribute `budget` names bound memory and change no more than last bits: they are left out. So
    are those that have the value in the attribute `implied`, which follows from the others.
    """
    budget, implied = getattr(selector, "budget", ()), getattr(selector, "implied", {})
    changed = {
        field.name: getattr(selector, field.name)
        for field in dataclasses.fields(selector)  # type: ignore[arg-type]
        if getattr(selector, field.name) != implied.get(field.name, field.default) and field.name not in budget
    }
    return PathwayKey(selector.key, changed)


def _types(kind: type[Selector], field: dataclasses.Field[Any]) -> tuple[type, ...]:
    """Types that a parameter's value may have: its default's, or those of an annotation such as `float | str`."""
    if "|" not in str(field.type):
        return (type(field.default),)
    return get_args(get_type_hints(kind)[field.name])


def parse(text: str | Selector) -> Selector:
    """A selector from its text form.

    >>> parse("random:seed=3")
    Random(seed=3, per_layer=False)
    """
    if not isinstance(text, str):
        if isinstance(text, type) or not isinstance(text, Selector):
            raise InputError(f"selector: expected a selector or its name, found {text!r}; for example 'neuron_mct'")
        return text
    key, _, rest = text.partition(":")
    kind = selector_type(key)
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given = parse_parameters(f"selector {text!r}", rest, known, lambda name: _types(kind, known[name]))
    return kind(**given)
