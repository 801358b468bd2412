"""Random active neurons, matched per site in size to a pathway: the drawing that stores and networks share."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .neurons import NeuronIndex

Bits = npt.NDArray[np.uint8]


def draw_active(index: NeuronIndex, mask: Bits, active: Bits, key: str, name: int | str, seed: int = 0) -> Bits:
    """Packed bits `(nbytes,)` of random neurons among those that are active, at each site as many as the pathway has.

    `mask` and `active` `(nbytes,)` are the packed pathway and activation pattern of the sample `name`, `key` the
    pathway's. Where the pathway keeps more neurons of a site than are active, all active ones are taken. The draw
    depends on `seed`, the key, the name and the site alone, so order and neighbours change nothing, and draws for two
    keys are independent of each other. Raises `InputError` for a negative seed.

    >>> index = NeuronIndex.build([("relu", "relu", (8,))])
    >>> drawn = draw_active(index, np.array([0b11], np.uint8), np.array([0b10101100], np.uint8), "active", "cat")
    >>> int(np.bitwise_count(drawn[0])), int(drawn[0]) & ~0b10101100
    (2, 0)
    """
    if seed < 0:
        raise InputError(f"random_active: expected a seed of at least 0, found {seed}")
    sizes = index.count_by_site(mask[None])[0]
    drawn = np.zeros(index.nbytes, dtype=np.uint8)
    words = np.frombuffer(hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=16).digest(), dtype="<u4").tolist()
    for number, (site, size) in enumerate(zip(index.sites, sizes, strict=True)):
        alive = np.flatnonzero(index.unpack_site(site, active[site.bytes]))
        chosen = np.zeros(site.neurons, dtype=np.bool_)
        if alive.size <= size:
            chosen[alive] = True
        else:
            random = np.random.default_rng([seed, number, *words])
            chosen[random.choice(alive, int(size), replace=False, shuffle=False)] = True
        drawn[site.bytes] = np.packbits(chosen, bitorder="little")
    return drawn
