"""Methods that start from a pathway: its gradient, frozen or masked, a control of it, and any method's opened map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attribution import masked_gradient, opened, pathway_gradient, pixel_scores
from ..errors import RestrictionError
from ..keys import PathwayKey
from ..matching import draw_active
from ..network import Network
from ..pathways import Pathways
from ..samples import Samples, type_of_target
from ..selectors import parse as parse_selector
from .explained import one_input, one_map
from .registry import Method, require_whole

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
        samples = one_input(self.key, network, x, target)
        return one_map(pathway_gradient(network, samples, _given(self, network, samples, pathways)))


@dataclass(frozen=True)
class MaskedGradient(PathwayGradient):
    """∇ₓΦ(x; e ⊙ a) of the pathway `of`: off-path activations are 0. Not the paper's quantity; its released code's."""

    @property
    def key(self) -> str:
        return f"masked_gradient:{self.of}"

    def attribute(
        self, network: Network, x: Any, target: type_of_target = None, pathways: Pathways | None = None
    ) -> Tensor:
        samples = one_input(self.key, network, x, target)
        return one_map(masked_gradient(network, samples, _given(self, network, samples, pathways)))


@dataclass(frozen=True)
class RandomActive(PathwayGradient):
    """A control: the pathway gradient of random active neurons, at each site as many as the pathway `of` keeps there.

    Where it keeps more than are active (greedy and random pathways hold dead neurons) all active ones are taken. The
    draws are those of `fxpath.analysis.random_active` for a store of the same sample ids and pathways.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("random_active", "seed", self.seed, 0)

    @property
    def key(self) -> str:
        return f"random_active:{f'seed={self.seed}:' if self.seed else ''}{self.of}"

    def attribute(
        self, network: Network, x: Any, target: type_of_target = None, pathways: Pathways | None = None
    ) -> Tensor:
        samples = one_input(self.key, network, x, target)
        matched = self.draw(network, samples, _given(self, network, samples, pathways))
        return one_map(pathway_gradient(network, samples, matched))

    def draw(self, network: Network, samples: Samples, pathways: Pathways) -> Pathways:
        """Random active neurons for `pathways`, one pathway for each sample; raises as `pathway_gradient` does."""
        network._gates_of(pathways)
        if 1 != pathways.batch != samples.batch:
            raise RestrictionError(
                f"{self.key}: there are {pathways.batch} pathways for {samples.batch} samples; give one each"
            )
        original, real = network.original(samples), network.real(samples)
        own = Pathways(pathways.mask.expand(samples.batch, -1), network.index).within(real)
        masks, patterns = own.packed().cpu().numpy(), original.packed.cpu().numpy()
        drawn = [
            draw_active(network.index, mask, pattern, self.of, name, self.seed)
            for mask, pattern, name in zip(masks, patterns, samples.names, strict=True)
        ]
        bits = torch.from_numpy(np.stack(drawn)).to(network.device)
        return Pathways.from_packed(bits, network.index).within(real)


@dataclass(frozen=True)
class Opened:
    """The score map of a method after grey-scale opening (the paper's `*`): |·|, largest of the channels, opened."""

    method: Method
    size: int = 3

    def __post_init__(self) -> None:
        require_whole("opening", "size", self.size, 1)

    @property
    def key(self) -> str:
        return f"{self.method.key}{OPENED}{self.size if self.size != 3 else ''}"

    @property
    def pathway(self) -> str | None:
        return self.method.pathway

    def attribute(
        self, network: Network, x: Any, target: type_of_target = None, pathways: Pathways | None = None
    ) -> Tensor:
        found = self.method.attribute(network, x, target, pathways)
        return opened(pixel_scores(found), self.size).unsqueeze(1)


def _given(method: PathwayGradient, network: Network, samples: Samples, pathways: Pathways | None) -> Pathways:
    """The pathways that a method starts from, selected here unless they are given."""
    if pathways is not None:
        return pathways
    key = PathwayKey.parse(method.pathway)
    levels: Sequence[float] = () if key.sparsity is None else (key.sparsity,)
    return parse_selector(key.family).select(network, samples, levels)[key.sparsity]
