"""Qualified names of a graph's nodes: those that torchvision's `feature_extraction` gives."""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import fx

NAME = "fxpath_name"  # node.meta key of a node's qualified name


def _operation(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
    elif callable(target):
        name = getattr(target, "__name__", type(target).__name__)
    else:
        name = str(target).rsplit(".", 1)[-1]
    name = name.strip("_") or name
    return name[1:] if getattr(operator, name, None) is target and name in ("iadd", "imul", "isub") else name


def _stack_name(node: fx.Node) -> str:
    """The torchvision `feature_extraction` name: the module's path, and the function's name where there is one."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = (stack[-1][0], stack[-1][1]) if stack else ("", None)
    path = path.split("@")[0].removeprefix("L['self'].")
    kind_name = kind if isinstance(kind, str) else f"{getattr(kind, '__module__', '')}.{getattr(kind, '__name__', '')}"
    opened = ".container." in kind_name or ".transformer." in kind_name
    inside_leaf = kind_name.startswith("torch.nn.modules.") and not opened
    if node.op == "call_module":
        return path or str(node.target)
    if node.op in ("call_function", "call_method"):
        if inside_leaf and path:
            return path
        return f"{path}.{_operation(node)}" if path else _operation(node)
    return str(node.target)


def name_stack(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        node.meta[NAME] = _stack_name(node)


def name_nodes(module: fx.GraphModule) -> None:
    """Make the nodes' qualified names unique: the second `layer1.0.relu` becomes `layer1.0.relu_1`, and so on."""
    taken: set[str] = set()
    counts: Counter[str] = Counter()
    for node in module.graph.nodes:
        base = name = node.meta[NAME]
        while name in taken:
            counts[base] += 1
            name = f"{base}_{counts[base]}"
        taken.add(name)
        node.meta[NAME] = name
