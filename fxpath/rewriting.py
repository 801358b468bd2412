"""The rewriting pass: insert a gate node after each activation, cut sub-graphs. It runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from .activations import Activation
from .naming import NAME
from .nodes import carries_data

GATES = "fxpath_gates"  # the placeholder through which every gate gets its λ and μ


def gate(activation: Tensor, gates: Callable[[int, Tensor], Tensor] | None, site: int) -> Tensor:
    """The target of every gate node: the activation itself while the gate is open, else what `gates` makes of it."""
    return activation if gates is None else gates(site, activation)


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


def site_edges(module: fx.GraphModule, read: fx.Node | None = None) -> list[tuple[int, int]]:
    """Edges of the site graph: data flows from site s to site t through no other site.

    −1 is the input and the number of sites the response, which reads the node `read`, or all of the output. Needs the
    graph after `insert_gates`.
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
    end = read or next(node for node in module.graph.nodes if node.op == "output")
    edges.update((source, count) for source in sources[end])
    return sorted(edges)


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
