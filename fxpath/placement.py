"""Where a sample stands in its micro-batch must change no bit of it; matrix products do not promise that."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import SiteError
from .network import Network
from .outputs import tensors
from .samples import Samples

SIZES = (8, 4, 2, 1)  # micro-batches that are tried where none is asked for; in one of 1 there is a single place

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size; comparing bytes takes longer


class PlacementWarning(UserWarning):
    """The micro-batch that was asked for lets a sample's place in it change last bits."""


@dataclass(frozen=True)
class Trial:
    """What a micro-batch of one repeated sample showed: whether all rows are equal, and how many classes there are."""

    equal: bool
    classes: int | None


def tried(network: Network, sample: Samples, size: int) -> Trial:
    """Run a micro-batch of `size` that holds the same sample everywhere, forward and backward, and compare its rows.

    Convolutions treat each sample alike. A linear layer is one matrix product for the whole micro-batch, and its rows
    may be summed in different orders, depending on their number and on the threads.
    """
    batch = sample.take([0] * size)
    try:
        products, run = network.signed_products(batch)
    except (SiteError, RuntimeError):  # without gradients there is less that can differ
        original = network.original(batch)
        logits, found = original.logits, [original.response]
    else:
        logits, found = network.response.logits(run.output), [products, run.response]
        found += tensors(run.output)
    return Trial(_rows_equal(found, size), None if logits is None else int(logits.shape[1]))


def _rows_equal(tensors: Iterable[Tensor], size: int) -> bool:
    rows = [tensor.contiguous().reshape(size, -1) for tensor in tensors if tensor.shape[:1] == (size,)]
    bits = [row.view(_INTEGERS.get(row.element_size(), torch.uint8)) for row in rows]  # so that NaN equals itself
    return all(torch.equal(row[0], other) for row in bits for other in row[1:])


def settled(network: Network, sample: Samples, asked: int | None) -> tuple[int, Trial]:
    """The micro-batch to use: the one that was asked for, else the largest of `SIZES` in which all places are alike."""
    for size in SIZES if asked is None else (asked,):
        trial = tried(network, sample, size)
        if trial.equal:
            break
    return size, trial
