"""The one primitive, λ ⊙ a + μ, and what watches the gates while a network runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .errors import RestrictionError, SiteError
from .neurons import NeuronIndex, Site
from .samples import Samples, type_of_id


@dataclass(frozen=True, eq=False)
class Restriction:
    """λ and μ of every site: `(B or 1, *gate_shape)`, None for an open gate or no constant.

    A bool λ selects exactly: a where it is True, μ (0 without one) where it is False. A float λ multiplies and μ is
    added; both are differentiable in λ and μ. `inverted` takes a bool λ for its complement, without
    making that; None stays open. `held`: in place of μ stands what a itself is in this very run, so that a passes as it
    is and λ, bool, is left to its gradient; `forward` holds it for derivatives in forward mode as well.
    """

    scale: Sequence[Tensor | None]
    shift: Sequence[Tensor | None]
    inverted: bool = False
    held: bool = False
    forward: bool = False
    of: tuple[type_of_id, ...] | None = None

    def checked(self, index: NeuronIndex, device: torch.device) -> Restriction:
        """This restriction, if it fits the sites; raises `RestrictionError` where it does not.

        Tensors made in inference mode are copied, as gradients need.
        """
        if not len(self.scale) == len(self.shift) == len(index):
            raise RestrictionError(
                f"restriction: expected λ and μ for {len(index)} sites, found {len(self.scale)} and {len(self.shift)}"
            )
        for name, tensors in (("λ", self.scale), ("μ", self.shift)):
            for site, given in zip(index.sites, tensors, strict=True):
                if given is not None:
                    _require_fit(name, given, site, device)
        floats = [site.name for site, given in zip(index.sites, self.scale, strict=True) if _is_number(given)]
        if (self.inverted or self.held) and floats:
            raise RestrictionError(
                f"restriction: only a bool λ can be {'inverted' if self.inverted else 'held'}, found numbers for "
                f"{', '.join(floats[:3])}"
            )
        if not any(t is not None and t.is_inference() for t in (*self.scale, *self.shift)):
            return self
        with torch.inference_mode(False):
            return replace(self, scale=[_plain(t) for t in self.scale], shift=[_plain(t) for t in self.shift])


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
        self.batch: int | None = None  # how many samples there are, where that is known
        self.seen: dict[int, Tensor] = {}

    def enter(self, samples: Samples) -> None:
        """Note whose run begins; raises `RestrictionError` where the constants are those of other samples, by name."""
        self.batch = samples.batch
        known = None if self.restriction is None else self.restriction.of
        if known is None or samples.ids is None or len(known) != samples.batch or known == samples.names:
            return
        other, own = next(pair for pair in zip(samples.names, known, strict=True) if pair[0] != pair[1])
        raise RestrictionError(
            f"frozen network: there are no constants for sample {other!r} in its row, those there were taken from "
            f"{own!r}; freeze the network at these samples, network.frozen(pathways, at=…), or give no ids"
        )

    def __call__(self, number: int, activation: Tensor) -> Tensor:
        value = activation
        if self.batch is not None:
            _require_rows(activation, self.index.sites[number], self.batch)
        if self.restriction is not None:
            site = self.index.sites[number]
            scale, shift = self.restriction.scale[number], self.restriction.shift[number]
            if self.restriction.held and scale is not None:
                if self.restriction.forward:
                    own = activation.detach().view(-1, *site.shape)
                    value = _apply(activation, scale, own, site, self.restriction.inverted)
                else:
                    value = _held(activation, scale, site, self.restriction.inverted)
            elif scale is not None or shift is not None:
                value = _apply(activation, scale, shift, site, self.restriction.inverted)
        if self.differentiate and (number in self.entries or not value.requires_grad):
            value = value.detach().requires_grad_()
        if self.keep:
            self.seen[number] = value
        if self.watch is not None:
            self.watch(number, value)
        return value


def _require_rows(activation: Tensor, site: Site, batch: int) -> None:
    """Raise `SiteError` where a site's shape depends on more than the number of samples: rows are then not theirs."""
    expected = (batch * site.fold, *(site.shape[1:] if site.fold > 1 else site.shape))
    if activation.shape != expected:
        raise SiteError(
            f"site {site.name}: expected {expected} for {batch} samples, found {tuple(activation.shape)}; its shape "
            "depends on values (a boolean index, rows sent to one of several experts), so its rows are no samples. "
            "Leave it out with sites=…, or compute all rows and mask them"
        )


