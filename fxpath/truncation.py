"""A traced model that ends at one of its nodes: what a response within the network reads is all that is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, fx

from .activations import Activation
from .branches import Branch
from .errors import SiteError, unknown
from .hidden import Hidden
from .measuring import measured
from .neurons import Site
from .responses import Response
from .rewriting import ancestors, insert_gates, prefix
from .samples import Samples
from .tracing import NAME, Traced


def truncated(
    traced: Traced, example: Samples, response: Hidden, sites: Sequence[Activation]
) -> tuple[Traced, Response, list[Activation]]:
    """The model up to the node that `response` reads, the response for it, and those of `sites` that lead to it.

    The output is the node's value, one block `(B, *shape)` a sample. The graph of `traced` is changed. Raises
    `SiteError` where there is no such node, it has no value for each sample, or no site leads to it.
    """
    module = traced.graph_module
    graph = module.graph
    nodes = {str(node.meta[NAME]): node for node in graph.nodes if node.op.startswith("call_")}
    if response.site not in nodes:
        raise SiteError(f"neuron: {unknown('node', response.site, nodes)}")
    end = nodes[response.site]
    site = _block(traced, example, end)
    fitting = response.located(site)
    needed = ancestors([end])
    leading = [site for site in sites if site.node in needed]
    if not leading:
        raise SiteError(
            f"neuron: no site leads to {response.site}, so there are no neurons that it could depend on; take a later "
            "node, or choose other sites with sites=…"
        )
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (end,)
    kept = needed | _branches_before(end)
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and node is not end and node not in kept:
            graph.erase_node(node)
    graph.lint()
    shorter = fx.GraphModule(module, graph, type(module).__name__)  # without the parameters that nothing reads now
    return replace(traced, graph_module=shorter, unbind=partial(_by_sample, site=site)), fitting, leading


def _branches_before(end: fx.Node) -> set[fx.Node]:
    """The checks of branches that are taken before a node, and what they read."""
    order = list(end.graph.nodes)
    branches = [node for node in order[: order.index(end)] if isinstance(node.target, Branch)]
    return set(branches) | ancestors(branches)


def _block(traced: Traced, example: Samples, end: fx.Node) -> Site:
    """A node's value for one sample, as if it were a site; measured on a graph of its own."""
    name = str(end.meta[NAME])
    trial = prefix(traced.graph_module, {name: end})
    own = next(node for node in trial.graph.nodes if node.name == end.name)
    (marker,) = insert_gates(trial, [Activation(own, name, False)])
    marker.meta[NAME] = name  # channels are looked for from the marker back, so that the node itself may make them
    try:
        (site,) = measured(trial, traced.bind, example, [Activation(marker, name, False)], "unit").index.sites
    except SiteError as error:  # its way out is for sites
        reason = str(error).split(";")[0].removeprefix(f"site {name}: ")
        raise SiteError(f"neuron: {name} holds no neurons of each sample: {reason}; name another node") from None
    return site


def _by_sample(value: Tensor, site: Site) -> Tensor:
    return value.unflatten(0, (-1, site.fold)) if site.fold > 1 else value  # type: ignore[no-untyped-call]
