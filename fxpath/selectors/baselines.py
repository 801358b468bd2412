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
from ..padding import RealNeurons
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
        real, values = network.real(samples), network.activations(samples)
        if real is not None:
            values = [real.only(number, value) for number, value in enumerate(values)]
        return Scores(network.rows(values), network.index, key=self.key, real=real)


@register
@dataclass(frozen=True)
class Active:
    """The active sub-network, e = 1[a > 0]: one pathway, no sparsity; `selection[None]`."""

    key: ClassVar[str] = "active"
    single: ClassVar[bool] = True

    def select(self, network: Network, samples: Any, sparsities: Sequence[float] = ()) -> Selection:  # noqa: ARG002
        return Selection({None: Pathways(network.original(samples).active, network.index, network.real(samples))})


def generator_of(seed: int, name: type_of_id) -> np.random.Generator:
    """A random stream of its own for each (seed, sample id), the same on every machine and device."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))


def draw_for(generator: np.random.Generator, draws: np.ndarray[Any, np.dtype[Any]], real: RealNeurons | None) -> None:
    """Fill `draws` `(N,)` with U[0, 1), and with 1 where a neuron is not real: the stream passes over it."""
    if real is None:
        generator.random(dtype=draws.dtype, out=draws)
    else:
        own = real.mask[0].cpu().numpy()
        draws.fill(1)
        draws[own] = generator.random(np.count_nonzero(own), dtype=draws.dtype)


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
        named, real = Samples.of(samples), network.real(samples)
        masks = np.empty((len(sparsities), len(named.names), network.index.size), dtype=np.bool_)

        def draw(rows: range) -> None:
            draws = np.empty(network.index.size, dtype=np.float32)
            for row in rows:
                own = None if real is None else real.take([row])
                self._draw(network.index, named.names[row], sparsities, draws, masks[:, row], own)

        by_thread(draw, len(named.names))
        on_device = torch.from_numpy(masks).to(named.device)
        return Selection({s: Pathways(m, network.index, real) for s, m in zip(sparsities, on_device, strict=True)})

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
        real: RealNeurons | None = None,
    ) -> None:
        draw_for(generator_of(self.seed, name), draws, real)
        np.subtract(np.float32(1), draws, out=draws)  # in (0, 1]: every neuron can be taken
        if not self.per_layer:
            weights = None
            if index.granularity == "channel":
                weights = index.weights if real is None else real.weights(0)
            kept = [index.kept(s) if real is None else real.kept(s)[0] for s in sparsities]
            select_largest(draws, kept, weights, out=masks)
            return
        sizes = [site.neurons for site in index.sites] if real is None else real.neurons[0].tolist()
        for site, size in zip(index.sites, sizes, strict=True):
            counts = [int((1 - Fraction(exact_sparsity(sparsity))) * size) for sparsity in sparsities]
            select_largest(draws[site.slice], counts, out=masks[:, site.slice])
