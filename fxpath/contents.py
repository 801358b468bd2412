"""Values as text that tells them from others: what functions and objects hold, wherever and whenever they were made."""

from __future__ import annotations

import copyreg
import functools
import hashlib
from collections.abc import Iterable
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .digests import bytes_of, strided


def contents(value: Any) -> str:
    """What tells a function, or a value that it holds, from others: code without where it was written, contents.

    Objects are told apart by what pickle would keep of them, by their attributes where it takes none.
    """
    return _Reader().said(value)


class _Reader:
    """Reads each value once: `done` are texts by the ids of values, which are kept alive so that no other gets one."""

    def __init__(self) -> None:
        self.within: list[int] = []
        self.done: dict[int, tuple[str, Any]] = {}

    def said(self, value: Any) -> str:
        if isinstance(value, int | float | complex | str | bytes | None):
            return f"{type(value).__qualname__} {value!r}"
        if isinstance(value, type | ModuleType):
            return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
        if id(value) in self.within:
            return f"that {len(self.within) - self.within.index(id(value))} above"
        if id(value) not in self.done:
            self.within.append(id(value))
            self.done[id(value)] = (self._read(value), value)
            self.within.pop()
        return self.done[id(value)][0]

    def _all(self, kind: str, values: Iterable[Any]) -> str:
        return f"{kind} {_digest(repr([self.said(each) for each in values]).encode())}"

    def _read(self, value: Any) -> str:
        name = f"{type(value).__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        if isinstance(value, CodeType):
            return self._all("code", (value.co_code, value.co_names, *value.co_consts))
        if isinstance(value, Tensor):
            if value.is_nested:
                return self._all(name, value.unbind())
            return f"{value.dtype}{tuple(value.shape)}{value.layout}{_bytes_of(value)}"
        if isinstance(value, np.ndarray) and value.dtype != object:
            return f"{value.dtype}{value.shape}{_digest(value.tobytes())}"
        if isinstance(value, set | frozenset):
            return f"{type(value).__qualname__} {sorted(map(self.said, value))}"
        if isinstance(value, functools.partial):
            return self._all("partial", (value.func, value.args, value.keywords))
        if isinstance(value, FunctionType):
            held = [_held(cell) for cell in value.__closure__ or ()]
            return self._all("function", (value.__code__, held, value.__defaults__, value.__kwdefaults__))
        if isinstance(value, MethodType):
            return self._all("method", (value.__func__, value.__self__))
        if type(value) in (tuple, list):
            return self._all(name, value)
        return self._all(name, value.items() if type(value) is dict else _kept(value))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _held(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _kept(value: Any) -> list[Any]:
    """What pickle keeps of an object; its attributes where it takes none."""
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        found = reduce(value) if reduce is not None else value.__reduce_ex__(2)
    except Exception:
        return [getattr(value, "__dict__", {})]
    if isinstance(found, str):
        return [found]
    function, args, *more = found
    state = more[0] if more else None
    return [getattr(function, "__qualname__", ""), args, state, *(list(each) for each in more[1:3] if each is not None)]


def _bytes_of(tensor: Tensor) -> str:
    if tensor.is_meta:
        return ""
    with torch.no_grad():
        parts = strided(tensor.detach().resolve_conj().resolve_neg())
        return _digest(b"".join(map(bytes_of, parts)))
