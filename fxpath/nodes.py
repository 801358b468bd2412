"""Reading fx nodes: which operation one is, which module it calls, whether data flows through it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn


def operation(node: fx.Node) -> str | None:
    """The plain name of a function, method or aten operation; None for functions of other libraries."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        return name.removeprefix("special_") if namespace == "aten" else None
    if node.op == "call_method":
        return str(target)
    if target is F.threshold:  # its own name is _threshold
        return "threshold"
    name = getattr(target, "__name__", "").removeprefix("special_")
    homes = (torch, F, torch.special, torch._C._nn)
    return name if name and any(getattr(home, name, None) is target for home in homes) else None


def plain_name(node: fx.Node) -> str | None:
    """As `operation`, Python's own operators included: `mul` of `x * y`; None for what is no call of a function."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = operation(node)
    if name is None and getattr(node.target, "__module__", None) == "_operator":
        return str(getattr(node.target, "__name__", ""))
    return name


def called_module(node: fx.Node) -> nn.Module | None:
    """The module that a node calls, or None."""
    module = node.graph.owning_module
    return module.get_submodule(str(node.target)) if node.op == "call_module" and module is not None else None


def argument(node: fx.Node, position: int, *names: str) -> Any:
    """A call's argument by one of its names, or by its place; None where it is not given."""
    for name in names:
        if name in node.kwargs:
            return node.kwargs[name]
    return node.args[position] if len(node.args) > position else None


def altered(module: nn.Module) -> bool:
    """Whether calling a module may do other than its type's `forward`: it has hooks, or a `forward` of its own."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return any(hooks) or "forward" in vars(module)


_SHAPE_ONLY = {
    "size", "dim", "numel", "ndimension", "nelement", "stride", "is_floating_point", "zeros_like", "ones_like",
    "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full", "sym_size", "sym_numel", "sym_stride",
    "sym_storage_offset",
}  # fmt: skip


def carries_data(node: fx.Node) -> bool:
    """Whether a node's value depends on the data of its inputs, not just on their shapes."""
    if node.target is getattr:
        return node.args[1] not in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "layout")
    return node.op not in ("call_function", "call_method") or operation(node) not in _SHAPE_ONLY
