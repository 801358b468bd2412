"""The protocol of attribution methods, and the registry of those that start from no pathway."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from ..errors import InputError
from ..keys import text_form
from ..network import Network
from ..pathways import Pathways
from ..samples import type_of_target

_methods: dict[str, type[Any]] = {}


@runtime_checkable
class Method(Protocol):
    """An attribution method: a frozen dataclass of its parameters."""

    @property
    def key(self) -> str:
        """Its text form, which names its maps in a store; `parse_method` reads it."""

    @property
    def pathway(self) -> str | None:
        """The key of the stored pathway that it starts from, None for methods that need none."""

    def attribute(
        self, network: Network, x: Any, target: type_of_target = None, pathways: Pathways | None = None
    ) -> Tensor:
        """Signed maps `(B, C, H, W)`, or `(B, 1, H, W)` where the method has no channels, detached, on x's device.

        `pathways` are those of the key `pathway`; without them they are selected here. Without a target it is the class
        that the network predicts for x. Raises `InputError` unless the network has one floating-point input, and
        `RestrictionError` within a restriction.
        """


M = TypeVar("M", bound=type[Any])


def register(method: M) -> M:
    """Class decorator: make a method known under its class attribute `name`."""
    _methods[method.name] = method
    return method


def method_names() -> tuple[str, ...]:
    """Names of the methods that start from no pathway."""
    return tuple(sorted(_methods))


def registered(name: str) -> type[Any]:
    """The class of a name that is in `method_names`."""
    return _methods[name]


class Compared:
    """What the methods that start from no pathway share: their text form."""

    name: ClassVar[str]
    pathway: ClassVar[None] = None

    @property
    def key(self) -> str:
        """Name and the parameters that are not at their default."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        changed = {field.name: getattr(self, field.name) for field in fields}
        return text_form(
            self.name, {each.name: changed[each.name] for each in fields if changed[each.name] != each.default}
        )


def require_whole(method: str, parameter: str, value: Any, least: int) -> None:
    """Raise `InputError` unless a parameter is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{method}: expected {parameter} to be a whole number ≥ {least}, found {value!r}")


def require_share(method: str, parameter: str, value: Any) -> None:
    """Raise `InputError` unless a parameter is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise InputError(f"{method}: expected {parameter} to be a number ≥ 0, found {value!r}")
