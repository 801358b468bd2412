"""Attribution methods from their text forms."""

from __future__ import annotations

import dataclasses
import re

from ..errors import InputError, StoreError, unknown
from ..keys import PathwayKey, parse_parameters
from ..selectors import names as selector_names
from ..selectors import parse as parse_selector
from ..selectors.registry import family, selector_type
from . import comparisons, hooked  # noqa: F401  they register themselves
from .pathway import MaskedGradient, Opened, PathwayGradient, RandomActive
from .registry import Method, method_names, registered

_OPENED = re.compile(r"(?P<method>[^*]+)\*(?P<size>[0-9]*)")
_SEEDED = re.compile(r"(?:seed=(?P<seed>[0-9]+):)?(?P<pathway>.*)")


def parse_method(text: str | Method) -> Method:
    """A method from its text form; raises `InputError` with the nearest names.

    >>> parse_method("random_active:seed=3:neuron_mct@0.9*")
    Opened(method=RandomActive(of='neuron_mct@0.9', seed=3), size=3)
    """
    if not isinstance(text, str):
        if isinstance(text, type) or not isinstance(text, Method):
            raise InputError(f"method: expected a method or its name, found {text!r}; for example 'grad_cam'")
        return text
    opened = _OPENED.fullmatch(text)
    if opened is not None:
        return Opened(parse_method(opened["method"]), int(opened["size"] or 3))
    name, _, rest = text.partition(":")
    if name == "masked_gradient":
        return MaskedGradient(_checked_pathway(rest, text))
    if name == "random_active":
        found = _SEEDED.fullmatch(rest)
        seed, pathway = (found["seed"], found["pathway"]) if found is not None else (None, rest)
        return RandomActive(_checked_pathway(pathway, text), int(seed or 0))
    if name not in method_names():
        if name.partition("@")[0] in selector_names():
            return PathwayGradient(_checked_pathway(text, text))
        raise InputError(unknown("method", name, _known()))
    kind = registered(name)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given = parse_parameters(f"method {text!r}", rest, fields, lambda each: (type(fields[each].default),))
    made: Method = kind(**given)
    return made


def _known() -> list[str]:
    pathways = [name if selector_type(name).single else f"{name}@0.9" for name in selector_names()]
    return [*method_names(), *pathways, "masked_gradient:neuron_mct@0.9", "random_active:neuron_mct@0.9"]


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
