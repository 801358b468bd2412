"""The rewriting pass: find the activation nodes, insert a gate node after each, cut sub-graphs. It runs nothing."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .errors import SiteError, unknown
from .tracing import NAME

GATES = "fxpath_gates"  # the placeholder through which every gate gets its λ and μ

SiteSpec: TypeAlias = "str | type[nn.Module] | Callable[[fx.Node], bool] | Sequence[str | type[nn.Module]]"


def gate(activation: Tensor, gates: Callable[[int, Tensor], Tensor] | None, site: int) -> Tensor:
    """The target of every gate node: the activation itself while the gate is open, else what `gates` makes of it."""
    return activation if gates is None else gates(site, activation)


# --- which nodes are activations ------------------------------------------------------------------------------------

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


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def _argument(node: fx.Node, position: int, *names: str) -> Any:
    for name in names:
        if name in node.kwargs:
            return node.kwargs[name]
    return node.args[position] if len(node.args) > position else None


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


def called_module(node: fx.Node) -> nn.Module | None:
    """The module that a node calls, or None."""
    module = node.graph.owning_module
    return module.get_submodule(str(node.target)) if node.op == "call_module" and module is not None else None


def altered(module: nn.Module) -> bool:
    """Whether calling a module may do other than its type's `forward`: it has hooks, or a `forward` of its own."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return any(hooks) or "forward" in vars(module)


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
        low, high = _argument(node, 1, "min"), None if name == "clamp_min" else _argument(node, 2, "max")
        # a clamp between other numbers, or from above alone, is no activation but a limit on values
        return Activation(node, "clamp", True) if _is_zero(low) and not isinstance(high, fx.Node) else None
    if name in _BOUNDED:
        second = _argument(node, 2, "value") if name == "threshold" else 0
        low = _argument(node, 1, "min_val", "threshold")
        return Activation(node, name, _is_zero(low) and _is_zero(second))
    return Activation(node, name, False) if name in _SMOOTH_NAMES else None


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


def _reached_by_input(graph: fx.Graph) -> set[fx.Node]:
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (carries_data(node) and any(n in reached for n in node.all_input_nodes)):
            reached.add(node)
    return reached


def activations_of(module: fx.GraphModule) -> list[Activation]:
    """Every activation node that depends on the input, in order of execution."""
    reached = _reached_by_input(module.graph)
    found = (classify(node) for node in module.graph.nodes if node in reached)
    return [activation for activation in found if activation is not None]


def _matches_type(node: fx.Node, kind: type[nn.Module]) -> bool:
    module = called_module(node)
    return module is not None and isinstance(module, kind)


