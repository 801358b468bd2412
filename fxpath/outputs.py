"""The parts of a network's output: tuples, lists, dicts and named fields, nested in any way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import InputError

type_of_step: TypeAlias = str | int
type_of_part: TypeAlias = str | int | tuple[str | int, ...] | None

_SHOWN = 12  # parts of an output that a message lists


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _steps(value: Any) -> list[tuple[Any, Any]] | None:
    """What a container holds, by key, field name or index; None for what is no container."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if _is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def leaves(output: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Everything in an output that is no container, each with its path."""
    steps = _steps(output)
    if steps is None:
        yield path, output
        return
    for step, value in steps:
        yield from leaves(value, (*path, step))


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of an output."""
    return [leaf for _, leaf in leaves(output) if isinstance(leaf, Tensor)]


def mapped(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """The same output with every tensor passed through `function`."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not _is_dataclass(leaf):
            return leaf
        fields = [field.name for field in dataclasses.fields(leaf) if field.init]
        return dataclasses.replace(leaf, **{name: mapped(function, getattr(leaf, name)) for name in fields})

    return pytree.tree_map(of_leaf, output)


def plain(output: Any) -> Any:
    """The same output with dicts in place of dataclasses that torch does not know as containers."""

    def of_leaf(leaf: Any) -> Any:
        return {name: plain(value) for name, value in _steps(leaf) or ()} if _is_dataclass(leaf) else leaf

    return pytree.tree_map(of_leaf, output)


def checked_path(part: Any) -> type_of_part:
    """A key, an index, a field's name, or a tuple of them; raises `InputError` for all else."""
    steps = tuple(part) if isinstance(part, tuple | list) else () if part is None else (part,)
    if any(isinstance(step, bool) or not isinstance(step, str | int) for step in steps):
        raise InputError(
            f"output: expected a key, an index, a field's name, or a tuple of these, found {part!r}; a function of the "
            "output is a response of its own: response=function"
        )
    return steps if isinstance(part, tuple | list) else part


def written(path: Sequence[Any]) -> str:
    """A path as one types it.

    >>> written(("heads", 0))
    'heads/0'
    """
    return "/".join(map(str, path))


def read_path(text: str) -> type_of_part:
    """A path from its text; digits are an index (or a key of digits).

    >>> read_path("out"), read_path("heads/0")
    ('out', ('heads', 0))
    """
    steps = tuple(int(step) if step.removeprefix("-").isdecimal() else step for step in text.split("/"))
    return steps[0] if len(steps) == 1 else steps


def listing(output: Any) -> str:
    """What an output has: path, shape and type of each part."""
    found = list(leaves(output))
    if found and not found[0][0]:
        return _kind(output)
    shown = ", ".join(f"{written(path)} {_kind(leaf)}" for path, leaf in found[:_SHOWN])
    more = f", … {len(found)} in all" if len(found) > _SHOWN else ""
    return f"{type(output).__name__} of {shown}{more}" if found else f"an empty {type(output).__name__}"


def _kind(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
    return type(leaf).__name__


def part_of(output: Any, path: type_of_part) -> Any:
    """The part of an output at a path; raises `LookupError` with the path as far as it leads nowhere."""
    steps = path if isinstance(path, tuple) else (path,)
    value = output
    for count, step in enumerate(steps, 1):
        try:
            value = _step(value, step)
        except (LookupError, AttributeError, TypeError):
            raise LookupError(written(steps[:count])) from None
    return value


def _step(value: Any, step: Any) -> Any:
    if isinstance(value, Tensor):  # its first axis is the batch: an index would take a sample
        raise LookupError(step)
    if isinstance(value, Mapping):
        if step in value:
            return value[step]
        if str(step) in value:
            return value[str(step)]
        if type(value).__getitem__ is not dict.__getitem__:  # transformers' outputs have numbers too
            return value[step]
        raise LookupError(step)
    if isinstance(step, str):
        return value[int(step)] if isinstance(value, tuple | list) and step.isdecimal() else getattr(value, step)
    return value[step]


def obvious_part(output: Any, names: Sequence[str]) -> Any:
    """The part that needs no naming, or None: the only floating-point tensor, or the only one of these `names`."""
    floating = [tensor for tensor in tensors(output) if tensor.is_floating_point()]
    if len(floating) == 1:
        return floating[0]
    known = [value for step, value in _steps(output) or () if step in names and isinstance(value, Tensor)]
    return known[0] if len(known) == 1 else None
