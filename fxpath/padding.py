"""`RealNeurons`: which neurons are a sample's own, where some of its tokens are padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .neurons import NeuronIndex


@dataclass(frozen=True, eq=False)
class RealNeurons:
    """The neurons of a batch that are its samples' own: those that do not lie at padding tokens.

    `tokens` is `(B, T)` bool, True at real ones. `axes` has for every site the axis of its shape along which the tokens
    lie; None where there is none, and then all neurons of the site are real. A channel is real at any rate, but stands
    for its units at real tokens alone.
    """

    tokens: Tensor
    axes: tuple[int | None, ...]
    index: NeuronIndex

    @property
    def batch(self) -> int:
        """B, the number of samples."""
        return len(self.tokens)

    def take(self, rows: Sequence[int]) -> RealNeurons:
        """The same of some samples."""
        return replace(self, tokens=self.tokens[torch.as_tensor(rows, device=self.tokens.device, dtype=torch.long)])

    def at(self, number: int) -> Tensor | None:
        """Where a site's units are real, bool `(B, 1, …, T, …, 1)` to go with `(B, *shape)`; None: everywhere."""
        axis = self.axes[number]
        if axis is None:
            return None
        shape = self.index.sites[number].shape
        return self.tokens.reshape(-1, *(size if place == axis else 1 for place, size in enumerate(shape)))

    def only(self, number: int, values: Tensor) -> Tensor:
        """A site's values, 0 at padding tokens."""
        real = self.at(number)
        if real is None:
            return values
        return values.reshape(-1, *self.index.sites[number].shape).masked_fill(~real, 0).reshape(values.shape)

    @cached_property
    def mask(self) -> Tensor:
        """The real neurons, `(B, N)` bool."""
        mask = torch.ones((self.batch, self.index.size), dtype=torch.bool, device=self.tokens.device)
        if self.index.granularity == "unit":
            for number, site in enumerate(self.index.sites):
                real = self.at(number)
                if real is not None:
                    mask[:, site.slice].view(-1, *site.shape).copy_(real.expand(-1, *site.shape))
        return mask

    @cached_property
    def units(self) -> Tensor:
        """Scalar units at real tokens at each site, `(B, sites)` int64."""
        count = self.tokens.sum(dim=1)
        columns = [
            torch.full_like(count, site.units) if axis is None else count * (site.units // site.shape[axis])
            for site, axis in zip(self.index.sites, self.axes, strict=True)
        ]
        return torch.stack(columns, dim=1)

    @cached_property
    def neurons(self) -> Tensor:
        """Real neurons at each site, `(B, sites)` int64."""
        if self.index.granularity == "unit":
            return self.units
        return torch.tensor([site.neurons for site in self.index.sites], device=self.tokens.device).expand(
            self.batch, -1
        )

    @cached_property
    def sizes(self) -> list[int]:
        """N_b, the scalar units that are each sample's own."""
        sizes: list[int] = self.units.sum(dim=1).tolist()
        return sizes

    @cached_property
    def _by_neuron(self) -> npt.NDArray[np.int64]:
        """Real units that a real neuron of each site stands for, `(B, sites)`."""
        counts: npt.NDArray[np.int64] = self.neurons.cpu().numpy()
        return self.units.cpu().numpy() // np.maximum(counts, 1)

    def weights(self, row: int) -> npt.NDArray[np.int64]:
        """Real units that each neuron of one sample stands for, `(N,)`; 1 everywhere at unit granularity."""
        return np.repeat(self._by_neuron[row], [site.neurons for site in self.index.sites])

    def count(self, mask: Tensor) -> Tensor:
        """Real units of the real neurons in a mask `(B, N)` bool, `(B,)` int64."""
        by_site = torch.stack([mask[:, site.slice].sum(dim=1) for site in self.index.sites], dim=1)
        return (by_site * torch.from_numpy(self._by_neuron).to(mask.device)).sum(dim=1)

    def kept(self, sparsity: float | str) -> list[int]:
        """k = ⌊(1 − κ)·N_b⌋ of each sample, as `NeuronIndex.kept` says."""
        return [self.index.kept(sparsity, size) for size in self.sizes]
