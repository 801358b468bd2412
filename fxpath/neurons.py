"""The uniform neuron index: flat number ↔ (site, coordinates), and the layout of packed bits. Plain data, no torch."""

from __future__ import annotations

import builtins
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .errors import InputError, SiteError, unknown
from .keys import exact_sparsity

Granularity = Literal["unit", "channel"]


@dataclass(frozen=True)
class Site:
    """One execution of an activation function.

    `shape` is a sample's block of the site's output, without the batch axis. `axis` is the channel axis within
    `shape`. `fold` is the number of rows of the site's tensor that belong to one sample (1 unless the network folds
    another axis into the batch; then `shape[0] == fold`). `start` and `byte` are where the site's neurons begin in a
    row of neurons and in a packed row; each site starts on a byte.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    start: int
    byte: int
    neurons: int
    axis: int = 0
    fold: int = 1

    @property
    def slice(self) -> builtins.slice:
        """The site's neurons in a flat row `(N,)`."""
        return builtins.slice(self.start, self.start + self.neurons)

    @property
    def bytes(self) -> builtins.slice:
        """The site's bytes in a packed row."""
        return builtins.slice(self.byte, self.byte + (self.neurons + 7) // 8)

    @property
    def units(self) -> int:
        """Scalar units in a sample's block; equals `neurons` at unit granularity."""
        return math.prod(self.shape)

    @property
    def gate_shape(self) -> tuple[int, ...]:
        """The shape of a sample's gates, broadcastable to `shape`: `shape` itself, or `(1, …, channels, …, 1)`."""
        if self.neurons == self.units:
            return self.shape
        return tuple(size if axis == self.axis else 1 for axis, size in enumerate(self.shape))


class NeuronIndex:
    """All neurons of a network: sites one after the other, C order within a site.

    At granularity "channel" a neuron is a whole channel of a site; `size` counts channels and `units` scalar units.

    >>> index = NeuronIndex.build([("conv.relu", "relu", (2, 3)), ("fc.relu", "relu", (5,))])
    >>> index.size, index.nbytes, index.locate(7), index.flat("fc.relu", (1,))
    (11, 2, ('fc.relu', (1,)), 7)
    """

    def __init__(self, sites: Sequence[Site], granularity: Granularity = "unit") -> None:
        self.sites = tuple(sites)
        self.granularity: Granularity = granularity

    @classmethod
    def build(
        cls,
        blocks: Sequence[tuple[str, str, tuple[int, ...]]],
        *,
        axes: Sequence[int] | None = None,
        folds: Sequence[int] | None = None,
        granularity: Granularity = "unit",
    ) -> NeuronIndex:
        """Lay sites out one after the other from `(name, op, shape)` of each."""
        sites: list[Site] = []
        start = byte = 0
        for number, (name, op, shape) in enumerate(blocks):
            axis = axes[number] if axes else 0
            fold = folds[number] if folds else 1
            neurons = math.prod(shape) if granularity == "unit" else (shape[axis] if shape else 1)
            sites.append(Site(name, op, tuple(shape), start, byte, neurons, axis, fold))
            start, byte = start + neurons, byte + (neurons + 7) // 8
        return cls(sites, granularity)

    @cached_property
    def size(self) -> int:
        """N, the number of neurons."""
        return sum(site.neurons for site in self.sites)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a packed row."""
        return sum((site.neurons + 7) // 8 for site in self.sites)

    @cached_property
    def units(self) -> int:
        """Scalar units in all; equals `size` at unit granularity."""
        return sum(site.units for site in self.sites)

    @cached_property
    def weights(self) -> npt.NDArray[np.int64]:
        """`(N,)`: how many scalar units each neuron stands for (1 everywhere at unit granularity)."""
        return np.concatenate(
            [np.full(site.neurons, site.units // max(site.neurons, 1), dtype=np.int64) for site in self.sites]
            or [np.zeros(0, dtype=np.int64)]
        )

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NeuronIndex) and (self.sites, self.granularity) == (other.sites, other.granularity)

    def __hash__(self) -> int:
        return hash((self.sites, self.granularity))

    def __repr__(self) -> str:
        return f"NeuronIndex({len(self.sites)} sites, {self.size} neurons, granularity={self.granularity!r})"

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {site.name: number for number, site in enumerate(self.sites)}

    def number(self, site: str | int | Site) -> int:
        """The number of a site given by name, number or itself; raises `SiteError` with the nearest names."""
        if isinstance(site, Site):
            site = site.name
        if isinstance(site, str):
            if site not in self._by_name:
                raise SiteError(unknown("site", site, self._by_name))
            return self._by_name[site]
        if not -len(self.sites) <= site < len(self.sites):
            raise SiteError(f"site number: expected 0 … {len(self.sites) - 1}, found {site}")
        return site % len(self.sites)

    def site(self, site: str | int | Site) -> Site:
        """The site of a name or number."""
        return self.sites[self.number(site)]

    def locate(self, neuron: int) -> tuple[str, tuple[int, ...]]:
        """Site name and coordinates of a flat neuron number; a channel's coordinates are `(channel,)`."""
        if not 0 <= neuron < self.size:
            raise InputError(f"neuron: expected 0 … {self.size - 1}, found {neuron}")
        starts = [site.start for site in self.sites]
        site = self.sites[int(np.searchsorted(starts, neuron, side="right")) - 1]
        if self.granularity == "channel":
            return site.name, (neuron - site.start,)
        return site.name, tuple(int(c) for c in np.unravel_index(neuron - site.start, site.shape))

    def flat(self, site: str | int | Site, coordinates: Sequence[int]) -> int:
        """The flat neuron number of coordinates within a site."""
        found = self.site(site)
        shape = found.shape if self.granularity == "unit" else (found.neurons,)
        inside = len(coordinates) == len(shape) and all(0 <= c < s for c, s in zip(coordinates, shape, strict=True))
        if not inside:
            raise InputError(
                f"coordinates: expected a place within {shape} of {found.name}, found {tuple(coordinates)}"
            )
        return found.start + int(np.ravel_multi_index(tuple(coordinates), shape))

    def kept(self, sparsity: float | str, units: int | None = None) -> int:
        """k = ⌊(1 − κ)·N⌋ in exact decimals, N in scalar units: how many units a pathway of this sparsity may keep.

        `units` takes the place of N: those of a sample that has fewer. Raises `SparsityError` outside [0, 1).
        """
        size = self.units if units is None else units
        return int((1 - Fraction(exact_sparsity(sparsity))) * size)  # a Decimal's product would be rounded

    def pack(self, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
        """Boolean rows `(…, N)` → packed rows `(…, nbytes)`, little-endian bits, each site from a byte on."""
        if mask.shape[-1] != self.size:
            raise InputError(f"mask rows: expected {self.size} neurons, found {mask.shape[-1]}")
        if all(site.neurons % 8 == 0 for site in self.sites):
            return np.packbits(mask, axis=-1, bitorder="little")
        packed = np.empty((*mask.shape[:-1], self.nbytes), dtype=np.uint8)
        for site in self.sites:
            packed[..., site.bytes] = np.packbits(mask[..., site.slice], axis=-1, bitorder="little")
        return packed

    def unpack(self, packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Packed rows `(…, nbytes)` → boolean rows `(…, N)`."""
        if packed.shape[-1] != self.nbytes:
            raise InputError(f"packed rows: expected {self.nbytes} bytes, found {packed.shape[-1]}")
        mask = np.empty((*packed.shape[:-1], self.size), dtype=np.bool_)
        for site in self.sites:
            mask[..., site.slice] = self.unpack_site(site, packed[..., site.bytes])
        return mask

    @staticmethod
    def unpack_site(site: Site, packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """One site's bytes `(…, bytes)` → boolean `(…, site.neurons)`."""
        return np.unpackbits(packed, axis=-1, count=site.neurons, bitorder="little").view(np.bool_)

    def count_by_site(self, packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Set bits of packed rows `(n, nbytes)` at each site: `(n, sites)`."""
        counts = np.zeros((*packed.shape[:-1], len(self.sites)), dtype=np.int64)
        for number, site in enumerate(self.sites):
            np.bitwise_count(packed[..., site.bytes]).sum(axis=-1, dtype=np.int64, out=counts[..., number])
        return counts

    def to_json(self) -> dict[str, Any]:
        """The index as JSON data, complete: `from_json` gives it back."""
        keys = ("name", "op", "shape", "axis", "fold")
        sites = [{key: getattr(site, key) for key in keys} for site in self.sites]
        return {"granularity": self.granularity, "sites": sites}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NeuronIndex:
        """Read back what `to_json` wrote."""
        sites = data["sites"]
        return cls.build(
            [(site["name"], site["op"], tuple(site["shape"])) for site in sites],
            axes=[site["axis"] for site in sites],
            folds=[site["fold"] for site in sites],
            granularity=data["granularity"],
        )


def select_largest(
    values: npt.NDArray[np.floating[Any]],
    counts: Sequence[int],
    weights: npt.NDArray[np.int64] | None = None,
    *,
    out: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.bool_]:
    """Masks `(len(counts), N)` of the `counts[i]` largest of non-negative `values` `(N,)`, written to `out` if given.

    Ties at the threshold go to the smaller index; a value of 0 is never taken, so a mask may be smaller than asked.
    With `weights` a neuron counts as many units as it stands for and is taken whole, largest first, until the next
    one no longer fits.
    """
    masks: npt.NDArray[np.bool_] = np.empty((len(counts), values.size), dtype=np.bool_) if out is None else out
    if weights is not None and values.size and int(weights.max()) > 1:
        order = np.argsort(-values, kind="stable")
        spent = np.cumsum(weights[order])
        for mask, count in zip(masks, counts, strict=True):
            mask[:] = False
            mask[order[: int(np.searchsorted(spent, count, side="right"))]] = True
            mask[values <= 0] = False
        return masks
    partial = [count for count in counts if 0 < count < values.size]
    top = _candidates(values, max(partial)) if len(partial) > 1 else values
    for mask, count in zip(masks, counts, strict=True):
        if count <= 0:
            mask[:] = False
            continue
        threshold = nth_largest(top, count) if count < values.size else values.dtype.type(0)
        if threshold <= 0:
            np.greater(values, 0, out=mask)
            continue
        np.greater_equal(values, threshold, out=mask)
        surplus = int(np.count_nonzero(mask)) - count
        if surplus:
            tied = np.flatnonzero(values == threshold)
            mask[tied[tied.size - surplus :]] = False
    return masks


_SAMPLE = 16_384


def _bracket(values: npt.NDArray[np.floating[Any]], count: int) -> tuple[Any, Any]:
    """Two values that should have the `count`-th largest between them, by a strided sample."""
    sample = np.sort(values[:: values.size // _SAMPLE])
    place, margin = sample.size * (1 - count / values.size), 5 * np.sqrt(sample.size) / 2
    return sample[max(int(place - margin), 0)], sample[min(int(place + margin), sample.size - 1)]


def _candidates(values: npt.NDArray[np.floating[Any]], count: int) -> npt.NDArray[np.floating[Any]]:
    """Some of `values` that hold the `count` largest; all of them where a sample does not tell them apart."""
    if values.size <= 8 * _SAMPLE:
        return values
    low = _bracket(values, count)[0]
    found = np.compress(values >= low, values) if low > 0 else values
    return found if found.size >= count else values


def nth_largest(values: npt.NDArray[np.floating[Any]], count: int) -> np.floating[Any]:
    """The `count`-th largest of `values` `(N,)`, exact.

    A strided sample brackets it, so that only the few values inside the bracket are partitioned; where the bracket
    turns out not to hold it (values in a regular pattern), all are.
    """
    if values.size > 8 * _SAMPLE:
        low, high = _bracket(values, count)
        above = int(np.count_nonzero(values > high))
        if above < count:
            inside = np.compress((values >= low) & (values <= high), values)
            if count <= above + inside.size:
                return np.partition(inside, inside.size - (count - above))[inside.size - (count - above)]  # type: ignore[no-any-return]
    return np.partition(values, values.size - count)[values.size - count]  # type: ignore[no-any-return]
