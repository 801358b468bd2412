"""The part of a network that follows one site, to be run alone on cached inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .gates import Gates
from .rewriting import cut, prefix
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
        node = network._gate_nodes[number]
        self._cut = cut(network._module, [node])
        by_name = {found.name: found for found in network._module.graph.nodes}
        self._prefix = prefix(network._module, {"site": node} | {name: by_name[name] for name in self._cut.boundary})

    def cache(self, x: Any) -> tuple[Tensor, tuple[Any, ...]]:
        """The site's activation, and the other values that the suffix reads (skips around the site)."""
        network = self.network
        samples = network.samples(x)
        gates = None if network._restriction is None else Gates(network.index, network._restriction)
        with torch.inference_mode(False), torch.no_grad(), plain_attention():
            activation, *boundary = self._prefix(*network.traced.bind(samples), gates)
        return activation, tuple(boundary)

    def __call__(self, activation: Tensor, boundary: Sequence[Any]) -> Any:
        """The network's output from the site's activation on; differentiable in it."""
        network = self.network
        gates = None if network._restriction is None else Gates(network.index, network._restriction)
        with plain_attention():
            return network.traced.unbind(self._cut.module(activation, *boundary, gates))
