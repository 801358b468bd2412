"""Local linearity of the frozen network: the radius ε̂ within which Φ̂ is linear, exact or estimated, and along rays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

from .errors import InputError, RestrictionError
from .gates import Restriction
from .memory import kept_memory
from .network import Network
from .pathways import Pathways
from .piecewise import Bends, Hinge, bends, require_affine
from .probing import Probe, Terms, held
from .samples import Samples
from .selectors.baselines import generator_of

_EXACT = 20_000  # terms of a sample up to which each gets its own gradient, unless asked otherwise
_AT_ONCE = 2**25  # numbers of all sites in one run of several samples, or copies of one
_COPIES = 256
_AT_A_TIME = 8  # directions of one sample


@dataclass(frozen=True, eq=False)
class Radius:
    """ε̂ of each sample: Φ̂(x + δ; e) = Φ(x) + g·δ for ‖δ‖₂ ≤ ε̂ (the paper's Eq. 7, with the terms that it lacks).

    `value` `(B,)` in units of the input, inf where nothing bends. `exact`: every hyperplane's distance was computed;
    else `value` is an *estimate*, and never below ε̂. `tied` `(B,)`: on-path windows of max-pools without a strict
    winner; where there is one, ε̂ = 0. `nearest`: the node at which the network bends first, None for inf. `towards`,
    like x: the unit vector to that hyperplane, 0 where there is none.
    """

    value: Tensor
    exact: bool
    tied: Tensor
    nearest: tuple[str | None, ...]
    towards: Any


def uncovered(network: Network) -> tuple[str, ...]:
    """The nodes, and the response, for which local linearity is not claimed; () where Propositions 4 and 5 apply.

    They are for networks whose only nonlinearities are piecewise-linear activations and max-pools: squeeze-excitation,
    softmax, attention, LayerNorm and smooth activations are named here, and operations that fxpath does not know.
    """
    return bends(network).uncovered


def linear_radius(
    network: Network,
    x: Any,
    pathways: Pathways,
    *,
    exact: bool | None = None,
    directions: int = 48,
    candidates: int = 64,
    seed: int = 0,
    affine: Sequence[str] = (),
    progress: bool = False,
) -> Radius:
    """ε̂ of every sample: the distance from x to the nearest hyperplane at which Φ̂ bends (§4, Propositions 4 and 5).

    That is the least, over every kept unit and each value at which its activation bends, of |z − value| / ‖∇ₓz‖₂, and,
    over every window of every max-pool, its winner w and every other candidate i, of (y_w − y_i) / ‖∇ₓ(y_w − y_i)‖₂;
    all gradients are of Φ̂, and terms without one are left out.

    `exact` takes a gradient for each term; False estimates all ‖∇ₓ·‖ at once by so many Gaussian `directions`, each one
    Jacobian–vector product, drawn for (`seed`, sample id), and takes exact gradients of the so many `candidates` that
    then are nearest: the result is never below ε̂. None: exact up to 20 000 terms a sample.

    Raises `LinearityError` for a network that is not covered (see `uncovered`) and for operations without forward-mode
    differentiation, `RestrictionError` for pathways that do not fit. `affine` names nodes that you know to be affine.
    """
    _checked("directions", directions)
    _checked("candidates", candidates)
    probe, samples = _prepared("linear_radius", network, x, pathways, affine)
    singly = _singly(network, samples, pathways)
    with kept_memory() if samples.device.type == "cpu" else nullcontext():
        found = [
            _of_sample(probe, one, restriction, exact, (directions, candidates, seed))
            for one, restriction in tqdm(singly, total=samples.batch, desc="ε̂", unit="sample", disable=not progress)
        ]
    return Radius(
        torch.stack([each.value for each in found]),
        all(each.exact for each in found),
        torch.stack([each.tied for each in found]),
        tuple(each.nearest[0] for each in found),
        pytree.tree_map(
            lambda first, *more: torch.cat([first, *more]) if isinstance(first, Tensor) else None,
            *(each.towards for each in found),
        ),
    )


def ray_radius(
    network: Network,
    x: Any,
    pathways: Pathways,
    directions: Any = 16,
    *,
    seed: int = 0,
    affine: Sequence[str] = (),
    progress: bool = False,
) -> Tensor:
    """How far Φ̂ is linear from x along rays: the exact ‖δ‖₂ at which it bends first, inf where it never does.

    `directions` is like x, one for each sample, of any length: then the result is `(B,)`. A number K of them draws K
    Gaussian ones for (`seed`, sample id), and the result is `(K, B)`. Each takes one Jacobian–vector product, for a
    network of any size. No radius is below ε̂; it is 0 where a max-pool's tie breaks. Raises as `linear_radius` does.
    """
    probe, samples = _prepared("ray_radius", network, x, pathways, affine)
    many = isinstance(directions, int) and not isinstance(directions, bool)
    rays = random_directions(samples, directions, seed) if many else iter([_like(samples, directions)])
    found: list[Tensor] = []
    with tqdm(total=directions if many else 1, desc="rays", unit="ray", disable=not progress) as bar:
        while some := list(islice(rays, _AT_A_TIME)):
            parts = [_first(probe, *each) for each in _in_batches(network, samples, pathways, some)]
            found += torch.cat(parts, dim=1)
            bar.update(len(some))
    return torch.stack(found) if many else found[0]


def tied_windows(network: Network, x: Any, pathways: Pathways, *, seed: int = 0, affine: Sequence[str] = ()) -> Tensor:
    """On-path max-pool windows without a strict winner, `(B,)`: where there is one, ε̂ = 0 (flat regions of a photo).

    On-path are those of which the tied candidates part in some direction; one Jacobian–vector product. Raises as
    `linear_radius` does.
    """
    probe, samples = _prepared("tied_windows", network, x, pathways, affine)
    rays = list(random_directions(samples, 1, seed))
    found = []
    for some, restriction, along in _in_batches(network, samples, pathways, rays):
        values, slopes = probe.slopes(some, restriction, along)
        found.append(_ties(probe, values, slopes[0]))
    return torch.cat(found)


def random_directions(samples: Samples, count: int, seed: int = 0) -> Iterator[Samples]:
    """`count` directions of length 1 for each sample, one after the other, drawn for (seed, sample id)."""
    streams = [generator_of(seed, name) for name in samples.names]

    def drawn(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return torch.zeros_like(leaf)
        rows = [stream.standard_normal(tuple(leaf.shape[1:])) for stream in streams]
        return torch.from_numpy(np.stack(rows)).to(leaf)

    for _ in range(_checked("directions", count)):
        yield _unit(samples.map(drawn))


# --- what all of them share ---


def _prepared(said: str, network: Network, x: Any, pathways: Pathways, affine: Sequence[str]) -> tuple[Probe, Samples]:
    """The probe of a network that is covered, and checked samples."""
    if network._restriction is not None:
        raise RestrictionError(f"{said}: the network is restricted already; leave the with block first")
    network._gates_of(pathways)
    samples = network.samples(x).require_finite()
    if 1 != pathways.batch != samples.batch:
        raise RestrictionError(
            f"{said}: there are {pathways.batch} pathways for {samples.batch} samples; give one each"
        )
    if not any(leaf.is_floating_point() for leaf in samples.tensors):
        raise InputError(f"{said}: expected floating-point inputs, found whole numbers alone, which have no neighbours")
    key = ("probe", tuple(affine), network._altered)
    probe = network._probes.get(key)
    if probe is None:
        found: Bends = bends(network, affine)
        found.require_covered(said)
        probe = network._probes[key] = Probe(network, found)
    with torch.no_grad():
        output = network._run(samples, None)
        require_affine(network, output, network._resolve(output, samples), samples.batch)
    return probe, samples


def _checked(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}: expected a whole number of at least 1, found {value!r}")
    return value


def _rows(pathways: Pathways, rows: Sequence[int]) -> Pathways:
    return pathways if pathways.batch == 1 else pathways.take(rows)


def _singly(network: Network, samples: Samples, pathways: Pathways) -> Iterator[tuple[Samples, Restriction]]:
    for row in range(samples.batch):
        yield samples.take([row]), held(network, _rows(pathways, [row]))


def _in_batches(
    network: Network, samples: Samples, pathways: Pathways, along: Sequence[Samples]
) -> Iterator[tuple[Samples, Restriction, list[Samples]]]:
    """As many samples at a time as fit, with their directions."""
    size = max(1, _AT_ONCE // max(network.index.units * len(along), 1))
    for start in range(0, samples.batch, size):
        rows = range(start, min(start + size, samples.batch))
        yield samples.take(rows), held(network, _rows(pathways, rows)), [each.take(rows) for each in along]


def _like(samples: Samples, direction: Any) -> Samples:
    """A direction for each sample, of length 1; raises `InputError` where it is not like the input."""
    given = Samples.of(direction)
    found, expected = [[tuple(t.shape) for t in each.tensors] for each in (given, samples)]
    if found != expected:
        raise InputError(f"directions: expected a number, or a tensor like x for each input, {expected}, found {found}")
    steps = iter(given.require_finite().tensors)
    return _unit(samples.map(lambda leaf: next(steps).detach().to(leaf)))


def _unit(along: Samples) -> Samples:
    """Each sample's direction divided by its ‖·‖₂."""
    floats = [leaf.reshape(along.batch, -1) for leaf in along.tensors if leaf.is_floating_point()]
    length = torch.cat(floats, dim=1).norm(dim=1)
    if bool((length == 0).any()):
        row = int(torch.nonzero(length == 0)[0, 0])
        raise InputError(f"directions: expected a length above 0, found 0 for sample {along.names[row]!r}")
    return along.map(
        lambda leaf: leaf / length.view(-1, *[1] * (leaf.ndim - 1)).to(leaf) if leaf.is_floating_point() else leaf
    )


def _terms(probe: Probe, values: Sequence[Tensor], restriction: Restriction) -> Iterator[tuple[int, Terms]]:
    """All terms of all parts, by the number of the part."""
    for place, part in enumerate(probe.parts):
        kept = None
        if isinstance(part, Hinge) and part.site is not None:
            site, gates = probe.index.sites[part.site], restriction.scale[part.site]
            assert gates is not None
            kept = gates.expand(len(gates), *site.shape).reshape(len(gates), -1)
        for terms in probe.terms(place, values[place], kept):
            yield place, terms


def _first(probe: Probe, samples: Samples, restriction: Restriction, along: Sequence[Samples]) -> Tensor:
    """The least distance over slope of all terms that come closer, `(directions, B)`."""
    values, slopes = probe.slopes(samples, restriction, along)
    least = values[0].new_full((len(along), samples.batch), math.inf)
    for place, terms in _terms(probe, values, restriction):
        for number, own in enumerate(slopes):
            closing = terms.closing(own[place])
            far = torch.where(closing > 0, terms.distance / closing, math.inf)
            least[number] = torch.minimum(least[number], far.amin(dim=1))
    return least


def _ties(probe: Probe, values: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    """Windows with a candidate as large as the winner that parts from it, `(B,)`."""
    count = torch.zeros(len(values[0]), dtype=torch.int64, device=values[0].device)
    for place, part in enumerate(probe.parts):
        if not isinstance(part, Hinge):
            (terms,) = probe.terms(place, values[place], None)
            tied = (terms.distance == 0) & (terms.closing(slopes[place]) != 0)
            count += tied.view(len(tied), -1, probe.width(place)).any(dim=2).sum(dim=1)
    return count


# --- one sample ---


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Some terms of one part: which they are, and how far off."""

    place: int
    distance: Tensor
    first: Tensor
    second: Tensor | None
    away: Tensor | None  # 1 where the value at `first` must fall to reach the bend; None where it must rise


def _of_sample(
    probe: Probe, sample: Samples, restriction: Restriction, exact: bool | None, drawn: tuple[int, int, int]
) -> Radius:
    values, slopes = probe.slopes(sample, restriction, list(random_directions(sample, 1, drawn[2])))
    tied = _ties(probe, values, slopes[0])[0]
    every = list(_terms(probe, values, restriction))
    if exact is None:
        exact = sum(int(terms.distance.isfinite().sum()) for _, terms in every) <= _EXACT
    if exact:
        chosen = [_some(place, terms, torch.nonzero(terms.distance[0].isfinite())[:, 0]) for place, terms in every]
    else:
        chosen = _nearest(probe, sample, restriction, every, drawn)
    least, where, towards = _least(probe, sample, restriction, chosen)
    return Radius(least, exact, tied, (None if where is None else probe.names[where],), towards)


def _some(place: int, terms: Terms, wanted: Tensor) -> _Chosen:
    first, second = terms.places(0, wanted)
    away = None if terms.side is None else terms.side[0][wanted]
    return _Chosen(place, terms.distance[0][wanted], first, second, away)


def _nearest(
    probe: Probe,
    sample: Samples,
    restriction: Restriction,
    every: Sequence[tuple[int, Terms]],
    drawn: tuple[int, int, int],
) -> list[_Chosen]:
    """The terms that are nearest by estimated norms: ‖∇z‖² is the mean of (∇z·v)² over Gaussian v."""
    directions, candidates, seed = drawn
    squares = [torch.zeros_like(terms.distance[0]) for _, terms in every]
    rays = random_directions(sample, directions, seed)
    at_once = max(1, min(_AT_A_TIME, _AT_ONCE // max(probe.index.units, 1)))
    while some := list(islice(rays, at_once)):
        for slopes in probe.slopes(sample, restriction, some)[1]:
            for square, (place, terms) in zip(squares, every, strict=True):
                terms.add_squares(slopes[place], square)
    size = math.sqrt(sum(leaf[0].numel() for leaf in sample.tensors if leaf.is_floating_point()))
    shares = [
        torch.where(square > 0, terms.distance[0] / (square / directions).sqrt(), math.inf) / size
        for square, (_, terms) in zip(squares, every, strict=True)
    ]
    ends = torch.tensor([len(share) for share in shares]).cumsum(0).tolist()
    best = [share.topk(min(candidates, len(share)), largest=False) for share in shares]
    joined = torch.cat([each.values for each in best])
    places = torch.cat([each.indices + end - len(share) for each, end, share in zip(best, ends, shares, strict=True)])
    order = joined.topk(min(candidates, len(joined)), largest=False)
    wanted = places[order.indices][order.values.isfinite()]
    chosen = []
    for (place, terms), end, share in zip(every, ends, shares, strict=True):
        own = wanted[(wanted >= end - len(share)) & (wanted < end)] - (end - len(share))
        if len(own):
            chosen.append(_some(place, terms, own))
    return chosen


def _least(
    probe: Probe, sample: Samples, restriction: Restriction, chosen: Sequence[_Chosen]
) -> tuple[Tensor, int | None, Any]:
    """The least distance over ‖gradient‖ of the chosen terms, its part, and the unit vector to that hyperplane."""
    floats = [leaf for leaf in sample.tensors if leaf.is_floating_point()]
    least, where = floats[0].new_full((), math.inf), None
    towards = torch.zeros(sum(leaf.numel() for leaf in floats), dtype=floats[0].dtype, device=floats[0].device)
    terms = sum(len(each.distance) for each in chosen)
    copies = max(1, min(_COPIES, terms, _AT_ONCE // max(probe.index.units, 1)))
    wanted = [(each.place, each.first, each.second) for each in chosen if len(each.distance)]
    chosen = [each for each in chosen if len(each.distance)]
    for number, some, slopes in probe.gradients(sample.take([0] * copies), restriction, wanted):
        each, norms = chosen[number], slopes.norm(dim=1)
        far = torch.where(norms > 0, each.distance[some] / norms, math.inf)
        best = int(far.argmin())
        if bool(far[best] < least):
            falls = each.away is not None and bool(each.away[some][best] > 0)
            least, where, towards = far[best], each.place, slopes[best] / (-norms[best] if falls else norms[best])
    return least, where, _split(sample, towards)


def _split(sample: Samples, flat: Tensor) -> Any:
    """One row of all floating-point inputs' numbers, like the inputs; None in place of whole numbers."""
    sizes = [leaf.numel() if leaf.is_floating_point() else 0 for leaf in sample.tensors]
    parts = iter(flat.split(sizes))  # type: ignore[no-untyped-call]
    return pytree.tree_map(lambda leaf: _part(leaf, next(parts)) if isinstance(leaf, Tensor) else None, sample.inputs)


def _part(leaf: Tensor, part: Tensor) -> Tensor | None:
    return part.view(leaf.shape) if leaf.is_floating_point() else None
