"""Exact marginal contributions by ablation, the ground truth that first-order and integrated scores approximate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from .errors import InputError
from .neurons import Site
from .samples import Samples, type_of_target
from .selectors.baselines import generator_of
from .stacking import SiteRuns

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

    Raises `InputError` for numbers outside the index and `SiteError` for a site that is not there.
    """
    samples = network.samples(x, target).require_finite()
    if not isinstance(max_batch, int) or isinstance(max_batch, bool) or max_batch < 1:
        raise InputError(f"ablation: expected max_batch of at least 1, found {max_batch!r}")
    numbers = _numbers(network, neurons, samples.batch)
    pieces = [list(range(samples.batch))[first : first + max_batch] for first in range(0, samples.batch, max_batch)]
    with tqdm(total=numbers.size, desc="ablation", unit="neuron", delay=2, leave=False, disable=not progress) as bar:
        found = [_of_some(network, samples.take(rows), numbers[rows], max_batch, bar) for rows in pieces]
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
    with torch.no_grad():
        target = network._resolve(network(samples), samples)
    found: Tensor | None = None
    starts = np.array([site.start for site in network.sites])
    homes = np.searchsorted(starts, numbers, side="right") - 1
    for number, site in enumerate(network.sites):
        columns = [np.flatnonzero(row == number) for row in homes]
        most = max(map(len, columns))
        if not most:
            continue
        runs = SiteRuns(network, number, samples, target, max_batch // samples.batch)
        if found is None:
            found = runs.activation.new_zeros(numbers.shape)
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
    return torch.zeros(numbers.shape, device=network.device) if found is None else found


def _ablated(runs: SiteRuns, site: Site, local: npt.NDArray[np.int64]) -> Tensor:
    """Φ(x) − Φ(x; a_j ← 0), `(B, n)`, of a site's own numbers; −1 leaves the sample as it is.

    Φ(x) comes from a copy in the same stack, so that the two differ by the neuron alone.
    """
    batch, most = local.shape
    room = max(runs.copies - 1, 1)
    found = []
    for first in range(0, most, room):
        some = local[:, first : first + room]
        if runs.copies == 1:
            some = np.concatenate([np.full((batch, 1), -1), some], axis=1)
            values = torch.cat([runs.responses(_without(runs.activation, site, column)) for column in some.T])
        else:
            columns = [np.full(batch, -1), *some.T]
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
            place: Any = tuple(int(c) for c in np.unravel_index(neuron, site.shape))
        else:
            place = (*[slice(None)] * site.axis, neuron)
        blocks[(row, *(place if isinstance(place, tuple) else (place,)))] = 0
    return values


def sample_active(network: Network, active: Tensor, names: Sequence[int | str], per_site: int, seed: int) -> Tensor:
    """Numbers of active neurons `(B, sites · per_site)`, as many from every site, drawn by (seed, sample id).

    Where a site has fewer, some of its neurons are drawn twice; a site without any gives its first.
    """
    chosen = np.empty((active.shape[0], len(network.index), per_site), dtype=np.int64)
    rows = active.cpu().numpy()
    for row, name in enumerate(names):
        generator = generator_of(seed, f"ablation\0{name}")
        for number, site in enumerate(network.sites):
            alive = np.flatnonzero(rows[row, site.slice])
            pool = alive if alive.size else np.zeros(1, dtype=np.int64)
            chosen[row, number] = site.start + generator.choice(pool, per_site, replace=pool.size < per_site)
    return torch.from_numpy(chosen.reshape(len(chosen), -1)).to(active.device)
