"""Running a graph without data: shapes, strides and shared memory, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .nodes import altered
from .surroundings import put_back

RUNS_HOOKS = "fxpath_runs_hooks"  # attribute of functions that call the hooks of a module: its path

# their output is shaped and (not LayerNorm's) laid out in memory as their input; torch takes long to find that out
_KEEPING = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid,
    nn.Sigmoid, nn.LayerNorm,
)  # fmt: skip


class DryInterpreter(fx.Interpreter):
    """An interpreter that `run_dry` can run; `dry` while it runs without data."""

    dry = False

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        keeping = self.dry and type(module) in _KEEPING and not getattr(module, "inplace", False)
        if keeping and len(args) == 1 and args[0].is_floating_point() and not altered(module):
            dense = isinstance(module, nn.LayerNorm)
            return torch.empty_like(args[0], memory_format=torch.contiguous_format if dense else torch.preserve_format)
        return super().call_module(target, args, kwargs)


Runner = TypeVar("Runner", bound=DryInterpreter)


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
    there (a leaf module that reads values, an operator without shapes of its own), and where hooks would see that
    there is no data, one runs on copies of the real inputs and buffers; what that raises is raised.
    """
    interpreter = make()
    if not _hooked(interpreter):
        try:
            interpreter.dry = True
            return _run(interpreter, inputs, _without_data, _without_data)
        except Exception:
            interpreter = make()
    return _run(interpreter, inputs, lambda parameter: parameter, torch.clone)


def _hooked(interpreter: fx.Interpreter) -> bool:
    nodes = interpreter.graph.nodes
    called = (interpreter.module.get_submodule(str(node.target)) for node in nodes if node.op == "call_module")
    own = any(getattr(node.target, RUNS_HOOKS, None) is not None for node in nodes)
    return own or any(altered(part) for each in called for part in each.modules())


def _run(
    interpreter: Runner,
    inputs: Sequence[Any],
    parameter: Callable[[Tensor], Tensor],
    other: Callable[[Tensor], Tensor],
) -> Runner:
    running = _Running(interpreter)
    tensors = _replaced(running, "_parameters", parameter) | _replaced(running, "_buffers", other)
    given = pytree.tree_map(lambda leaf: other(leaf) if isinstance(leaf, Tensor) else leaf, tuple(inputs))
    own = (part for part in running.modules() if not _is_plain(part))
    with put_back(own), torch.no_grad():
        torch.func.functional_call(running, tensors, given, tie_weights=False)
    return interpreter


def _replaced(module: nn.Module, kind: str, replace: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What stands for each parameter or buffer, by one name for each place that holds it.

    A module under several names is one place, and so is one that shares its tensors with a copy: what is swapped twice
    is not put back.
    """
    made: dict[int, Tensor] = {}  # the same for the same tensor
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for path, part in module.named_modules():
        place = id(vars(part).get(kind, part))
        if place not in places:
            places.add(place)
            named = part.named_parameters if kind == "_parameters" else part.named_buffers
            for name, tensor in named(path, recurse=False, remove_duplicate=False):
                if id(tensor) not in made:
                    made[id(tensor)] = replace(tensor)
                found[name] = made[id(tensor)]
    return found


def _is_plain(module: nn.Module) -> bool:
    """Whether running a module changes nothing of it: one of torch's, but for recurrent ones with their lists."""
    return type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, nn.RNNBase)


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")