def _apply(activation: Tensor, scale: Tensor | None, shift: Tensor | None, site: Site, inverted: bool) -> Tensor:
    block = activation.view(-1, site.fold, *activation.shape[1:]) if site.fold > 1 else activation
    for name, given in (("gates", scale), ("constants", shift)):
        if given is not None and given.shape[0] not in (1, block.shape[0]):
            raise RestrictionError(
                f"restricted network: {name} are for a batch of {given.shape[0]}, the input has {block.shape[0]} "
                "samples; give one pathway a sample, or a single one for all"
            )
    if scale is not None and scale.dtype == torch.bool:
        off = block.new_zeros(()) if shift is None else shift
        value = torch.where(scale, off, block) if inverted else torch.where(scale, block, off)
    else:
        value = block if scale is None else block * scale
        value = value if shift is None else value + shift
    if site.fold > 1:
        value = value.flatten(0, 1)
    if value.shape != activation.shape:
        raise RestrictionError(
            f"restricted network: site {site.name} gives {tuple(activation.shape)} here, its gates are for {site.shape}"
        )
    value = value.to(activation.dtype)  # λ and μ may be of another type; what follows the site expects its own
    return value if value.stride() == activation.stride() else _laid_out_like(value, activation)


def _held(activation: Tensor, scale: Tensor, site: Site, inverted: bool) -> Tensor:
    """The activation itself, as λ ⊙ a + (1 − λ) ⊙ a is; λ applies to the gradient that comes back."""
    if not activation.requires_grad:
        return activation
    value = activation.view_as(activation)  # the hook is for what the gate hands on, not for what others made of a
    value.register_hook(lambda slope: _apply(slope, scale, None, site, inverted))  # type: ignore[no-untyped-call]
    return value


def _require_fit(name: str, given: Tensor, site: Site, device: torch.device) -> None:
    sizes = zip(given.shape[1:], site.shape, strict=False)
    if given.ndim != len(site.shape) + 1 or not all(have in (1, size) for have, size in sizes):
        raise RestrictionError(
            f"restriction: expected {name} of site {site.name} as (B or 1, *{site.shape}), or 1 in place of an axis, "
            f"found {tuple(given.shape)}"
        )
    if given.device != device:
        raise RestrictionError(f"restriction: {name} of site {site.name} is on {given.device}, the model on {device}")


def _is_number(given: Tensor | None) -> bool:
    return given is not None and given.dtype != torch.bool


def _plain(tensor: Tensor | None) -> Tensor | None:
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def _laid_out_like(value: Tensor, activation: Tensor) -> Tensor:
    """`value` with its axes in memory as the activation's: kernels, and with them last bits, go by memory format."""
    order = sorted(range(value.ndim), key=activation.stride, reverse=True)
    back = sorted(range(value.ndim), key=order.__getitem__)
    return value.permute(order).contiguous().permute(back)


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


def note_positive(value: Tensor, site: Site, rows: Tensor) -> None:
    """Write a > 0 into the site's columns of `rows` `(B, N)` bool; a channel counts when any of its units does."""
    if site.neurons != site.units:
        rows[:, site.slice] = grouped(value > 0, site) > 0
    elif value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64):
        # NumPy compares three times as fast as torch.gt
        np.greater(flat(value.detach(), site).numpy(), 0, out=rows.numpy()[:, site.slice])
    else:
        torch.gt(flat(value, site), 0, out=rows[:, site.slice])


def unfilled(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor like `torch.empty`'s, for large tables.

    On the CPU its memory is NumPy's, which asks the system for huge pages: without them half of the time goes into
    page faults.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    memory = torch.from_numpy(np.empty(shape[0] * shape[1] * dtype.itemsize, dtype=np.uint8))
    return memory.view(dtype).view(shape)
