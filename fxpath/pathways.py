"""`Scores` and `Pathways`: a number or a bit for every neuron of every sample, and the exact cut between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .errors import InputError, RestrictionError, SampleError, SparsityError
from .keys import checked_sparsities
from .neurons import NeuronIndex, Site, select_largest
from .padding import RealNeurons

_SPREAD = 0x0102040810204080  # times eight 0/1 bytes of an int64 gathers their bits in its highest byte


@dataclass(frozen=True, eq=False)
class Scores:
    """How much each neuron contributed.

    `signed` is `(B, N)`; `values` ranks: |signed|, or, with `rank` "signed", what of it is above 0. `completeness` is
    `(B, sites)` where the method defines it: |Σ c − (Φ(x) − Φ(a ← 0))|. `key` is the selector's name, for messages.
    `real` says which neurons are the samples' own where some tokens are padding (`Network.real`); the others score 0.
    """

    signed: Tensor
    index: NeuronIndex
    completeness: Tensor | None = None
    key: str = "scores"
    rank: str = "absolute"
    real: RealNeurons | None = None

    @property
    def values(self) -> Tensor:
        """What neurons are ordered by, `(B, N)`, never below 0."""
        return self.signed.abs() if self.rank == "absolute" else self.signed.clamp(min=0)

    def require_finite(self) -> Scores:
        """These scores; raises `SampleError` naming the rows that hold NaN or infinite values."""
        bad: list[int] = []
        if not bool(torch.isfinite(self.signed.sum())):  # a sum is finite only where every term is, and is fast
            bad = torch.nonzero(~torch.isfinite(self.signed).all(dim=1)).flatten().tolist()
        if bad:
            raise SampleError(
                f"{self.key}: the scores of sample {', '.join(map(str, bad[:5]))} of the batch are NaN or infinite; "
                "the network overflows on it. Try float32 or float64, or leave the sample out",
                bad,
                [f"the scores of {self.key} are NaN or infinite"] * len(bad),
            )
        return self

    def site(self, site: str | int | Site) -> Tensor:
        """Signed scores of one site, `(B, *shape)`."""
        found = self.index.site(site)
        return self.signed[:, found.slice].reshape(-1, *_block(self.index, found))

    def pathways(self, sparsity: float) -> Pathways:
        """The pathways of one sparsity κ: the k = ⌊(1 − κ)·N⌋ neurons of a sample with the largest |c|.

        With padding N is the number of the sample's own neurons.
        """
        return self.threshold([sparsity])[0]

    def threshold(self, sparsities: Sequence[float]) -> list[Pathways]:
        """Pathways for several sparsities from one partition of the scores.

        Network-wide, per sample; ties at the threshold go to the smaller neuron index; a neuron with c = 0 is never
        kept, so a pathway may be smaller than asked (`density` tells). Raises `SparsityError` outside [0, 1).
        """
        levels = checked_sparsities(sparsities)
        self.require_finite()
        if self.signed.device.type == "cpu" or self.index.granularity == "channel":
            masks = self._threshold_on_host(levels)
        elif self.real is None:
            masks = self._threshold_on_device([self.index.kept(level) for level in levels])
        else:
            masks = self._threshold_singly([self.real.kept(level) for level in levels])
        return [Pathways(mask, self.index, self.real) for mask in masks]

    def _threshold_on_host(self, levels: Sequence[float]) -> Tensor:
        """`(len(levels), B, N)` by exact selection, a small part of the time of a sort."""
        real, by_channel = self.real, self.index.granularity == "channel"
        whole = self.index.weights if by_channel and real is None else None
        kept = [[self.index.kept(level)] * len(self.signed) if real is None else real.kept(level) for level in levels]
        masks = np.empty((len(levels), *self.signed.shape), dtype=np.bool_)
        signed = self.signed.detach().cpu()
        # NumPy has no bfloat16 and is slow with float16; float32 holds both as they are
        values = (signed.float() if signed.element_size() < 4 else signed).numpy()
        absolute = self.rank == "absolute"

        def select(rows: range) -> None:
            sizes = np.empty_like(values[0])  # for all rows: the system is slow to hand out fresh memory
            for row in rows:
                ordered = np.abs(values[row], out=sizes) if absolute else np.maximum(values[row], 0, out=sizes)
                weights = real.weights(row) if by_channel and real is not None else whole
                select_largest(ordered, [counts[row] for counts in kept], weights, out=masks[:, row])

        by_thread(select, len(values))
        return torch.from_numpy(masks).to(self.signed.device)

    def _threshold_singly(self, kept: Sequence[Sequence[int]]) -> Tensor:
        """As `_threshold_on_device`, where every sample has its own k: `kept` has a list of them for each sparsity."""
        singly = [replace(self, signed=row.unsqueeze(0), real=None) for row in self.signed]
        masks = [one._threshold_on_device([counts[row] for counts in kept]) for row, one in enumerate(singly)]
        return torch.cat(masks, dim=1)

    def _threshold_on_device(self, counts: Sequence[int]) -> Tensor:
        values = self.values
        size = values.shape[1]
        masks = torch.empty((len(counts), *values.shape), dtype=torch.bool, device=values.device)
        for mask, count in zip(masks, counts, strict=True):
            if count <= 0:
                mask.zero_()
                continue
            if count >= size:
                torch.gt(values, 0, out=mask)
                continue
            threshold = values.kthvalue(size - count + 1, dim=1, keepdim=True).values
            torch.ge(values, threshold, out=mask)
            mask.logical_and_(values > 0)
            surplus = mask.sum(dim=1) - count
            for row in torch.nonzero(surplus > 0).flatten().tolist():
                tied = torch.nonzero(values[row] == threshold[row]).flatten()
                mask[row, tied[tied.numel() - int(surplus[row]) :]] = False
        return masks


def _block(index: NeuronIndex, site: Site) -> tuple[int, ...]:
    return site.shape if index.granularity == "unit" else (site.neurons,)


@dataclass(frozen=True, eq=False)
class Pathways:
    """One pathway per sample: `mask` is `(B, N)` bool, True where the neuron is kept.

    `real` says which neurons are the samples' own where some tokens are padding (`Network.real`); None: all are.

    >>> index = NeuronIndex.build([("relu", "relu", (4,))])
    >>> a = Pathways(torch.tensor([[True, True, False, False]]), index)
    >>> b = Pathways(torch.tensor([[True, False, True, False]]), index)
    >>> (a & b).count.tolist(), (a | b).density.tolist(), a.jaccard(b).tolist(), a.packed().tolist()
    ([1], [0.75], [0.3333333333333333], [[3]])
    """

    mask: Tensor
    index: NeuronIndex
    real: RealNeurons | None = None

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool or self.mask.ndim != 2 or self.mask.shape[1] != self.index.size:
            raise InputError(
                f"pathways: expected a bool mask (B, {self.index.size}), found {self.mask.dtype} "
                f"{tuple(self.mask.shape)}"
            )
        if self.real is not None and (self.real.batch, self.real.index) != (self.batch, self.index):
            raise InputError(
                f"pathways: expected what is real of {self.batch} samples and the same index, found it of "
                f"{self.real.batch} and {self.real.index!r}; take network.real(x) of these samples"
            )

    @property
    def batch(self) -> int:
        """B, the number of samples."""
        return int(self.mask.shape[0])

    @cached_property
    def count(self) -> Tensor:
        """|e|₀, `(B,)` int64: neurons kept; at channel granularity the scalar units of the kept channels."""
        if self.index.granularity == "channel":
            if self.real is not None:
                return self.real.count(self.mask)
            weights = torch.as_tensor(self.index.weights, device=self.mask.device)
            return (self.mask * weights).sum(dim=1)
        return self.mask.sum(dim=1)

    @property
    def density(self) -> Tensor:
        """Achieved density |e|₀ / N, `(B,)` float64; with padding N is the number of the sample's own neurons."""
        if self.real is not None:
            return self.count.to(torch.float64) / self.real.units.sum(dim=1)
        return self.count.to(torch.float64) / max(self.index.units, 1)

    def site(self, site: str | int | Site) -> Tensor:
        """The mask of one site, `(B, *shape)`: a view, no copy."""
        found = self.index.site(site)
        return self.mask[:, found.slice].reshape(-1, *_block(self.index, found))

    def gates(self) -> list[Tensor]:
        """λ = e for every site, `(B, *gate_shape)`: views, no copies."""
        return [self.mask[:, site.slice].view(-1, *site.gate_shape) for site in self.index.sites]

    def take(self, rows: Sequence[int]) -> Pathways:
        """The pathways of some samples."""
        mask = self.mask[torch.as_tensor(rows, device=self.mask.device, dtype=torch.long)]
        return Pathways(mask, self.index, None if self.real is None else self.real.take(rows))

    def within(self, real: RealNeurons | None) -> Pathways:
        """These pathways without what is not real, where that has not been looked at."""
        if real is None or self.real is not None:
            return self
        return Pathways(self.mask & real.mask, self.index, real)

    def packed(self) -> Tensor:
        """Bits, `(B, nbytes)` uint8 on the mask's device: little-endian, each site from a byte on."""
        return pack_bits(self.mask, self.index)

    @classmethod
    def from_packed(
        cls, packed: Tensor | np.ndarray[tuple[int, int], np.dtype[np.uint8]], index: NeuronIndex
    ) -> Pathways:
        """Pathways from packed rows `(B, nbytes)`, as stores keep them."""
        rows = packed.cpu().numpy() if isinstance(packed, Tensor) else packed
        mask = torch.from_numpy(index.unpack(np.ascontiguousarray(rows)))
        return cls(mask.to(packed.device) if isinstance(packed, Tensor) else mask, index)

    def _with(self, other: Pathways) -> Tensor:
        if not isinstance(other, Pathways):
            raise RestrictionError(f"pathways: expected Pathways to compare with, found {type(other).__name__}")
        if self.index != other.index:
            raise RestrictionError(f"pathways: expected two of one index, found {self.index!r} and {other.index!r}")
        if 1 != self.batch != other.batch != 1:
            raise RestrictionError(f"pathways: expected equal batches, found {self.batch} and {other.batch}")
        return other.mask

    def _joined(self, mask: Tensor, other: Pathways) -> Pathways:
        own = (each.real for each in (self, other) if each.batch == len(mask) and each.real is not None)
        return Pathways(mask, self.index, next(own, None))

    def __and__(self, other: Pathways) -> Pathways:
        return self._joined(self.mask & self._with(other), other)

    def __or__(self, other: Pathways) -> Pathways:
        return self._joined(self.mask | self._with(other), other)

    def __invert__(self) -> Pathways:
        return Pathways(~self.mask if self.real is None else ~self.mask & self.real.mask, self.index, self.real)

    def __sub__(self, other: Pathways) -> Pathways:
        return self._joined(self.mask & ~self._with(other), other)

    def jaccard(self, other: Pathways) -> Tensor:
        """|A∧B| / |A∨B| per sample, `(B,)` float64; NaN where both are empty."""
        both, either = (self & other).count, (self | other).count
        return both.to(torch.float64) / either.to(torch.float64)


