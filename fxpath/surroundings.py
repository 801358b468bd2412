"""What a run of tracing leaves as it was: random numbers, warnings, torch's switches, what modules hold."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from operator import is_
from typing import Any

import torch
from torch import nn

from .equality import generators, kept_buffers
from .samples import Samples


@contextlib.contextmanager
def quietly(example: Samples) -> Iterator[None]:
    """Leave the random state alone, use normal tensors, and keep back what torch says about its own internals."""
    random = torch.random.fork_rng(generators(example.tensors))
    with torch.inference_mode(False), random, warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def undisturbed(modules: Iterable[nn.Module], example: Samples) -> Iterator[None]:
    """Leave the random state, and what modules hold, as they are."""
    with torch.random.fork_rng(generators(example.tensors)), put_back(modules):
        yield


@contextlib.contextmanager
def put_back(modules: Iterable[nn.Module]) -> Iterator[Callable[[], None]]:
    """Undo what modules note about themselves while they are traced: proxies, fake tensors, activations.

    A forward that says `self.last = h`, or appends to a list, would keep them; `torch.export` replaces containers. A
    buffer that forward writes to gets its values back. What is yielded does all this at once.
    """
    modules = list(modules)
    attributes = [(module, dict(vars(module))) for module in modules]
    containers = _containers(named for _, named in attributes)
    contents = [_kind(each)(each) if each else () for each in containers]  # nearly all are empty

    def restore() -> None:
        for module, named in attributes:
            now = vars(module)
            for name in now.keys() - named.keys():
                del now[name]
            now.update(named)
        for container, content in zip(containers, contents, strict=True):
            if not _unchanged(container, content):
                kind: Any = _kind(container)  # its own methods: those of a subclass may refuse
                kind.clear(container)
                (kind.extend if kind in (list, deque) else kind.update)(container, content)
        restore_buffers()

    with kept_buffers(modules) as restore_buffers:
        try:
            yield restore
        finally:
            restore()


def _kind(container: Any) -> type:
    """The container of Python's that one is made from."""
    return next(kind for kind in (OrderedDict, dict, list, set, deque) if isinstance(container, kind))


def _containers(attributes: Iterable[dict[str, Any]]) -> list[Any]:
    """Every list, dict, set and deque that attributes hold, those within others included."""
    found: dict[int, Any] = {}
    waiting = [value for named in attributes for value in named.values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, tuple):
            waiting += value
        elif isinstance(value, list | dict | set | deque) and id(value) not in found:
            found[id(value)] = value
            waiting += value.values() if isinstance(value, dict) else value
    return list(found.values())


def _unchanged(container: Any, content: Any) -> bool:
    """Whether a container still holds the same things in the same order."""
    if not content or len(container) != len(content):
        return len(container) == len(content)
    if isinstance(container, set):
        return bool(container == content)
    same = all(map(is_, container, content))
    return same and (not isinstance(container, dict) or all(map(is_, container.values(), content.values())))


class _PlainAttention:
    """How many are within `plain_attention` now, in all threads, and what the switch was before the first."""

    lock = threading.Lock()
    inside = 0
    before = True


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Keep torch.nn's attention and transformers from their fused kernel.

    It hides the activations within, and is taken only without gradients: then a pass with gradients and one without
    would differ in last bits. The switch is the whole process's: it goes back when the last thread leaves.
    """
    with _PlainAttention.lock:
        if not _PlainAttention.inside:
            _PlainAttention.before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _PlainAttention.inside += 1
    try:
        yield
    finally:
        with _PlainAttention.lock:
            _PlainAttention.inside -= 1
            if not _PlainAttention.inside:
                torch.backends.mha.set_fastpath_enabled(_PlainAttention.before)
