"""The baselines that every comparison carries: Random, Active and Magnitude."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ..keys import checked_sparsities, exact_sparsity
from ..neurons import NeuronIndex, select_largest
from ..pathways import Pathways, Scores, Selection, by_thread
from ..samples import Samples, type_of_id, type_of_target
from .contribution import ByScore
from .registry import register

if TYPE_CHECKING:
    from ..network import Network


@register
@dataclass(frozen=True)
class Magnitude(ByScore):
    """The neurons with the largest activation a; no gradient, no target."""

    key: ClassVar[str] = "magnitude"

    def scores(self, network: Network, samples: Any, target: type_of_target = None) -> Scores:  # noqa: ARG002
        """Activations `(B, N)`; summed over a channel at channel granularity."""
        return Scores(network.rows(network.activations(samples)), network.index, key=self.key)


@register
@dataclass(frozen=True)
class Active:
    """The active sub-network, e = 1[a > 0]: one pathway, no sparsity; `selection[None]`."""

    key: ClassVar[str] = "active"
    single: ClassVar[bool] = True

    def select(self, network: Network, samples: Any, sparsities: Sequence[float] = ()) -> Selection:  # noqa: ARG002
        return Selection({None: Pathways(network.original(samples).active, network.index)})


def generator_of(seed: int, name: type_of_id) -> np.random.Generator:
    """A random stream of its own for each (seed, sample id), the same on every machine and device."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))


@register
@dataclass(frozen=True)
class Random:
    """Random neurons, dead ones too: network-wide, or with the same share of every site (`per_layer`).

    Seeded by (seed, sample id), so neither order nor neighbours nor device change anything. Pathways of growing
    sparsity are nested.
    """

    key: ClassVar[str] = "random"
    single: ClassVar[bool] = False

    seed: int = 0
    per_layer: bool = False

    def select(self, network: Network, samples: Any, sparsities: Sequence[float]) -> Selection:
        sparsities = checked_sparsities(sparsities)
        named = Samples.of(samples)
        masks = np.empty((len(sparsities), len(named.names), network.index.size), dtype=np.bool_)

        def draw(rows: range) -> None:
            draws = np.empty(network.index.size, dtype=np.float32)
            for row in rows:
                self._draw(network.index, named.names[row], sparsities, draws, masks[:, row])

        by_thread(draw, len(named.names))
        on_device = torch.from_numpy(masks).to(named.device)
        return Selection({s: Pathways(m, network.index) for s, m in zip(sparsities, on_device, strict=True)})

    def masks(
        self, index: NeuronIndex, name: type_of_id, sparsities: Sequence[float]
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Masks of one sample, `(len(sparsities), N)`."""
        masks = np.empty((len(sparsities), index.size), dtype=np.bool_)
        self._draw(index, name, sparsities, np.empty(index.size, dtype=np.float32), masks)
        return masks

    def _draw(
        self,
        index: NeuronIndex,
        name: type_of_id,
        sparsities: Sequence[float],
        draws: np.ndarray[Any, np.dtype[np.float32]],
        masks: np.ndarray[Any, np.dtype[np.bool_]],
    ) -> None:
        generator_of(self.seed, name).random(dtype=np.float32, out=draws)
        np.subtract(np.float32(1), draws, out=draws)  # in (0, 1]: every neuron can be taken
        if not self.per_layer:
            weights = index.weights if index.granularity == "channel" else None
            select_largest(draws, [index.kept(s) for s in sparsities], weights, out=masks)
            return
        for site in index.sites:
            counts = [int((1 - Fraction(exact_sparsity(sparsity))) * site.neurons) for sparsity in sparsities]
            select_largest(draws[site.slice], counts, out=masks[:, site.slice])
