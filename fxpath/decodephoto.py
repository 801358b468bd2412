"""One photo → its decodings: pathways, pictures, response curves, and the channels that the pathways stand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .climbing import Decoded, Decoding
from .decoding import decode
from .errors import InputError
from .features import TopNeuron, top_neurons
from .inputspace import InputSpace
from .items import Item, collate
from .keys import PathwayKey
from .network import Network
from .pathways import Pathways, Scores
from .responses import neuron
from .samples import Samples
from .selectors import Selector
from .selectors.registry import family

ORIGINAL, ACTIVE = "original", "active"  # the rows before those of the selectors


@dataclass(frozen=True, eq=False)
class Task:
    """What is decoded of every photo: the original network, the active sub-network, a pathway of each selector.

    `target` is "predicted", "labels" or a class number; at `sites` the top neurons of the pathways are looked for;
    `max_batch` rows are climbed at a time (None: all).
    """

    network: Network
    selectors: tuple[Selector, ...]
    sparsity: float
    target: str
    decoding: Decoding
    space: InputSpace
    sites: tuple[str, ...] = ()
    max_batch: int | None = 1

    @property
    def keys(self) -> dict[str, Selector]:
        """Pathway keys and their selectors, in order; raises `InputError` where two are the same."""
        keys = [str(_key(selector, self.sparsity)) for selector in self.selectors]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise InputError(f"decode: {', '.join(twice)} is asked for twice; name each selector once")
        return dict(zip(keys, self.selectors, strict=True))


def _key(selector: Selector, sparsity: float) -> PathwayKey:
    return replace(family(selector), sparsity=None if selector.single else sparsity)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The pathways of one photo by key, the scores that they were cut from where there are any, and what is missing."""

    samples: Samples
    pathways: Mapping[str, Pathways | None]
    scores: Mapping[str, Scores | None]
    missing: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class PhotoDecoding:
    """All that is found of one photo; `tops` has the top neuron of each key at each site, None where there is none.

    `means` is the mean of such a neuron's channel at the photo.
    """

    chosen: Chosen
    decoded: Decoded
    tops: Mapping[str, Mapping[str, TopNeuron | None]]
    means: Mapping[str, Mapping[str, float]]
    picture: Tensor


def decode_photo(task: Task, item: Item) -> PhotoDecoding:
    """Everything that a task asks for of one photo; raises `SampleError` or `BranchError` where it cannot be used."""
    network = task.network
    chosen = _chosen(task, item)
    decoded = decode(
        network, chosen.samples, chosen.pathways,
        decoding=task.decoding, space=task.space, max_batch=task.max_batch,
    )  # fmt: skip
    tops: dict[str, dict[str, TopNeuron | None]] = {}
    means: dict[str, dict[str, float]] = {}
    values = network.activations(chosen.samples) if task.sites else []
    for name in task.sites:
        site = network.index.site(name)
        value = values[network.index.number(name)].reshape(-1, *site.shape)
        tops[name], means[name] = {}, {}
        for key, scores in chosen.scores.items():
            pathways = chosen.pathways[key]
            if pathways is None:
                continue
            (top,) = top_neurons(network, chosen.samples, pathways, site, scores=scores)
            tops[name][key] = top
            if top is not None:
                means[name][key] = float(neuron(site, channel=top.channel).located(site)(value, None))
    (x,) = chosen.samples.tensors
    return PhotoDecoding(chosen, decoded, tops, means, task.space.pictures(x)[0])


def _chosen(task: Task, item: Item) -> Chosen:
    network = task.network
    target = None if task.target == "predicted" else item.label if task.target == "labels" else int(task.target)
    samples = replace(collate([item], network), target=target)
    original = network.original(samples)
    samples = replace(samples, target=original.target)
    pathways: dict[str, Pathways | None] = {ORIGINAL: None, ACTIVE: Pathways(original.active, network.index)}
    scores: dict[str, Scores | None] = {}
    missing: dict[str, str] = {}
    for key, selector in task.keys.items():
        level = None if selector.single else task.sparsity
        selection = selector.select(network, samples, () if level is None else (level,))
        reason = selection.reasons(level, 1)[0]
        if reason:
            missing[key] = reason
        else:
            pathways[key], scores[key] = selection[level], selection.scores
    return Chosen(samples, pathways, scores, missing)


def shown(picture: Tensor) -> npt.NDArray[np.uint8]:
    """A picture `(colours, H, W)` in [0, 1] as `(H, W, 3)` uint8: one channel is grey, of more than three the first."""
    values = picture.detach().float().cpu().clamp(0, 1)
    if len(values) not in (1, 3):
        values = values[:3] if len(values) > 3 else values[:1]
    rows = torch.round(values * 255).to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0)
    return np.ascontiguousarray(rows.numpy())


def channels_of(tops: Sequence[TopNeuron | None]) -> list[int]:
    """The channels of top neurons, each once, in order."""
    return sorted({top.channel for top in tops if top is not None})
