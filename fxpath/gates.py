"""The one primitive, λ ⊙ a + μ, and what watches the gates while a network runs (METHODS §2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import RestrictionError
from .neurons import NeuronIndex, Site


@dataclass(frozen=True, eq=False)
class Restriction:
    """λ and μ of every site: `(B or 1, *gate_shape)`, None for an open gate or no constant.

    A bool λ selects exactly: a where it is True, μ (0 without one) where it is False. A float λ multiplies and μ is
    added; both are differentiable in λ and μ.
    """

    scale: Sequence[Tensor | None]
    shift: Sequence[Tensor | None]


class Gates:
    """What the gate nodes call during one run: applies a restriction, keeps or watches what passes.

    With `differentiate`, every site's value is kept as a tensor that gradients can be taken of; sites that depend on
    no earlier one are cut from what lies before them, so nothing is stored or computed there.
    """

    def __init__(
        self,
        index: NeuronIndex,
        restriction: Restriction | None = None,
        *,
        keep: bool = False,
        differentiate: bool = False,
        entries: frozenset[int] = frozenset(),
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self.index = index
        self.restriction = restriction
        self.keep = keep or differentiate
        self.differentiate = differentiate
        self.entries = entries
        self.watch = watch
        self.seen: dict[int, Tensor] = {}

    def __call__(self, number: int, activation: Tensor) -> Tensor:
        value = activation
        if self.restriction is not None:
            site = self.index.sites[number]
            scale, shift = self.restriction.scale[number], self.restriction.shift[number]
            if scale is not None or shift is not None:
                value = _apply(activation, scale, shift, site)
        if self.differentiate and (number in self.entries or not value.requires_grad):
            value = value.detach().requires_grad_()
        if self.keep:
            self.seen[number] = value
        if self.watch is not None:
            self.watch(number, value)
        return value


def _apply(activation: Tensor, scale: Tensor | None, shift: Tensor | None, site: Site) -> Tensor:
    block = activation.view(-1, site.fold, *activation.shape[1:]) if site.fold > 1 else activation
    for name, given in (("gates", scale), ("constants", shift)):
        if given is not None and given.shape[0] not in (1, block.shape[0]):
            raise RestrictionError(
                f"restricted network: {name} are for a batch of {given.shape[0]}, the input has {block.shape[0]} "
                "samples; give one pathway a sample, or a single one for all"
            )
    if scale is not None and scale.dtype == torch.bool:
        off = block.new_zeros(()) if shift is None else shift
        value = torch.where(scale, block, off)
    else:
        value = block if scale is None else block * scale
        value = value if shift is None else value + shift
    if site.fold > 1:
        value = value.flatten(0, 1)
    if value.shape != activation.shape:
        raise RestrictionError(
            f"restricted network: site {site.name} gives {tuple(activation.shape)} here, its gates are for {site.shape}"
        )
    return value


def flat(value: Tensor, site: Site) -> Tensor:
    """A site's tensor as rows of scalar units, `(B, units)`."""
    return value.reshape(-1, site.units)


def grouped(value: Tensor, site: Site) -> Tensor:
    """Sum of a site's tensor over each gate's units, `(B, neurons)`; the flat tensor at unit granularity."""
    if site.neurons == site.units:
        return flat(value, site)
    blocks = value.reshape(-1, *site.shape)
    axes = [axis + 1 for axis in range(len(site.shape)) if axis != site.axis]
    return blocks.sum(dim=axes) if axes else blocks