def choose_sites(module: fx.GraphModule, spec: SiteSpec) -> list[Activation]:
    """The nodes that become sites, in order of execution.

    `spec`: "rectifiers", "activations", a node's name, a glob over the activations' names, a module type, a callable
    on fx nodes, or a sequence of names, globs and types. Raises `SiteError` where nothing matches.
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
            if item not in by_name:
                raise SiteError(unknown("node", item, by_name))
            found = [by_name[item]]
        elif inspect.isclass(item) and issubclass(item, nn.Module):
            found = [node for node in candidates if _matches_type(node, item)]
        elif callable(item):
            found = [node for node in candidates if item(node)]
        else:
            raise SiteError(f"sites: expected names, globs, module types or a callable, found {item!r}")
        if not found:
            shown = item if isinstance(item, str) else getattr(item, "__name__", repr(item))
            raise SiteError(f"sites: {shown!r} matches no node. {listing}")
        picked.update(found)
    order = [node for node in candidates if node in picked]
    return [by_node.get(node) or Activation(node, _plain_op(node), False) for node in order]


def _plain_op(node: fx.Node) -> str:
    module = called_module(node)
    return type(module).__name__.lower() if module is not None else (operation(node) or str(node.target))


def _listing(known: Sequence[Activation]) -> str:
    if not known:
        return "It has no activation that fxpath knows."
    shown = ", ".join(f"{a.name} ({a.op})" for a in known[:12]) + (" …" if len(known) > 12 else "")
    return f"Activations there are ({len(known)}): {shown}."


# --- the pass -------------------------------------------------------------------------------------------------------


def insert_gates(module: fx.GraphModule, sites: Sequence[Activation]) -> list[fx.Node]:
    """Put a gate node right after each activation; all the activation's users then read the gate.

    The graph gets one more argument, `fxpath_gates`, None by default. Returns the gate nodes in order.
    """
    graph = module.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in graph.nodes:
        if node.op == "placeholder" and node.target == GATES:  # inputs are bound by place: any other name will do
            node.target = f"{GATES}_of_the_model"
            node._rename(node.target)
            node.meta[NAME] = node.target
    with graph.inserting_after(last):
        gates = graph.placeholder(GATES, default_value=None)
    gates.meta[NAME] = GATES
    inserted = []
    for number, site in enumerate(sites):
        with graph.inserting_after(site.node):
            node = graph.call_function(gate, (site.node, gates, number))
        site.node.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user is not node)  # type: ignore[misc]
        node.meta = {"nn_module_stack": site.node.meta.get("nn_module_stack"), NAME: f"{site.name}:gate"}
        inserted.append(node)
    graph.lint()
    module.recompile()
    return inserted


def site_edges(module: fx.GraphModule) -> list[tuple[int, int]]:
    """Edges of the site graph: data flows from site s to site t through no other site.

    −1 is the input and the number of sites the response. Needs the graph after `insert_gates`.
    """
    sources: dict[fx.Node, frozenset[int]] = {}
    edges: set[tuple[int, int]] = set()
    count = 0
    for node in module.graph.nodes:
        below: frozenset[int] = frozenset().union(*(sources[n] for n in node.all_input_nodes))
        if node.op == "placeholder":
            sources[node] = frozenset() if node.target == GATES else frozenset([-1])
        elif node.target is gate:
            site = int(node.args[2])
            edges.update((source, site) for source in below)
            sources[node], count = frozenset([site]), max(count, site + 1)
        else:
            sources[node] = below if carries_data(node) else frozenset()
    output = next(node for node in module.graph.nodes if node.op == "output")
    edges.update((source, count) for source in sources[output])
    return sorted(edges)


_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.MultiheadAttention, nn.RMSNorm)
_FIRST_NAMES = ("conv1d", "conv2d", "conv3d", "convolution", "batch_norm", "group_norm", "instance_norm")
_LAST_NAMES = ("linear", "layer_norm", "addmm", "matmul", "bmm", "embedding")


def channel_axis(node: fx.Node, dimensions: int) -> int:
    """The channel axis of a site's per-sample block: first after convolutions, last after linear layers.

    Looks back along first arguments for the operation that made the channels; where none is found, the first axis.
    """
    current: fx.Node | None = node
    for _ in range(64):
        current = next(iter(current.all_input_nodes), None) if current is not None else None
        if current is None:
            break
        module, name = called_module(current), operation(current) if current.op.startswith("call_") else None
        if isinstance(module, _CHANNELS_FIRST) or name in _FIRST_NAMES or str(name).endswith("batch_norm"):
            return 0
        if isinstance(module, _CHANNELS_LAST) or name in _LAST_NAMES:
            return max(dimensions - 1, 0)
    return 0


# --- sub-graphs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cut:
    """A sub-graph between nodes of a gated graph.

    `module` takes the values of `starts`, then those of `boundary` (what the sub-graph reads from outside), then the
    gates, and returns the tuple of `ends` (or the network's output).
    """

    module: fx.GraphModule
    starts: tuple[str, ...]
    boundary: tuple[str, ...]


def descendants(starts: Iterable[fx.Node]) -> set[fx.Node]:
    """Every node that reads one of `starts`, directly or not."""
    found: set[fx.Node] = set()
    waiting = list(starts)
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found


def ancestors(ends: Iterable[fx.Node], until: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """Every node that one of `ends` reads, directly or not, but not through `until`."""
    found: set[fx.Node] = set()
    stops = set(until)
    waiting = list(ends)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                if source not in stops:
                    waiting.append(source)
    return found


def cut(module: fx.GraphModule, starts: Sequence[fx.Node], ends: Sequence[fx.Node] | None = None) -> Cut:
    """The sub-graph from `starts` to `ends` (None: the network's output): a site's suffix, a segment between two.

    Nodes between are copied; what they read from elsewhere becomes the boundary, in order of execution. Parameters and
    sub-modules are shared with `module`.
    """
    graph = module.graph
    output = next(node for node in graph.nodes if node.op == "output")
    goals = [output] if ends is None else list(ends)
    within = (descendants(starts) & (ancestors(goals, starts) | set(goals))) - set(starts)
    parameters = {node for node in graph.nodes if node.op == "get_attr"}
    reading = within | {output} if ends is None else within  # the output may depend on none of the starts
    read = {source for node in reading for source in node.all_input_nodes} | (set(goals) - reading)
    gates = next((node for node in graph.nodes if node.target == GATES), None)
    boundary = [n for n in graph.nodes if n in read and n not in within and n not in {*starts, *parameters, gates}]
    suffix = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate([*starts, *boundary]):
        copies[node] = suffix.placeholder(f"value_{number}")
    if gates is not None:
        copies[gates] = suffix.placeholder(GATES, default_value=None)
    for node in graph.nodes:
        if node in parameters & read or (node in within and node is not output):
            copies[node] = suffix.node_copy(node, lambda n: copies[n])
    if ends is None:
        suffix.output(fx.map_arg(output.args[0], lambda n: copies[n]))
    else:
        suffix.output(tuple(copies[node] for node in ends))
    suffix.lint()
    return Cut(
        fx.GraphModule(module, suffix, f"{type(module).__name__}Cut"),
        tuple(str(node.meta[NAME]) for node in starts),
        tuple(node.name for node in boundary),
    )


def prefix(module: fx.GraphModule, ends: Mapping[str, fx.Node]) -> fx.GraphModule:
    """The sub-graph from the network's inputs to `ends`; returns their values as a tuple."""
    graph = module.graph
    needed = ancestors(ends.values()) | set(ends.values())
    start = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed or node.op == "placeholder":
            copies[node] = start.node_copy(node, lambda n: copies[n])
    start.output(tuple(copies[node] for node in ends.values()))
    start.lint()
    return fx.GraphModule(module, start, f"{type(module).__name__}Prefix")
