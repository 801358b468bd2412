"""Branches on values, fixed as the example takes them, and checked again for every input that runs.

`symbolic_trace` stops where Python asks for a value: `if h.sum() > 0`, `while`, `int(tensor)`, a loop over a tensor.
Here every node is computed on the example while it is recorded, so that Python gets the example's value; a node that
asks the same again is put into the graph, and raises `BranchError` for an input with another answer.
"""

from __future__ import annotations

import contextlib
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import BranchError
from .inplace import InPlaceProxy
from .reasons import line_of_caller
from .tracers import PathTracer, asks_of_shapes

_CHECKED: ContextVar[bool] = ContextVar("fxpath_branches_checked", default=True)


@contextlib.contextmanager
def keeping_branches() -> Iterator[None]:
    """Run with the example's branches, whatever the values say.

    A restricted network is one with these branches: its activations are not those that the branches were taken on.
    """
    before = _CHECKED.set(False)
    try:
        yield
    finally:
        _CHECKED.reset(before)


@dataclass(frozen=True)
class Branch:
    """A place where Python took a value out of the graph; the target of the node that takes it again.

    `on_values`: whether it depends on the data, not on shapes alone.
    """

    where: str
    ask: Callable[[Any], Any]
    answer: Any
    on_values: bool

    __name__ = "branch"

    def __call__(self, value: Any) -> None:
        if not _CHECKED.get():
            return
        found = self.ask(value)
        if found != self.answer and not (_is_nan(found) and _is_nan(self.answer)):
            raise BranchError(
                f"network: the graph holds the branch of the example it was traced on; {self.where} was {self.answer} "
                f"there and is {found} for these inputs. Trace again with an example that is like them, leave them "
                "out, or make the module a leaf: leaves=(ModuleType, …)",
                on_values=self.on_values,
            )


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


class _ValueProxy(InPlaceProxy):
    """A proxy that Python may ask for the value that it has on the example."""

    tracer: BranchTracer

    def __int__(self) -> int:
        return int(self.tracer.ask(self, int))

    def __float__(self) -> float:
        return float(self.tracer.ask(self, float))

    def __index__(self) -> int:
        return int(self.tracer.ask(self, operator.index))

    def __len__(self) -> int:
        return int(self.tracer.ask(self, len))


class BranchTracer(PathTracer):
    """Traces with the branches that the example takes; `branches` are those."""

    def __init__(self, leaves: Sequence[type[nn.Module]], inputs: Mapping[str, Any]) -> None:
        super().__init__(leaves)
        self.param_shapes_constant = False  # fx's proxies of parameters hold no values
        self.branches: list[Branch] = []
        self._inputs = inputs
        self._values: dict[fx.Node, Any] = {}
        self._computing = False

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        try:
            return super().trace(root, concrete_args)
        finally:
            self._values, self._inputs = {}, {}  # the tracer is in cycles, that would keep them alive

    def remarks(self) -> list[str]:
        fixed = dict.fromkeys(f"{branch.where} is {branch.answer}" for branch in self.branches if branch.on_values)
        return super().remarks() + [
            f"a branch is fixed as the example takes it: {each}; inputs that take another raise BranchError"
            for each in fixed
        ]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ValueProxy(node, self)

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, *args, **kwargs)
        self._computing = True
        try:
            with torch.no_grad():
                self._values[proxy.node] = self._value(proxy.node)
        finally:
            self._computing = False
        return proxy

    def _value(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
        target: Any = node.target
        if node.op == "placeholder":  # fx numbers those of arguments that are no tensors
            return self._inputs[target if target in self._inputs else re.sub(r"_\d+$", "", target)]
        if node.op == "get_attr":
            value = operator.attrgetter(target)(self.root)
            return value.detach().clone() if isinstance(value, Tensor) else value  # the model's stays as it is
        if node.op == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return forward(*args, **kwargs) if self._computing else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    # fx's proxies alone call the next two: for `if h:` and for `for part in h:`

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.ask(obj, bool))

    def iter(self, obj: Any) -> Iterator[Any]:
        if isinstance(self._values[obj.node], Mapping):
            return iter(list(self._values[obj.node]))
        return iter([obj[number] for number in range(self.ask(obj, len))])

    def ask(self, proxy: fx.Proxy, question: Callable[[Any], Any]) -> Any:
        """The example's answer to what Python asks of a value; a node of the graph asks it again."""
        answer = question(self._values[proxy.node])
        on_values = question is not len and self._holds_data(proxy.node)
        branch = Branch(line_of_caller() or "an unknown line", question, answer, on_values)
        self.branches.append(branch)
        self.create_proxy("call_function", branch, (proxy,), {})
        return answer

    def _holds_data(self, node: fx.Node) -> bool:
        if isinstance(self._values[node], Tensor):
            return True
        return not asks_of_shapes(node) and any(map(self._holds_data, node.all_input_nodes))
