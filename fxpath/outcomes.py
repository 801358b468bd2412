"""What a network answers: the original, and what is left of it with a pathway alone and with all the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .answers import Original, Outcome
from .errors import InputError, ModelError, RestrictionError, SampleError
from .gates import Gates, Restriction, note_positive
from .pathways import Pathways, pack_bits
from .responses import respond
from .samples import Samples, type_of_target

if TYPE_CHECKING:
    from .network import Network


def find_original(network: Network, x: Any, target: type_of_target) -> Original:
    """`Network.original`."""
    if network._restriction is not None:
        raise RestrictionError("original: the network is restricted; leave the with block first")
    samples = network.samples(x, target).require_finite()
    real = network.real(samples)
    active = torch.empty((samples.batch, network.index.size), dtype=torch.bool, device=network.device)

    def note(number: int, value: Tensor) -> None:
        note_positive(value if real is None else real.only(number, value), network.index.sites[number], active)

    with torch.no_grad():
        output = network._run(samples, Gates(network.index, watch=note))
        logits = network.response.logits(output)
        resolved = network._resolve(output, samples)
        value = respond(network.response, output, resolved, samples.batch)
    require_finite_response(value, samples)
    probability = prediction = None
    if logits is not None and resolved is not None:
        probability = logits.softmax(dim=1).gather(1, resolved.unsqueeze(1)).squeeze(1)
        prediction = logits.argmax(dim=1)
    packed = pack_bits(active, network.index)
    return Original(value, probability, prediction, resolved, active, logits, packed=packed)


def find_outcome(
    network: Network, x: Any, pathways: Pathways, target: type_of_target, original: Original | None
) -> Outcome:
    """`Network.outcome`."""
    if original is not None and target is not None:
        raise InputError("outcome: expected a target or an original, which has its own, found both")
    samples = network.samples(x, target)
    network._gates_of(pathways)
    if 1 != pathways.batch != samples.batch:
        raise RestrictionError(
            f"outcome: there are {pathways.batch} pathways for {samples.batch} samples; give one each"
        )
    original = original or network.original(samples)
    if original.response.shape != (samples.batch,):
        raise InputError(f"outcome: the original is of {original.response.shape[0]} samples, found {samples.batch}")
    samples = Samples(samples.inputs, original.target, samples.ids)
    dead = pathways.packed() & ~original.packed
    live = np.zeros((samples.batch, len(network.index)), dtype=np.int64)
    if bool(dead.any()):
        live[:] = network.index.count_by_site(dead.cpu().numpy())  # bits are few, and NumPy can count them
    suspects = set(np.flatnonzero(live.any(axis=0)).tolist())
    on = torch.zeros_like(original.active) if suspects else original.active
    real = network.real(samples) if suspects else None

    def note(number: int, value: Tensor) -> None:
        if number in suspects:
            note_positive(value if real is None else real.only(number, value), network.index.sites[number], on)

    with torch.no_grad():
        with network.masked(pathways):
            output = network._run(samples, Gates(network.index, network._restriction, watch=note if suspects else None))
            value = respond(network.response, output, original.target, samples.batch)
        rest = Restriction(pathways.gates(), [None] * len(network.index), inverted=True)
        with network.restricted(rest):
            dropped = network.respond(samples)
    if suspects:
        live = network.index.count_by_site((pack_bits(on, network.index) & dead).cpu().numpy())
    logits = network.response.logits(output)
    probability = same = None
    if logits is not None and original.target is not None and original.prediction is not None:
        probability = logits.softmax(dim=1).gather(1, original.target.unsqueeze(1)).squeeze(1)
        same = torch.eq(logits.argmax(dim=1), original.prediction)
    return Outcome(value, probability, same, dropped, torch.from_numpy(live).to(network.device))


def require_finite_response(value: Tensor, samples: Samples) -> None:
    """Raise `SampleError` for samples whose response `(B,)` is NaN or infinite; `ModelError` where none has a value."""
    if value.is_meta:
        raise ModelError(
            "response: the network is on the meta device, where nothing has a value; its sites and their shapes are "
            "all that can be asked for. Trace the model with its weights on a real device"
        )
    bad = torch.nonzero(~torch.isfinite(value)).flatten().tolist()
    if bad:
        raise SampleError(
            f"response: it is NaN or infinite for sample {', '.join(repr(samples.names[row]) for row in bad[:5])}; "
            "the network overflows on it",
            bad,
            ["the network's response is NaN or infinite"] * len(bad),
        )
