"""Feature visualisation: which picture a channel of a site answers to most, and which channel a pathway stands on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .branches import keeping_branches
from .climbing import Climb, Decoded, Decoding
from .errors import InputError, RestrictionError
from .gates import Gates
from .hidden import Neuron, neuron
from .inputspace import InputSpace
from .network import Network
from .neurons import Site
from .pathways import Pathways, Scores
from .rewriting import prefix
from .samples import Samples, type_of_target
from .surroundings import plain_attention


@dataclass(frozen=True)
class TopNeuron:
    """The neuron of a pathway that scores most at a site: its number in the index, its place there, its channel."""

    site: str
    neuron: int
    coordinates: tuple[int, ...]
    channel: int
    score: float


def top_neurons(
    network: Network,
    x: Any,
    pathways: Pathways,
    site: str | int | Site,
    *,
    scores: Scores | None = None,
    target: type_of_target = None,
) -> list[TopNeuron | None]:
    """For each sample the neuron of its pathway with the largest score at `site`; None where none scores above 0.

    `scores` are those that the pathway was cut from: |c| of contribution selectors, λ of DGR. Without them it is
    s = |a · ∂Φ/∂a| in the network that is masked to the pathway, as for greedy pruning, which keeps none. Equal ones:
    the first in the index. Raises `SiteError` for a site that is not there, `RestrictionError` for what is of another
    index or batch.
    """
    if network._restriction is not None:
        raise RestrictionError("top neurons: the network is restricted already; leave the with block first")
    samples, found = network.samples(x, target), network.index.site(site)
    network._gates_of(pathways)
    if pathways.batch != samples.batch:
        raise RestrictionError(
            f"top neurons: there are {pathways.batch} pathways for {samples.batch} samples; give one each"
        )
    if scores is None:
        with network.masked(pathways):
            values = network.signed_products(samples)[0].abs()
    elif scores.index != network.index or len(scores.signed) != samples.batch:
        raise RestrictionError(
            f"top neurons: the scores are of {len(scores.signed)} samples and {scores.index!r}; there are "
            f"{samples.batch} and {network.index!r}"
        )
    else:
        values = scores.values
    kept = values[:, found.slice] * pathways.mask[:, found.slice]
    largest, places = kept.max(dim=1)
    return [
        _top(network, found, place, value) if value > 0 else None
        for value, place in zip(largest.tolist(), places.tolist(), strict=True)
    ]


def _top(network: Network, site: Site, place: int, score: float) -> TopNeuron:
    if network.index.granularity == "channel":
        return TopNeuron(site.name, site.start + place, (place,), place, score)
    coordinates = tuple(int(c) for c in np.unravel_index(place, site.shape))
    return TopNeuron(site.name, site.start + place, coordinates, coordinates[site.axis] if coordinates else 0, score)


def visualise(
    network: Network,
    x: Any,
    site: str | int | Site,
    channels: Sequence[int] | Mapping[str, int],
    *,
    decoding: Decoding | None = None,
    space: InputSpace | None = None,
    max_batch: int | None = None,
) -> Decoded:
    """Pictures that maximise the mean of one channel of a site each, in the unrestricted network (Fig. 3b).

    `x` is one photo, which says what inputs look like; `photo` of the result is the mean that each channel has there,
    `original` equals the last response. Only what leads to the site is run. Where a channel is dead all over a
    picture, so that its mean has no gradient, the mean of its pre-activation is climbed until it is not; what is noted
    is always the activation's.

    `space`, `max_batch`, warnings and errors are those of `decode`; raises `SiteError` for a site that is not there
    and `InputError` for a channel that is not.
    """
    if network._restriction is not None:
        raise RestrictionError("visualise: the network is restricted already; leave the with block first")
    samples = network.samples(x).require_finite()
    if samples.batch != 1:
        raise InputError(f"visualise: expected one photo, found {samples.batch}; channels are the same for all")
    named = channels if isinstance(channels, Mapping) else {f"channel {channel}": channel for channel in channels}
    if not named:
        raise InputError("visualise: expected at least one channel, found none")
    climb = Climb.of("visualise", network, samples, decoding, space)
    found = network.index.site(site)
    wanted = [neuron(found, channel=channel).located(found) for channel in named.values()]
    network.original(samples)  # raises for a photo, or a state of the model, that cannot be used
    start = _up_to(network, found)

    def run(inputs: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        given = samples.take([0] * len(inputs)).map(lambda _: inputs)
        values = _run(network, start, found, given)
        return _means(values[0], wanted[part]), _means(values[-1], wanted[part])

    def objective(inputs: Tensor, part: slice) -> Tensor:
        mean, before = run(inputs, part)
        return torch.where(mean == 0, before, mean)

    def response(inputs: Tensor, part: slice) -> Tensor:
        return run(inputs, part)[0]

    photos = samples.tensors[0].expand(len(wanted), -1, -1, -1)
    return climb.run(list(named), photos, objective, response, response, max_batch=max_batch)


def _means(value: Tensor, wanted: Sequence[Neuron]) -> Tensor:
    """The mean of row r's own channel, `(R,)`."""
    return torch.cat([each(value[row : row + 1], None) for row, each in enumerate(wanted)])


def _up_to(network: Network, site: Site) -> fx.GraphModule:
    """The graph from the inputs to a site's activation, and to its pre-activation where that is a single node."""
    gate = network._gate_nodes[network.index.number(site)]
    (activation,) = (node for node in gate.args[:1] if isinstance(node, fx.Node))
    ends = {"activation": gate}
    if len(activation.all_input_nodes) == 1:
        ends["pre-activation"] = activation.all_input_nodes[0]
    return prefix(network._module, ends)


def _run(network: Network, start: fx.GraphModule, site: Site, samples: Samples) -> list[Tensor]:
    """The values of the site, `(R, *site.shape)`: the activation, and the pre-activation where it is like that."""
    gates = Gates(network.index)
    gates.batch = samples.batch
    with plain_attention(), keeping_branches():
        values = start(*network.traced.bind(samples), gates)
    return [
        value.reshape(-1, *site.shape)
        for value in values
        if isinstance(value, Tensor) and value.shape == values[0].shape
    ]
