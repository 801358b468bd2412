"""In-place operations of a traced graph become out-of-place, in the graph alone.

An in-place operation changes every view of its operand. The graph is run once as it is to see which nodes change a
tensor and which share memory; later readers of a node that is the *same* view are moved to the new value. Where memory
is shared in any other way (a slice that is written to, a view taken before and read after) `AliasError` sends the
caller to `torch.export`, which functionalises such graphs.
"""

from __future__ import annotations

import copy
import inspect
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .dry import DryInterpreter, run_dry

_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift")
} | {operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor}


NUMBERS = "fxpath_numbers"  # node.meta key: whether a node gives floating-point numbers


def copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:  # noqa: ARG001  (aten's signature)
    """`aten.copy`, which has no derivative of its own: `source` in the shape and type of `target`."""
    return source.to(target.dtype).expand_as(target)


_TWINS = "fxpath_out_of_place."  # where a graph keeps the out-of-place forms of modules

_SUBSTITUTES: dict[Any, Callable[..., Any]] = {torch.ops.aten.copy.default: copied}


class AliasError(Exception):
    """An in-place operation whose effect reaches other nodes through shared memory; functionalisation is needed."""


class MutationError(Exception):
    """A node changes a tensor in place and has no known out-of-place form."""


class InPlaceProxy(fx.Proxy):
    """A proxy that records `x += y` as `operator.iadd`; fx's own takes it for `x + y` and loses the aliasing."""


