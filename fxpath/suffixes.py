"""The part of a network that follows one site, to be run alone on cached inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .gates import Gates
from .narrowing import CLASSES, narrow
from .rewriting import GATES, Cut, ancestors, cut, descendants, prefix
from .samples import Samples
from .scaling import frontier
from .tracing import plain_attention

if TYPE_CHECKING:
    from .network import Network


class Suffix:
    """What follows one site, to be run alone on cached inputs.

    `cache(samples)` runs the network up to the site once; calling the suffix with that cache and a tensor of the
    site's shape gives the network's output as if the gate had let that tensor through.
    """

    def __init__(self, network: Network, number: int) -> None:
        self.network = network
        self.site = network.sites[number]
        self._parts = parts_of(network, number, None)

    def cache(self, x: Any) -> tuple[Tensor, tuple[Any, ...]]:
        """The site's activation, and the other values that the suffix reads (skips around the site)."""
        samples = self.network.samples(x)
        self.network._require_branches(samples)
        activation, values = before(self.network, self._parts, samples)
        return activation, tuple(self._parts.read_by(self._parts.whole, values))

    def __call__(self, activation: Tensor, boundary: Sequence[Any]) -> Any:
        """The network's output from the site's activation on; differentiable in it."""
        network = self.network
        gates = None if network._restriction is None else Gates(network.index, network._restriction)
        with plain_attention():
            return network.traced.unbind(self._parts.whole.module(activation, *boundary, gates))


@dataclass(eq=False)
class Parts:
    """The sub-graphs of one site, which a network keeps.

    `whole` leads from the site to the output. `head` leads from the site to the values up to which all is affine in a
    factor of its activation, `tail` from these to the output; both None where nothing but the site itself is. `before`
    gives the site and what all of them read from outside; `fixed` names what of that no input changes. `narrow`: the
    output holds the wanted classes alone. `forms` and `ways` are what trials found (see `SiteRuns`).
    """

    source: fx.GraphModule
    before: fx.GraphModule
    whole: Cut
    head: Cut | None
    tail: Cut | None
    leads: bool
    outside: tuple[str, ...]
    fixed: frozenset[str]
    narrow: bool
    forms: dict[tuple[int, int | None], tuple[Parts, bool]] = field(default_factory=dict)
    ways: dict[tuple[int, int, int, bool], tuple[int, int]] = field(default_factory=dict)
    some: dict[tuple[str, ...], fx.GraphModule] = field(default_factory=dict)

    def only(self, names: tuple[str, ...]) -> fx.GraphModule:
        """A graph that gives some of what is read from outside, and runs no more than these need."""
        if names not in self.some:
            nodes = {node.name: node for node in self.source.graph.nodes}
            self.some[names] = prefix(self.source, {name: nodes[name] for name in names})
        return self.some[names]

    def read_by(self, part: Cut, values: Mapping[str, Any]) -> list[Any]:
        """What a sub-graph reads from outside, in its order."""
        return [values[name] for name in part.boundary]


def parts_of(network: Network, number: int, classes: int | None) -> Parts:
    """The sub-graphs of a site; made when they are first asked for.

    `classes`, unless None, is how many the output has; all but the wanted ones are left out where that is possible.
    """
    key = number, network._restriction is not None, classes, network._altered
    if key not in network._parts:
        network._parts[key] = _made(network, number, classes)
    return network._parts[key]


def _narrowed(network: Network, classes: int) -> tuple[fx.GraphModule, fx.Node] | None:
    if classes not in network._narrowed:
        network._narrowed[classes] = narrow(network._module, classes)
    return network._narrowed[classes]


def _made(network: Network, number: int, classes: int | None) -> Parts:
    module, node = network._module, network._gate_nodes[number]
    restricted = network._restriction is not None
    found = None if classes is None or restricted else _narrowed(network, classes)
    narrower = False
    if found is not None:
        own = next(other for other in found[0].graph.nodes if other.name == node.name)
        narrower = found[1] in descendants([own])
        module, node = (found[0], own) if narrower else (module, node)
    whole = cut(module, [node])
    edge = frontier(module, node, gated=restricted)
    head = tail = None
    if edge and list(edge) != [node]:
        head, tail = cut(module, [node], edge), cut(module, edge)
    read = dict.fromkeys(name for part in (whole, head, tail) if part is not None for name in part.boundary)
    by_name = {each.name: each for each in module.graph.nodes}
    own_inputs = (GATES, CLASSES)
    inputs = {each for each in by_name.values() if each.op == "placeholder" and each.target not in own_inputs}
    fixed = frozenset(name for name in read if not inputs & {by_name[name], *ancestors([by_name[name]])})
    start = prefix(module, {"site": node} | {name: by_name[name] for name in read})
    return Parts(module, start, whole, head, tail, bool(edge), tuple(read), fixed, narrower)


def before(
    network: Network, parts: Parts, samples: Samples, wanted: Tensor | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """The site's activation, and the values that what follows reads from outside, by name.

    `wanted` are the classes that narrow parts give.
    """
    activation, *rest = _run(network, parts, parts.before, samples, wanted)
    return activation, dict(zip(parts.outside, rest, strict=True))


def outside(
    network: Network, parts: Parts, names: tuple[str, ...], samples: Samples, wanted: Tensor | None = None
) -> dict[str, Any]:
    """Some of the values that what follows reads from outside, by name."""
    return dict(zip(names, _run(network, parts, parts.only(names), samples, wanted), strict=True)) if names else {}


def _run(network: Network, parts: Parts, graph: fx.GraphModule, samples: Samples, wanted: Tensor | None) -> Any:
    gates = None if network._restriction is None else Gates(network.index, network._restriction)
    with torch.inference_mode(False), torch.no_grad(), plain_attention():
        return graph(*network.traced.bind(samples), gates, *([wanted] if parts.narrow else []))
