"""Running a graph without data: shapes, strides and shared memory, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

Runner = TypeVar("Runner", bound=fx.Interpreter)


class _Running(nn.Module):
    """An interpreter as a module, so that `functional_call` can swap the tensors of the graph that it runs."""

    def __init__(self, interpreter: fx.Interpreter) -> None:
        super().__init__()
        self.graph_module = interpreter.module
        self.run = interpreter.run

    def forward(self, *inputs: Any) -> Any:
        return self.run(*inputs)


def run_dry(make: Callable[[], Runner], inputs: Sequence[Any]) -> Runner:
    """Run an interpreter that `make` makes; returns the one that ran.

    It runs on the meta device, which neither computes nor takes memory. Where something in the graph cannot be run
    there (a leaf module that reads values, an operator without shapes of its own), another one runs on copies of the
    real inputs and buffers; what that raises is raised.
    """
    try:
        return _run(make(), inputs, _without_data, _without_data)
    except Exception:
        return _run(make(), inputs, lambda parameter: parameter, torch.clone)


def _run(
    interpreter: Runner,
    inputs: Sequence[Any],
    parameter: Callable[[Tensor], Tensor],
    other: Callable[[Tensor], Tensor],
) -> Runner:
    running = _Running(interpreter)
    tensors = {name: parameter(tensor) for name, tensor in running.named_parameters()}
    tensors |= {name: other(tensor) for name, tensor in running.named_buffers()}
    given = pytree.tree_map(lambda leaf: other(leaf) if isinstance(leaf, Tensor) else leaf, tuple(inputs))
    with torch.no_grad():
        torch.func.functional_call(running, tensors, given)
    return interpreter


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")
