"""Attribution methods from their text forms."""

from __future__ import annotations

import dataclasses

from ..errors import InputError, StoreError, unknown
from ..keys import PathwayKey, parse_parameters
from ..selectors import names as selector_names
from ..selectors import parse as parse_selector
from ..selectors.registry import family
from . import comparisons  # noqa: F401  they register themselves
from .pathway import OPENED, MaskedGradient, Opened, PathwayGradient
from .registry import Method, method_names, registered


def parse_method(text: str | Method) -> Method:
    """A method from its text form; raises `InputError` with the nearest names."""
    if not isinstance(text, str):
        return text
    if text.endswith(OPENED):
        return Opened(parse_method(text.removesuffix(OPENED)))
    name, _, rest = text.partition(":")
    if name == "masked_gradient":
        return MaskedGradient(_checked_pathway(rest, text))
    known = method_names()
    if name not in known:
        if name.partition("@")[0] in selector_names():
            return PathwayGradient(_checked_pathway(text, text))
        raise InputError(unknown("method", name, [*known, *(f"{each}@0.9" for each in selector_names())]))
    kind = registered(name)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given = parse_parameters(f"method {text!r}", rest, fields, lambda each: (type(fields[each].default),))
    made: Method = kind(**given)
    return made


def _checked_pathway(text: str, said: str) -> str:
    """A pathway key in its canonical form, its selector and parameters checked."""
    try:
        key = PathwayKey.parse(text)
    except StoreError:
        raise InputError(f"method {said!r}: expected a pathway, such as neuron_mct@0.9, found {text!r}") from None
    selector = parse_selector(key.family)
    if selector.single != (key.sparsity is None):
        wanted = "no sparsity, as it has one pathway alone" if selector.single else "a sparsity, such as @0.9"
        raise InputError(f"method {said!r}: expected {wanted}, found {text!r}")
    return str(dataclasses.replace(family(selector), sparsity=key.sparsity))
