"""Methods that start from a pathway: its gradient, frozen or masked, and any method's opened score map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..attribution import masked_gradient, opened, pathway_gradient, pixel_scores
from ..keys import PathwayKey
from ..network import Network
from ..pathways import Pathways
from ..samples import Samples, type_of_target
from ..selectors import parse as parse_selector
from .registry import Method, one_map

OPENED = "*"  # ends the key of an opened score map


@dataclass(frozen=True)
class PathwayGradient:
    """∇ₓΦ̂(x; e) of the pathway `of` (the paper's §4): off-path neurons are the constants that they are at x."""

    of: str

    @property
    def key(self) -> str:
        return self.of

    @property
    def pathway(self) -> str:
        return self.of

    def attribute(
        self, network: Network, x: Any, target: type_of_target = None, pathways: Pathways | None = None
    ) -> Tensor:
        samples = network.samples(x, target)
        found = _selected(network, samples, self.of) if pathways is None else pathways
        return one_map(pathway_gradient(network, samples, found))


@dataclass(frozen=True)
class MaskedGradient(PathwayGradient):
    """∇ₓΦ(x; e ⊙ a) of the pathway `of`: off-path activations are 0. Not the paper's quantity; its released code's."""

    @property
    def key(self) -> str:
        return f"masked_gradient:{self.of}"

    def attribute(
        self, network: Network, x: Any, target: type_of_target = None, pathways: Pathways | None = None
    ) -> Tensor:
        samples = network.samples(x, target)
        found = _selected(network, samples, self.of) if pathways is None else pathways
        return one_map(masked_gradient(network, samples, found))


@dataclass(frozen=True)
class Opened:
    """The score map of a method after grey-scale opening (the paper's `*`): |·|, largest of the channels, opened."""

    method: Method
    size: int = 3

    @property
    def key(self) -> str:
        return f"{self.method.key}{OPENED}"

    @property
    def pathway(self) -> str | None:
        return self.method.pathway

    def attribute(
        self, network: Network, x: Any, target: type_of_target = None, pathways: Pathways | None = None
    ) -> Tensor:
        found = self.method.attribute(network, x, target, pathways)
        return opened(pixel_scores(found), self.size).unsqueeze(1)


def _selected(network: Network, samples: Samples, of: str) -> Pathways:
    """The pathways of a key, selected here."""
    key = PathwayKey.parse(of)
    selector = parse_selector(key.family)
    levels: Sequence[float] = () if key.sparsity is None else (key.sparsity,)
    selection = selector.select(network, samples, levels)
    return selection[key.sparsity]
