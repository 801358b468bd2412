"""What a call could leave behind: on a model, in torch's global state, and as tensors that stay alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxpath.network import Network

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs")))

_PLAIN = (bool, int, float, str, tuple)  # by value: torch.export puts equal tuples in place of a module's own


def footprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a call must not change: identities, bytes, versions, flags and hooks."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = (
            id(module),
            type(module),
            {key: value if isinstance(value, _PLAIN) else id(value) for key, value in vars(module).items()},
            {key: id(value) for key, value in module._modules.items()},
            {key: dict(getattr(module, key)) for key in _HOOKS if getattr(module, key, None)},
        )
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        plain = tensor.detach().contiguous()
        found[f"tensor {name}"] = (
            id(tensor),
            tensor.data_ptr(),
            tensor._version,
            tensor.requires_grad,
            tensor.grad is None,
            tensor.dtype,
            tuple(tensor.shape),
            plain.reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    return found


def surroundings() -> tuple[Any, ...]:
    """torch's and NumPy's global state that no call may change."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.backends.mha.get_fastpath_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().numpy().tobytes(),
        str(np.random.get_state(legacy=False)),  # noqa: NPY002  (the global stream is what must not move)
        len(nn.modules.module._global_forward_hooks) + len(nn.modules.module._global_forward_pre_hooks),
    )


@contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """Assert that what runs within changes neither the models nor torch's global state, also when it raises."""
    before, around = [footprint(model) for model in models], surroundings()
    try:
        yield
    finally:
        for model, old in zip(models, before, strict=True):
            new = footprint(model)
            assert new.keys() == old.keys()
            for key, value in old.items():
                assert new[key] == value, key
        assert surroundings() == around


class Record:
    """What a `Watched` saw; no list or dict, so that tracing does not take it back."""

    def __init__(self) -> None:
        self.references: list[weakref.ref[Tensor]] = []
        self.calls = 0
        self.fails_at: int | None = None

    def start(self, fails_at: int | None = None) -> None:
        """Forget everything, and count calls from here; number `fails_at` raises."""
        self.references.clear()
        self.calls, self.fails_at = 0, fails_at

    def alive(self, *, collect: bool = False) -> int:
        """How many of the tensors seen are still there."""
        if collect:
            gc.collect()
        return sum(reference() is not None for reference in self.references)


class Watched(nn.Module):
    """A ReLU, to be traced as a leaf, that keeps a weak reference to all that goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.record = Record()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        if type(x) is Tensor:  # torch keeps some fake tensors, which have no memory, after an export
            self.record.references += [weakref.ref(x), weakref.ref(y)]
        self.record.calls += 1
        if self.record.fails_at == self.record.calls:
            raise RuntimeError("this activation fails")
        return y


def require_clean_failures(
    network: Network, model: nn.Module, record: Record, turns: Iterable[int], call: Callable[[], Any]
) -> None:
    """Let `call` run once for each turn, in which that activation fails: the failure is raised and nothing of it stays.

    `record` is that of a `Watched` in `model`, of which `network` was traced.
    """
    for turn in turns:
        record.start(fails_at=turn)
        with unchanged(model, network._module):
            try:
                call()
            except RuntimeError as error:
                assert "this activation fails" in str(error), turn  # noqa: PT017
            else:
                pytest.fail(f"it should have failed at activation {turn}")
        assert record.alive() == 0, turn
        assert network._restriction is None, turn
