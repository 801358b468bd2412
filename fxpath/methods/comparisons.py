"""The attribution methods that pathway gradients are compared with (the paper's §5), most of them captum's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..attribution import pathway_gradient
from ..network import Network
from ..pathways import Pathways
from ..samples import type_of_target
from .registry import Compared, one_map, register


@register
@dataclass(frozen=True)
class Gradient(Compared):
    """∇ₓΦ(x), the plain gradient."""

    name: ClassVar[str] = "gradient"

    def attribute(
        self, network: Network, x: Any, target: type_of_target = None, pathways: Pathways | None = None
    ) -> Tensor:
        everything = Pathways(network.original(x).active.new_ones((1, network.index.size)), network.index)
        return one_map(pathway_gradient(network, x, everything, target))
