"""Draws of random active neurons: the same as ever, and those of a store and of a network alike."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from synthetic import synthetic_index, synthetic_rows

from fxpath.errors import InputError
from fxpath.matching import Bits, draw_active
from fxpath.neurons import NeuronIndex


def written_out(index: NeuronIndex, mask: Bits, active: Bits, key: str, name: str, seed: int) -> np.ndarray:
    """The draw as stores were analysed with it at first, on whole rows of bools `(N,)`."""
    kept, alive = index.unpack(mask), index.unpack(active)
    drawn = np.zeros(index.size, dtype=np.bool_)
    words = np.frombuffer(hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=16).digest(), dtype="<u4").tolist()
    for number, site in enumerate(index.sites):
        own, size = np.flatnonzero(alive[site.slice]), int(kept[site.slice].sum())
        if own.size > size:
            own = np.random.default_rng([seed, number, *words]).choice(own, size, replace=False, shuffle=False)
        drawn[site.start + own] = True
    return drawn


@pytest.mark.parametrize("granularity", ["unit", "channel"])
def test_draws_are_those_of_every_analysis_so_far(granularity: str) -> None:
    index = synthetic_index(granularity)
    rows = synthetic_rows(index, 3)
    whole = 0
    for key, pathways in rows.pathways.items():
        for row, name in enumerate(rows.samples["id"]):
            for seed in (0, 7):
                mask, active = pathways.columns["mask"][row], rows.active[row]
                found = draw_active(index, mask, active, key, name, seed)
                expected = written_out(index, mask, active, key, name, seed)
                np.testing.assert_array_equal(index.unpack(found), expected)
                wanted = np.minimum(index.count_by_site(mask[None]), index.count_by_site(active[None]))
                np.testing.assert_array_equal(index.count_by_site(found[None]), wanted)
                assert not (found & ~active).any()
                whole += int(expected.sum())
    assert whole > 100


def test_what_decides_a_draw() -> None:
    index = NeuronIndex.build([("relu", "relu", (400,))])
    rng = np.random.default_rng(0)
    mask, active = index.pack(rng.random((2, 400)) < np.array([[0.2], [0.8]]))
    first = draw_active(index, mask, active, "neuron_mct@0.9", "cat")
    np.testing.assert_array_equal(first, draw_active(index, mask, active, "neuron_mct@0.9", "cat", 0))
    np.testing.assert_array_equal(
        draw_active(index, mask, active, "neuron_mct@0.9", 3), draw_active(index, mask, active, "neuron_mct@0.9", "3")
    )
    others = [("random@0.9", "cat", 0), ("neuron_mct@0.9", "dog", 0), ("neuron_mct@0.9", "cat", 1)]
    for other in others:
        assert (first != draw_active(index, mask, active, *other)).sum() > 10
    with pytest.raises(InputError, match="expected a seed of at least 0, found -1"):
        draw_active(index, mask, active, "neuron_mct@0.9", "cat", -1)
