"""Exact marginal contributions by ablation, the ground truth that first-order and integrated scores approximate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from .errors import InputError, SampleError
from .neurons import NeuronIndex, Site
from .outcomes import require_finite_response
from .pathways import Scores
from .ranks import rank_correlation
from .responses import respond
from .samples import Samples, type_of_target
from .selectors.baselines import generator_of
from .stacking import SiteRuns, resolved

if TYPE_CHECKING:
    from .network import Network

PER_SITE = 16  # neurons of every site and sample that a diagnosis ablates
_MAX_BATCH = 16


def marginal_contributions(
    network: Network,
    x: Any,
    neurons: Tensor | npt.NDArray[np.integer[Any]] | Sequence[int] | str | Site,
    target: type_of_target = None,
    *,
    max_batch: int = _MAX_BATCH,
    progress: bool = True,
) -> Tensor:
    """Φ(x) − Φ(x; a_j ← 0) of single neurons j, each by a run of what follows its site (the paper's §3.2).

    `neurons` are flat numbers of the index, `(n,)` for all samples or `(B, n)`, or a site, then all of its neurons. At
    channel granularity a neuron is a channel, all of whose units become 0. Returns `(B, n)`, signed, in units of the
    response. At most `max_batch` rows run at once.

    Raises `InputError` for numbers outside the index, `SiteError` for a site that is not there and `SampleError` for
    samples whose response is NaN or infinite.
    """
    samples = network.samples(x, target).require_finite()
    if not isinstance(max_batch, int) or isinstance(max_batch, bool) or max_batch < 1:
        raise InputError(f"ablation: expected max_batch of at least 1, found {max_batch!r}")
    numbers = _numbers(network, neurons, samples.batch)
    pieces = [list(range(samples.batch))[first : first + max_batch] for first in range(0, samples.batch, max_batch)]
    with tqdm(total=numbers.size, desc="ablation", unit="neuron", delay=2, leave=False, disable=not progress) as bar:
        found = []
        for rows in pieces:
            try:
                found.append(_of_some(network, samples.take(rows), numbers[rows], max_batch, bar))
            except SampleError as error:
                places = [rows[place] for place in error.positions]
                raise SampleError(str(error), places, error.reasons) from error
    return torch.cat(found)


def _numbers(network: Network, neurons: Any, batch: int) -> npt.NDArray[np.int64]:
    """Flat neuron numbers `(B, n)`."""
    if isinstance(neurons, str | Site):
        found = network.index.site(neurons)
        numbers = np.arange(found.start, found.start + found.neurons)
    else:
        given = neurons.cpu().numpy() if isinstance(neurons, Tensor) else np.asarray(neurons)
        if given.ndim not in (1, 2) or (given.ndim == 2 and given.shape[0] not in (1, batch)):
            raise InputError(f"ablation: expected neurons (n,) or ({batch}, n), found {given.shape}")
        if given.size and not np.issubdtype(given.dtype, np.integer):
            raise InputError(f"ablation: expected whole numbers of neurons, found {given.dtype}")
        numbers = given.astype(np.int64)
        outside = numbers[(numbers < 0) | (numbers >= network.index.size)]
        if outside.size:
            raise InputError(f"ablation: expected neurons 0 … {network.index.size - 1}, found {outside[0]}")
    return np.ascontiguousarray(np.broadcast_to(numbers, (batch, numbers.shape[-1])))


def _of_some(network: Network, samples: Samples, numbers: npt.NDArray[np.int64], max_batch: int, bar: Any) -> Tensor:
    output, target, classes = resolved(network, samples)
    response = respond(network.response, output, target, samples.batch).detach()
    require_finite_response(response, samples)
    found = response.new_zeros(numbers.shape)
    starts = np.array([site.start for site in network.sites])
    homes = np.searchsorted(starts, numbers, side="right") - 1
    for number, site in enumerate(network.sites):
        columns = [np.flatnonzero(row == number) for row in homes]
        most = max(map(len, columns))
        if not most:
            continue
        runs = SiteRuns(network, number, samples, target, max_batch // samples.batch, classes)
        if not runs.leads:
            bar.update(sum(map(len, columns)))
            continue
        local = np.full((samples.batch, most), -1)
        for row, own in enumerate(columns):
            local[row, : len(own)] = numbers[row, own] - site.start
        answers = _ablated(runs, site, local)
        for row, own in enumerate(columns):
            found[row, torch.from_numpy(own).to(found.device)] = answers[row, : len(own)]
            bar.update(len(own))
    return found


def _ablated(runs: SiteRuns, site: Site, local: npt.NDArray[np.int64]) -> Tensor:
    """Φ(x) − Φ(x; a_j ← 0), `(B, n)`, of a site's own numbers; −1 leaves the sample as it is.

    Φ(x) comes from a copy that is run alike, in the same stack where there are stacks, so that the two differ by the
    neuron alone.
    """
    batch, most = local.shape
    alone = runs.copies <= 2  # a stack of two would answer Φ(x) again for every neuron
    room = most if alone else runs.copies - 1
    found = []
    for first in range(0, most, room):
        columns = [np.full(batch, -1), *local[:, first : first + room].T]
        if alone:
            values = torch.cat([runs.responses(_without(runs.activation, site, column)) for column in columns])
        else:
            values = runs.responses(torch.cat([_without(runs.activation, site, column) for column in columns]))
        found.append(values[:1] - values[1:])
    return torch.cat(found).T


def _without(activation: Tensor, site: Site, column: npt.NDArray[np.int64]) -> Tensor:
    """A copy of the site's value in which each sample lacks one neuron."""
    values = activation.clone()
    blocks = values.view(-1, *site.shape) if site.fold > 1 else values
    for row, neuron in enumerate(column.tolist()):
        if neuron < 0:
            continue
        if site.neurons == site.units:
            place: tuple[Any, ...] = tuple(int(c) for c in np.unravel_index(neuron, site.shape))
        else:
            place = (*[slice(None)] * site.axis, neuron)
        blocks[(row, *place)] = 0
    return values


def sample_active(network: Network, active: Tensor, names: Sequence[int | str], per_site: int, seed: int) -> Tensor:
    """Numbers of active neurons `(B, sites · per_site)`, as many from every site, drawn by (seed, sample id).

    Where a site has fewer, all of them are there, some twice or more; a site without any gives its first.
    """
    chosen = np.empty((active.shape[0], len(network.index), per_site), dtype=np.int64)
    rows = active.cpu().numpy()
    for row, name in enumerate(names):
        generator = generator_of(seed, f"ablation\0{name}")
        for number, site in enumerate(network.sites):
            alive = np.flatnonzero(rows[row, site.slice])
            pool = alive if alive.size else np.zeros(1, dtype=np.int64)
            drawn = generator.choice(pool, min(per_site, pool.size), replace=False)
            chosen[row, number] = site.start + np.resize(drawn, per_site)
    return torch.from_numpy(chosen.reshape(len(chosen), -1)).to(active.device)


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Some active neurons of every sample and what each contributes exactly, for scores to be held against.

    For each sample `numbers` `(n,)` int64, distinct and ascending, and `contributions` `(n,)` float64,
    |Φ(x) − Φ(x; a_j ← 0)|, both on the host.
    """

    index: NeuronIndex
    numbers: tuple[Tensor, ...]
    contributions: tuple[Tensor, ...]

    @classmethod
    def sampled(
        cls, network: Network, samples: Samples, active: Tensor, per_site: int, *, seed: int = 0, max_batch: int = 16
    ) -> Diagnosis:
        """Ablate at most `per_site` active neurons of every site, drawn by (seed, sample id) as `sample_active` does.

        `active` `(B, N)` bool says which are; a neuron that is drawn twice counts once, and a site without any has
        none. Each sample is run on its own, at most `max_batch` rows at once, so that neighbours change no bit.
        """
        most = max((site.neurons for site in network.sites), default=0)
        drawn = sample_active(network, active, samples.names, min(per_site, most), seed).cpu().numpy()
        alive = np.take_along_axis(active.cpu().numpy(), drawn, axis=1)
        numbers, contributions = [], []
        for row in range(samples.batch):
            own = np.unique(drawn[row, alive[row]])
            found = marginal_contributions(network, samples.take([row]), own, max_batch=max_batch, progress=False)
            numbers.append(torch.from_numpy(own))
            contributions.append(found[0].abs().cpu().double())
        return cls(network.index, tuple(numbers), tuple(contributions))

    def correlations(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Spearman's correlation of |score| with the contributions: `(B,)` network-wide and `(B, sites)`, float64.

        NaN where either is constant or has NaN, or fewer than two neurons were ablated. Contributions that differ by
        less than the rounding of Φ are ordered by chance; a model in float64 leaves few of them.
        """
        bounds = torch.tensor([*(site.start for site in self.index.sites), self.index.size])
        found = torch.full((len(self.numbers), len(bounds)), torch.nan, dtype=torch.float64)
        by_length: dict[int, list[tuple[int, int, Tensor, Tensor]]] = {}
        for row, (numbers, exact) in enumerate(zip(self.numbers, self.contributions, strict=True)):
            own = scores.signed[row, numbers.to(scores.signed.device)].abs().cpu().double()
            ends = torch.searchsorted(numbers, bounds).tolist()
            for column, part in enumerate((slice(None), *map(slice, ends[:-1], ends[1:]))):
                by_length.setdefault(exact[part].numel(), []).append((row, column, own[part], exact[part]))
        for alike in by_length.values():
            rows, columns, ours, theirs = zip(*alike, strict=True)
            found[list(rows), list(columns)] = rank_correlation(torch.stack(ours), torch.stack(theirs))
        return found[:, 0], found[:, 1:]
