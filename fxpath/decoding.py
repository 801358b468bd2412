"""Decoding: which picture a pathway answers to most, found by climbing the masked network's response (Fig. 3a)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .climbing import Climb, ConstantResponseWarning, Decoded, Decoding
from .errors import InputError, RestrictionError
from .inputspace import InputSpace
from .network import Network
from .pathways import Pathways
from .samples import Samples, type_of_target

__all__ = ["ConstantResponseWarning", "Decoded", "Decoding", "decode"]


def decode(
    network: Network,
    x: Any,
    pathways: Pathways | Mapping[str, Pathways | None] | None = None,
    target: type_of_target = None,
    *,
    decoding: Decoding | None = None,
    space: InputSpace | None = None,
    max_batch: int | None = None,
) -> Decoded:
    """Pictures that maximise Φ(·; e ⊙ a) of the class that is explained at the photo `x`.

    `pathways` are restrictions by name, each a row: pathways of the photo, or None for the original network. With B
    photos there are B rows a name; plain `Pathways` are rows without a name. `space` says how the network takes
    colours; without it [0, 1] is the range of each channel of `x` (`InputSpace.of_samples`). Without a target it is the
    class that the original network predicts for the photo.

    Every row has its own coefficients, and all the same noise to begin with and the same moves. Where the response has
    no gradient there, as all that is kept is dead, the noise is ten or a hundred times as strong (`strength`).
    `max_batch` rows run at a time (None: all). A row that runs alone does not depend on others in any bit; in a batch,
    but for the rounding of convolutions. One seed gives one picture bit for bit on a CPU; elsewhere gradients of the
    resampling may be added in any order.

    Warns with `ConstantResponseWarning` of rows whose response has no gradient even so: these stay noise.
    Raises `InputError` where the network takes anything but one floating-point picture, or a response becomes NaN.
    """
    if network._restriction is not None:
        raise RestrictionError("decode: the network is restricted already; leave the with block first")
    samples = network.samples(x, target).require_finite()
    climb = Climb.of("decode", network, samples, decoding, space)
    labels, rows, masks = _rows(network, samples, pathways)
    original = network.original(samples)
    photos = replace(samples, target=original.target).take(rows)
    whole = Pathways(masks.mask.new_ones((1, network.index.size)), network.index)

    def answer(inputs: Tensor, part: slice, restricted: Pathways) -> Tensor:
        own = photos.take(range(len(rows))[part])
        with network.masked(restricted):
            return network.respond(own.map(lambda _: inputs))

    def response(inputs: Tensor, part: slice) -> Tensor:
        return answer(inputs, part, masks.take(range(len(rows))[part]))

    def unrestricted(inputs: Tensor, part: slice) -> Tensor:
        return answer(inputs, part, whole)  # as if nothing were masked, on the branches that the rows take

    target = None if original.target is None else original.target[rows]
    return climb.run(labels, photos.tensors[0], response, response, unrestricted, target=target, max_batch=max_batch)


def _rows(
    network: Network, samples: Samples, pathways: Pathways | Mapping[str, Pathways | None] | None
) -> tuple[list[str], list[int], Pathways]:
    """A label, the number of the photo and the mask of every row."""
    if pathways is None:
        pathways = {"original": None}
    named: Mapping[str, Pathways | None] = pathways if isinstance(pathways, Mapping) else {"": pathways}
    if not named:
        raise InputError("decode: expected at least one pathway, found none; None stands for the original network")
    whole = torch.ones((1, network.index.size), dtype=torch.bool, device=network.device)
    labels: list[str] = []
    rows: list[int] = []
    masks: list[Tensor] = []
    photos = samples.batch
    for name, given in named.items():
        if given is not None:
            network._gates_of(given)
        mask = whole if given is None else given.mask
        if 1 != photos != len(mask) != 1:
            raise RestrictionError(
                f"decode: {name or 'pathways'}: there are {len(mask)} pathways for {photos} photos; give one each"
            )
        size = max(photos, len(mask))
        numbers = [str(number) for number in (samples.names if photos > 1 else range(size))]
        labels += [name] if name and size == 1 else [f"{name} {number}".strip() for number in numbers]
        rows += range(photos) if photos > 1 else [0] * size
        masks.append(mask.expand(size, -1))
    return labels, rows, Pathways(torch.cat(masks), network.index)
