"""Where descents take place: samples in the memory format to run in, and how the sites' values lie in memory there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..gates import Gates
from ..neurons import NeuronIndex, Site
from ..samples import Samples
from ..trials import random_like, unless_it_fails

if TYPE_CHECKING:
    from ..network import Network

_ALIKE = 1e-3  # of a site's largest activation, and of the largest |Φ|: how far two memory formats may differ
_SLOPES = 0.1  # the same of gradients, as a whole: at a kink they jump


@dataclass(frozen=True, eq=False)
class Ground:
    """Where descents take place: samples in the memory format to run in, and what the original network gives there.

    `layouts` are tensors without memory that are laid out as each site's activation. `moved`: the samples lie in
    another memory format than those given, so that last bits differ.
    """

    samples: Samples
    layouts: Sequence[Tensor]
    output: Any
    moved: bool

    @classmethod
    def of(cls, network: Network, samples: Samples) -> Ground:
        """On a CPU images go channels last, where the network answers the same with them: up to a third less time.

        That is tried once a network, on random values, so that no sample decides for others.
        """
        there = samples.map(_channels_last) if samples.device.type == "cpu" else samples
        moved = any(_inner(one) != _inner(other) for one, other in zip(samples.tensors, there.tensors, strict=True))
        if moved:
            few = samples.take(range(min(samples.batch, 2)))
            key = few.batch, network._altered
            if key not in network._formats:
                network._formats[key] = _answers_alike(network, few)
            moved = network._formats[key]
        return cls._seen(network, there if moved else samples, moved=moved)

    @classmethod
    def _seen(cls, network: Network, samples: Samples, *, moved: bool) -> Ground:
        layouts: dict[int, Tensor] = {}

        def note(number: int, value: Tensor) -> None:
            layouts[number] = torch.empty_like(value, device="meta")

        with torch.no_grad():
            output = network._run(samples, Gates(network.index, watch=note))
        return cls(samples, [layouts[number] for number in range(len(network.index))], output, moved)


def _answers_alike(network: Network, samples: Samples) -> bool:
    """Whether activations, response and gradients are the same channels last, but for rounding."""
    with torch.no_grad():
        logits = unless_it_fails(lambda: network.response.logits(network._run(samples, None)))
    target = None if logits is None else torch.zeros(samples.batch, dtype=torch.int64, device=samples.device)
    plain = replace(samples.map(random_like), target=target)
    runs = [unless_it_fails(partial(network.gradients, each)) for each in (plain, plain.map(_channels_last))]
    if None in runs:
        return False
    one, other = runs
    pairs = zip([one.response, *one.activations], [other.response, *other.activations], strict=True)
    slopes = zip(one.gradients, other.gradients, strict=True)
    return all(_near(*pair) for pair in pairs) and all(bool((a - b).norm() <= _SLOPES * a.norm()) for a, b in slopes)


def _near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(other, one, rtol=0, atol=_ALIKE * float(one.abs().amax())) if one.numel() else True


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.ndim == 4 and tensor.dtype in (torch.float32, torch.float64):  # coarser types round too differently
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def _inner(tensor: Tensor) -> list[int]:
    """Strides within a sample, of the axes that are longer than 1; the others' mean nothing."""
    return [stride for stride, size in zip(tensor.stride()[1:], tensor.shape[1:], strict=True) if size > 1]


class MemoryOrder:
    """Rows of all units in the order in which the values of sites laid out as `layouts` lie in memory.

    Reading and writing such rows copies nothing and is as fast as memory allows. `places` N of a row are those of the
    index where all sites are laid out plainly.
    """

    def __init__(self, index: NeuronIndex, layouts: Sequence[Tensor]) -> None:
        self.index = index
        self._axes = [_slowest_first(layout) for layout in layouts]
        self.plain = all(list(axes) == sorted(axes) for axes in self._axes)

    def rows(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The sites' tensors `(B, …)` as rows, `(B, units)` each."""
        pairs = zip(self.index.sites, self._axes, values, strict=True)
        return [value.permute(axes).reshape(-1, site.units) for site, axes, value in pairs]

    def sites(self, rows: Tensor) -> list[Tensor]:
        """Views of rows `(B, N)` as the sites' gates, `(B, *site.shape)` each, laid out as their activations."""
        return [
            _viewed(rows[:, site.slice], site, axes) for site, axes in zip(self.index.sites, self._axes, strict=True)
        ]

    @cached_property
    def numbers(self) -> npt.NDArray[np.int64]:
        """The neuron at each place, `(N,)`."""
        plain = torch.arange(self.index.size).unsqueeze(0)
        blocks = [
            plain[:, site.slice].view(-1, *_rest(site)) for site in self.index.sites
        ]  # one row a row of the site's tensor
        return torch.cat([block.flatten() for block in self.rows(blocks)]).numpy()

    def by_number(self, row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A row in the order of the index."""
        if self.plain:
            return row
        found = np.empty_like(row)
        found[self.numbers] = row
        return found


def _slowest_first(layout: Tensor) -> tuple[int, ...]:
    """A tensor's axes as they lie in memory, rows first; those of length 1 stay with the axis before them."""
    strides = list(layout.stride())
    for axis in range(1, layout.ndim):
        if layout.shape[axis] == 1:
            strides[axis] = strides[axis - 1] if axis > 1 else max(strides)
    return (0, *sorted(range(1, layout.ndim), key=lambda axis: -strides[axis]))


def _rest(site: Site) -> tuple[int, ...]:
    """The shape of one row of a site's tensor."""
    return site.shape[1:] if site.fold > 1 else site.shape


def _viewed(rows: Tensor, site: Site, axes: Sequence[int]) -> Tensor:
    fold, rest = site.shape[: len(site.shape) - len(_rest(site))], _rest(site)
    lead = 1 + len(fold)
    view = rows.view(-1, *fold, *(rest[axis - 1] for axis in axes[1:]))
    order = [*range(lead), *(lead + axis - 1 for axis in axes[1:])]  # which axis of the gates each one of the view is
    return view.permute(sorted(range(len(order)), key=order.__getitem__))