def by_thread(work: Callable[[range], None], count: int) -> None:
    """Call `work` with the numbers 0 … count − 1, dealt to as many threads as torch has; NumPy lets them run."""
    threads = min(torch.get_num_threads(), count)
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        list(pool.map(work, [range(first, count, threads) for first in range(threads)]))


def pack_bits(mask: Tensor, index: NeuronIndex) -> Tensor:
    """Boolean rows `(B, N)` → packed rows `(B, nbytes)` uint8, on the device of the mask."""
    if mask.device.type == "cpu":
        return torch.from_numpy(index.pack(mask.detach().numpy()))
    if any(site.neurons % 8 for site in index.sites):
        padded = torch.zeros((mask.shape[0], index.nbytes * 8), dtype=torch.bool, device=mask.device)
        for site in index.sites:
            padded[:, site.byte * 8 : site.byte * 8 + site.neurons] = mask[:, site.slice]
        mask = padded
    return gather_bits(mask)


def gather_bits(mask: Tensor) -> Tensor:
    """`(B, 8·n)` bool → `(B, n)` uint8, little-endian, with integer arithmetic that every device has."""
    words = mask.contiguous()
    words = (words if words.storage_offset() % 8 == 0 else words.clone()).view(torch.int64)
    return ((words * _SPREAD) >> 56).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class Selection:
    """What a selector found: pathways by sparsity (None for a selector that has just one), and diagnostics.

    `selection[0.9]` is a `Pathways`; a sparsity that was not asked for, or not reached by every sample, raises a
    `SparsityError` (a `KeyError`) that says why. `missing` has, for a sparsity that was not reached by all, one reason
    for all samples or one a sample, "" where it was reached; `pathways` then holds the others' pathways, with empty
    rows where there is none. `diagnostics` are arrays with a row per sample, `by_sparsity` those that differ between
    sparsities. `scores` are kept where there are any.
    """

    pathways: dict[float | None, Pathways]
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    missing: dict[float | None, str | Sequence[str]] = field(default_factory=dict)
    scores: Scores | None = None
    by_sparsity: dict[float | None, dict[str, Tensor]] = field(default_factory=dict)

    def __getitem__(self, sparsity: float | None) -> Pathways:
        reasons = self.missing.get(sparsity, "")
        rows = [row for row, reason in enumerate(reasons) if reason] if not isinstance(reasons, str) else []
        if isinstance(reasons, str) and reasons:
            raise SparsityError(f"selection: sparsity {sparsity} was not reached: {reasons}")
        if rows:
            shown = ", ".join(map(str, rows[:5])) + (" …" if len(rows) > 5 else "")
            others = ""
            if len(rows) < len(reasons):
                others = f"; selection.pathways[{sparsity}] has the other samples, and empty rows for these"
            raise SparsityError(
                f"selection: sparsity {sparsity} was not reached by sample {shown} of the batch: "
                f"{reasons[rows[0]]}{others}"
            )
        if sparsity in self.pathways:
            return self.pathways[sparsity]
        has = ", ".join("the one pathway: [None]" if s is None else str(s) for s in self.pathways)
        raise SparsityError(f"selection: sparsity {sparsity} was not asked for; there is {has or 'none'}")

    def reasons(self, sparsity: float | None, batch: int) -> list[str]:
        """Why each of `batch` samples has no pathway of this sparsity, "" where it has one."""
        found = self.missing.get(sparsity, "")
        return [found] * batch if isinstance(found, str) else list(found)

    def __iter__(self) -> Iterator[float | None]:
        return iter(self.pathways)

    def __len__(self) -> int:
        return len(self.pathways)
