"""What a run of tracing leaves as it was: random numbers, warnings, torch's switches, what modules hold."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator

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
def put_back(modules: Iterable[nn.Module]) -> Iterator[Callable[[], None]]:
    """Undo what modules note about themselves while they are traced: proxies, fake tensors, activations.

    A forward that says `self.last = h`, or appends to a list, would keep them; `torch.export` replaces containers. A
    buffer that forward writes to gets its values back. What is yielded does all this at once.
    """
    modules = list(modules)
    attributes = [(module, dict(vars(module))) for module in modules]
    containers = [
        (value, value.copy())
        for _, named in attributes
        for value in named.values()
        if isinstance(value, list | dict | set) and value is not named
    ]

    def restore() -> None:
        for module, named in attributes:
            now = vars(module)
            for name in now.keys() - named.keys():
                del now[name]
            now.update(named)
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        restore_buffers()

    with kept_buffers(modules) as restore_buffers:
        try:
            yield restore
        finally:
            restore()


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Keep torch.nn's attention and transformers from their fused kernel.

    It hides the activations within, and is taken only without gradients: then a pass with gradients and one without
    would differ in last bits.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
