"""Which nodes of a graph are activations, and which of these become sites."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import fx, nn

from .errors import SiteError, unknown
from .inplace import NUMBERS
from .naming import NAME
from .nodes import argument, called_module, carries_data, operation
from .patterns import by_node, formulas_of, is_zero

SiteSpec: TypeAlias = "str | type[nn.Module] | Callable[[fx.Node], bool] | Sequence[str | type[nn.Module]]"


_RECTIFIERS: dict[type[nn.Module], str] = {nn.ReLU6: "relu6", nn.ReLU: "relu"}
_SMOOTH: dict[type[nn.Module], str] = {
    getattr(nn, name): name.lower()
    for name in (
        "GELU", "SiLU", "Hardswish", "LeakyReLU", "PReLU", "RReLU", "ELU", "SELU", "CELU", "Mish", "Softplus",
        "Softsign", "Softshrink", "Hardshrink", "Tanhshrink", "Tanh", "Sigmoid", "Hardsigmoid", "LogSigmoid", "GLU",
    )
}  # fmt: skip
_RECTIFIER_NAMES = {"relu", "relu6"}
_CLAMPS = {"clamp", "clip", "clamp_min"}
_BOUNDED = {"hardtanh", "threshold"}
RECTIFIERS = _RECTIFIER_NAMES | _BOUNDED | {"clamp", "addmm_activation"}  # operations of rectifier sites
_SMOOTH_NAMES = {
    "gelu", "silu", "hardswish", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "mish", "softplus", "softsign",
    "softshrink", "hardshrink", "tanhshrink", "tanh", "sigmoid", "hardsigmoid", "logsigmoid", "log_sigmoid", "glu",
    "leaky_relu_", "_prelu_kernel", "expit",
}  # fmt: skip


@dataclass(frozen=True)
class Activation:
    """An activation node: its operation, and whether it is zero on its inactive side (a rectifier)."""

    node: fx.Node
    op: str
    rectifier: bool

    @property
    def name(self) -> str:
        return str(self.node.meta[NAME])


def classify(node: fx.Node) -> Activation | None:
    """The activation that a node executes, or None."""
    if node.op == "call_module":
        module = called_module(node)
        if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
            return Activation(node, "hardtanh", module.min_val == 0)
        if isinstance(module, nn.Threshold):
            return Activation(node, "threshold", module.threshold == 0 and module.value == 0)
        for table, rectifier in ((_RECTIFIERS, True), (_SMOOTH, False)):
            for kind, called in table.items():
                if isinstance(module, kind):
                    return Activation(node, called, rectifier)
        return None
    if node.op not in ("call_function", "call_method"):
        return None
    name = operation(node)
    if name is None:
        return None
    if name in _RECTIFIER_NAMES:
        return Activation(node, name, True)
    if name in _CLAMPS:
        low, high = argument(node, 1, "min"), None if name == "clamp_min" else argument(node, 2, "max")
        # a clamp between other numbers, or from above alone, is no activation but a limit on values
        return Activation(node, "clamp", True) if is_zero(low) and not isinstance(high, fx.Node) else None
    if name in _BOUNDED:
        second = argument(node, 2, "value") if name == "threshold" else 0
        low = argument(node, 1, "min_val", "threshold")
        return Activation(node, name, is_zero(low) and is_zero(second))
    if name == "_addmm_activation":  # a linear layer and its activation in one
        return Activation(node, "addmm_activation", node.kwargs.get("use_gelu") is not True)
    return Activation(node, name, False) if name in _SMOOTH_NAMES else None


def _reached_by_input(graph: fx.Graph) -> set[fx.Node]:
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (carries_data(node) and any(n in reached for n in node.all_input_nodes)):
            reached.add(node)
    return reached


def activations_of(module: fx.GraphModule) -> list[Activation]:
    """Every activation that depends on the input, in order of execution; one written out as a formula is one."""
    reached = _reached_by_input(module.graph)
    formulas, within = by_node(formulas_of(module.graph))
    found = []
    for node in module.graph.nodes:
        if node not in reached or node in within or not node.meta.get(NUMBERS, True):
            continue
        formula = formulas.get(node)
        activation = Activation(node, formula.op, formula.rectifier) if formula is not None else classify(node)
        if activation is not None:
            found.append(activation)
    return found


def outputs_of_calls(candidates: Sequence[fx.Node], wanted: str | type[nn.Module]) -> list[fx.Node]:
    """What each call of a module gives, the module known by its path or type and looked into by the tracer.

    Raises `SiteError` where a call gives several tensors: none of them is the module's activation more than another.
    """
    kinds = set() if isinstance(wanted, str) else {_full_name(kind) for kind in (wanted, *_subclasses(wanted))}
    calls: dict[str, list[fx.Node]] = {}
    for node in candidates:
        for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
            called = kind if isinstance(kind, str) else _full_name(kind)
            if (path == wanted) if isinstance(wanted, str) else called in kinds:
                calls.setdefault(str(key), []).append(node)
                break
    found = []
    for nodes in calls.values():
        inside = set(nodes)
        last = [node for node in nodes if any(user not in inside for user in node.users)]
        if len(last) > 1:
            shown = wanted if isinstance(wanted, str) else wanted.__name__
            raise SiteError(
                f"sites: {shown!r} gives {len(last)} values, expected one; name one of its nodes: "
                f"{', '.join(str(node.meta[NAME]) for node in last[:5])}"
            )
        found += last
    return found


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _subclasses(kind: type) -> set[type]:
    children: list[type] = kind.__subclasses__()
    return {each for child in children for each in (child, *_subclasses(child))}


def _matches_type(node: fx.Node, kind: type[nn.Module]) -> bool:
    module = called_module(node)
    return module is not None and isinstance(module, kind)


def choose_sites(module: fx.GraphModule, spec: SiteSpec) -> list[Activation]:
    """The nodes that become sites, in order of execution.

    `spec`: "rectifiers", "activations", the name of a node or the path of a module (what each of its calls gives), a
    glob over the activations' names, a module type, a callable on fx nodes, or a sequence of names, globs and types.
    Raises `SiteError` where nothing matches.
    """
    known = activations_of(module)
    listing = _listing(known)
    if spec == "rectifiers":
        chosen = [activation for activation in known if activation.rectifier]
        if not chosen:
            raise SiteError(
                f"sites: no rectifier (ReLU, ReLU6, clamp(min=0), Hardtanh(0, ·)) in this network. {listing}"
                + (" Take these with sites='activations'" if known else " Name nodes or module types with sites=…")
            )
        return chosen
    if spec == "activations":
        if not known:
            raise SiteError(f"sites: no activation in this network. {listing} Name nodes or types with sites=…")
        return known
    by_node = {activation.node: activation for activation in known}
    picked: set[fx.Node] = set()
    reached = _reached_by_input(module.graph)
    candidates = [node for node in module.graph.nodes if node in reached and node.op.startswith("call_")]
    by_name = {node.meta[NAME]: node for node in candidates}
    items: Sequence[Any] = spec if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
    if not items:
        raise SiteError(f"sites: expected at least one name, glob or type, found none. {listing}")
    for item in items:
        if isinstance(item, str) and item in ("rectifiers", "activations"):
            found = [a.node for a in choose_sites(module, item)]
        elif isinstance(item, str) and any(sign in item for sign in "*?["):
            found = [a.node for a in known if fnmatch.fnmatchcase(a.name, item)]
        elif isinstance(item, str):
            found = [by_name[item]] if item in by_name else outputs_of_calls(candidates, item)
            if not found:
                raise SiteError(unknown("node or module", item, by_name))
        elif inspect.isclass(item) and issubclass(item, nn.Module):
            found = [node for node in candidates if _matches_type(node, item)] or outputs_of_calls(candidates, item)
        elif callable(item):
            found = [node for node in candidates if item(node)]
        else:
            raise SiteError(f"sites: expected names, globs, module types or a callable, found {item!r}")
        if not found:
            shown = item if isinstance(item, str) else getattr(item, "__name__", repr(item))
            raise SiteError(f"sites: {shown!r} matches no node. {listing}")
        picked.update(found)
    order = [node for node in candidates if node in picked]
    return [by_node.get(node) or classify(node) or Activation(node, _plain_op(node), False) for node in order]


def _plain_op(node: fx.Node) -> str:
    module = called_module(node)
    return type(module).__name__.lower() if module is not None else (operation(node) or str(node.target))


def _listing(known: Sequence[Activation]) -> str:
    if not known:
        return "It has no activation that fxpath knows."
    shown = ", ".join(f"{a.name} ({a.op})" for a in known[:12]) + (" …" if len(known) > 12 else "")
    return f"Activations there are ({len(known)}): {shown}."