def _recording(name: str) -> Callable[[fx.Proxy, Any], Any]:
    target = getattr(operator, name)

    def record(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _target in _OPERATORS:
    setattr(InPlaceProxy, f"__{_target.__name__}__", _recording(_target.__name__))


def _stripped(name: str) -> str | None:
    return name[:-1] if name.endswith("_") and not name.endswith("__") else None


def _without_flag(node: fx.Node) -> bool:
    """Switch off `inplace=True` of a functional call; says whether it was on."""
    try:
        signature = inspect.signature(node.target)  # type: ignore[arg-type]
        bound = signature.bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return False
    if bound.arguments.get("inplace") is not True:
        return False
    bound.arguments["inplace"] = False
    node.args, node.kwargs = bound.args, bound.kwargs
    return True


def _functional_overload(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    namespace, name = target._schema.name.split("::")
    plain = _stripped(name)
    packet = getattr(getattr(torch.ops, namespace), plain, None) if plain else None
    overload = getattr(packet, target._overloadname, None) if packet is not None else None
    if overload is None or overload._schema.is_mutable:
        raise MutationError(f"{target} has no out-of-place form")
    return overload  # type: ignore[no-any-return]


def _make_functional(node: fx.Node, module: fx.GraphModule) -> bool:
    """Give one node its out-of-place form; says whether it was in place."""
    target = node.target
    if node.op == "call_module":
        called = module.get_submodule(str(target))
        if getattr(called, "inplace", False) is not True:
            return False
        twin = copy.copy(called)  # shares everything with the caller's module but this one flag
        twin.inplace = False  # type: ignore[assignment]
        # flat, so that the caller's containers stay untouched; the doubled underscore keeps "a.b_c" from "a_b.c"
        node.target = f"{_TWINS}{str(target).replace('_', '__').replace('.', '_d')}"
        module.add_submodule(node.target, twin)
        return True
    if node.op == "call_method":
        plain = _stripped(str(target))
        if plain is None:
            return False
        if not callable(getattr(Tensor, plain, None)):
            raise MutationError(f"method {target!r} has no out-of-place form")
        node.target = plain
        return True
    if node.op != "call_function" or isinstance(target, type):  # a dataclass may have a field called `out`
        return False
    if isinstance(node.kwargs.get("out"), fx.Node):
        raise MutationError(f"{node.format_node()} writes into another tensor (out=)")
    if isinstance(target, torch._ops.OpOverload):
        functional = _functional_overload(target) if target._schema.is_mutable else target
        node.target = _SUBSTITUTES.get(functional, functional)
        return target._schema.is_mutable
    if target in _OPERATORS:
        node.target = _OPERATORS[target]
        return True
    if target is operator.setitem:
        raise MutationError("assignment to a slice has no out-of-place form")
    plain = _stripped(getattr(target, "__name__", ""))
    if plain is not None and getattr(target, "__module__", None) != "_operator":
        for home in (torch, torch.nn.functional, torch._C._nn, torch.nn.init):
            if getattr(home, f"{plain}_", None) is target and callable(getattr(home, plain, None)):
                node.target = getattr(home, plain)
                return True
        if plain not in ("and", "or", "not", "is"):
            raise MutationError(f"function {target} looks in place and has no out-of-place form")
    return _without_flag(node)


def original_path(target: str) -> str:
    """The model's own path of a module that a graph calls by `target`.

    >>> original_path("fxpath_out_of_place.block_done__two"), original_path("block.one_two")
    ('block.one_two', 'block.one_two')
    """
    if not target.startswith(_TWINS):
        return target
    return re.sub("_[_d]", lambda found: "_" if found[0] == "__" else ".", target.removeprefix(_TWINS))


def _operand(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    return first if isinstance(first, fx.Node) else None


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _place(tensor: Any) -> tuple[Any, ...]:
    return (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


class MutationAudit(DryInterpreter):
    """Runs a graph and notes every node that changes a tensor it was given; with `keep`, every node's value too.

    A node's `meta["fxpath_numbers"]` says whether it gives floating-point numbers, which alone can be activations.
    """

    def __init__(self, module: fx.GraphModule, graph: fx.Graph | None = None, *, keep: bool = False) -> None:
        super().__init__(module, garbage_collect_values=not keep, graph=graph)
        self.changed: list[fx.Node] = []
        self.values: dict[fx.Node, Any] = {}
        self.keep = keep

    def run_node(self, n: fx.Node) -> Any:
        given = [leaf for node in n.all_input_nodes for leaf in _tensors(self.env[node])]
        versions = [tensor._version for tensor in given]
        value = super().run_node(n)
        if any(tensor._version != version for tensor, version in zip(given, versions, strict=True)):
            self.changed.append(n)
        if self.keep:
            self.values[n] = value
        n.meta[NUMBERS] = not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()
        return value


def remove_in_place(module: fx.GraphModule, leaves: Sequence[Any]) -> dict[str, nn.Module]:
    """Rewrite `module.graph` without in-place operations; `leaves` are the values of its placeholders.

    Returns the modules of which the graph calls out-of-place forms now, by the names of these.
    Raises `MutationError` for an operation that changes a tensor and has no out-of-place form, and `AliasError` where
    shared memory makes a node-by-node rewriting wrong.
    """
    twins: dict[fx.Node, fx.Node] = {}
    before = fx.Graph()  # the graph as traced, for looking at its memory
    before.output(before.graph_copy(module.graph, twins))
    order = list(module.graph.nodes)
    targets = [node.target for node in order]
    changed = [node for node in order if _make_functional(node, module)]
    recorder = run_dry(lambda: MutationAudit(module, before, keep=bool(changed)), leaves)
    known = {twins[node] for node in changed if node in twins}
    left = [node.name for node in recorder.changed if node not in known]
    if left:
        raise MutationError(f"nodes that change a tensor in place are left: {', '.join(left)}")
    for node, twin in twins.items():
        if NUMBERS in twin.meta:
            node.meta[NUMBERS] = twin.meta[NUMBERS]
    if not changed:
        if targets != [node.target for node in order]:  # a function without a derivative has given way to another
            module.recompile()
        return {}
    seen = {node: recorder.values.get(twins[node]) if node in twins else None for node in order}
    storages = {node: {t.untyped_storage()._cdata for t in _tensors(seen[node])} for node in order}
    rank = {node: number for number, node in enumerate(order)}
    unread: list[fx.Node] = []
    for node in changed:
        operand = _operand(node)
        written = seen[operand] if operand is not None else None
        if operand is None or not isinstance(written, Tensor):
            continue  # numbers: `n += 1` changes no tensor
        for other in order[: rank[node]]:
            if not storages[other] & storages[operand]:
                continue
            later = [user for user in other.users if rank[user] > rank[node]]
            if other.op == "get_attr" and other is operand and not node.users and list(other.users) == [node]:
                unread += [node, other]
                continue
            if other.op == "get_attr":
                raise MutationError(f"{node.format_node()} changes a parameter or buffer of the model")
            if not later:
                continue
            if not (isinstance(seen[other], Tensor) and _place(seen[other]) == _place(written)):
                raise AliasError(f"{node.format_node()} writes to memory that {other.name} reads through another view")
            for user in later:
                user.replace_input_with(other, node)
    for node in unread:  # a counter: what the model writes of itself and never reads changes no output
        module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    called = [(node.target, target) for node, target in zip(order, targets, strict=True) if node.op == "call_module"]
    return {str(new): module.get_submodule(str(old)) for new, old in called if new != old}
