"""Responses that read a node within the network in place of its output: a hidden neuron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from .errors import InputError
from .keys import text_form
from .neurons import Site
from .places import whole_number

if TYPE_CHECKING:
    from .responses import Response


@runtime_checkable
class Hidden(Protocol):
    """A response that reads one node; a network traced with it ends there.

    It is a `Response` as well, and gets the node's value `(B, *site.shape)` as the output.
    """

    @property
    def site(self) -> str:
        """The name of the node."""

    def located(self, site: Site) -> Response:
        """This response, knowing the shape of the node's value; raises `InputError` where it does not fit."""


@dataclass(frozen=True)
class Neuron:
    """The value of one hidden neuron, or the mean of one channel; see `neuron`."""

    site: str
    coordinates: tuple[int, ...] | None = None
    channel: int | None = None
    axis: int = field(default=0, repr=False, compare=False)  # of the channels in a sample's block, as measured

    @property
    def name(self) -> str:
        more: dict[str, Any] = {"at": "/".join(map(str, self.coordinates))} if self.coordinates else {}
        return text_form("neuron", {"site": self.site, **more, "channel": self.channel})

    def located(self, site: Site) -> Neuron:
        """This response for the site as it was measured; raises `InputError` for a place outside of it."""
        if self.channel is not None:
            channels = site.shape[site.axis] if site.shape else 1
            if not 0 <= self.channel < channels:
                raise InputError(
                    f"neuron: {site.name} is {site.shape}, axis {site.axis} its channels; expected a channel in "
                    f"0 … {channels - 1}, found {self.channel}"
                )
            return replace(self, axis=site.axis)
        place = self.coordinates or ()
        if len(place) != len(site.shape) or not all(0 <= c < size for c, size in zip(place, site.shape, strict=True)):
            found = place if self.coordinates is not None else "none"
            raise InputError(
                f"neuron: expected coordinates within {site.shape} of {site.name}, found {found}; or channel=…, for "
                "the mean of one channel"
            )
        return self

    def logits(self, output: Any) -> None:  # noqa: ARG002  (the protocol's signature)
        return None

    def __call__(self, output: Any, target: Tensor | None) -> Tensor:  # noqa: ARG002
        value: Tensor = output
        if self.channel is None:
            place: tuple[Any, ...] = (slice(None), *(self.coordinates or ()))
            return value[place]
        if value.ndim > 1:
            value = value.select(1 + self.axis, self.channel)
        return value.flatten(1).mean(dim=1) if value.ndim > 1 else value


def neuron(site: str | Site, coordinates: Sequence[int] | None = None, *, channel: int | None = None) -> Neuron:
    """Φ is a hidden neuron's value: the one at `coordinates` of a site, or the mean over one channel of it.

    A network traced with this ends at the site: `network(x)` is the site's value, one block a sample, nothing behind
    the site is run or part of the fingerprint, and the index holds the chosen sites that lead to it; the site itself
    is no site there. `site` may be any node with a floating-point value for each sample, a pre-activation or an
    embedding too. Coordinates are those of `NeuronIndex.locate` at unit granularity, so
    `neuron(*index.locate(number))` explains a neuron by its number.

    Raises `InputError` for a wrong kind of argument; `fxpath.trace` raises `SiteError` for a node that is not there or
    that no site leads to, and `InputError` for a place outside of it.

    >>> neuron("layer3.0.relu", (5, 2, 2)).name
    'neuron:site=layer3.0.relu,at=5/2/2'
    """
    name = site.name if isinstance(site, Site) else site
    if not isinstance(name, str) or not name:
        raise InputError(f"neuron: expected the name of a site, found {site!r}")
    if coordinates is not None and channel is not None:
        raise InputError("neuron: expected coordinates or a channel, found both")
    if channel is not None:
        return Neuron(name, channel=whole_number("neuron", "the channel", channel))
    if coordinates is None:
        return Neuron(name)
    if not isinstance(coordinates, tuple | list | Tensor | np.ndarray):
        raise InputError(f"neuron: expected coordinates such as (5, 2, 2), found {coordinates!r}; or channel=…")
    return Neuron(name, tuple(whole_number("neuron", "a coordinate", each) for each in coordinates))
