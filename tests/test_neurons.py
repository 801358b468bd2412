"""The neuron index and the exact cut: plain data, no torch."""

from __future__ import annotations

import decimal
import itertools
import json
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fxpath.errors import InputError, SiteError, SparsityError, StoreError
from fxpath.keys import PathwayKey, checked_sparsities, exact_sparsity, parse_value
from fxpath.neurons import NeuronIndex, Site, nth_largest, select_largest

BLOCKS = [("a.relu", "relu", (3, 5, 2)), ("a.relu_1", "relu", (7,)), ("b", "relu6", ()), ("c.relu", "relu", (8, 2))]
AXES = [0, 0, 0, 1]


def index(granularity: str = "unit") -> NeuronIndex:
    return NeuronIndex.build(BLOCKS, axes=AXES, folds=[1, 1, 1, 8], granularity=granularity)  # type: ignore[arg-type]


def test_layout() -> None:
    found = index()
    assert (found.size, found.units, len(found)) == (30 + 7 + 1 + 16, 54, 4)
    assert [site.slice for site in found] == [slice(0, 30), slice(30, 37), slice(37, 38), slice(38, 54)]
    assert [site.bytes for site in found] == [slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 8)]
    assert found.nbytes == 8
    assert [site.units for site in found] == [30, 7, 1, 16]
    assert [site.gate_shape for site in found] == [(3, 5, 2), (7,), (), (8, 2)]
    assert found.weights.tolist() == [1] * 54


def test_layout_of_channels() -> None:
    found = index("channel")
    assert [site.neurons for site in found] == [3, 7, 1, 2]
    assert (found.size, found.units) == (13, 54)
    assert [site.gate_shape for site in found] == [(3, 1, 1), (7,), (), (1, 2)]
    assert found.weights.tolist() == [10, 10, 10, *[1] * 8, 8, 8]
    assert found.locate(12) == ("c.relu", (1,))
    assert found.flat("c.relu", (1,)) == 12


def test_flat_and_locate_are_inverse() -> None:
    found = index()
    for neuron in range(found.size):
        name, place = found.locate(neuron)
        assert found.flat(name, place) == neuron
        assert found.flat(found.site(name), place) == neuron
    corners = [found.locate(n) for n in (0, 29, 30, 37, 38, 53)]
    assert corners == [
        ("a.relu", (0, 0, 0)), ("a.relu", (2, 4, 1)), ("a.relu_1", (0,)),
        ("b", ()), ("c.relu", (0, 0)), ("c.relu", (7, 1)),
    ]  # fmt: skip


def test_site_by_name_number_and_itself() -> None:
    found = index()
    assert found.number("b") == found.number(2) == found.number(-2) == found.number(found.sites[2]) == 2
    assert found.number(np.int64(3)) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: i.number("a.rely"), SiteError, r"there is no site 'a\.rely'; nearest: a\.relu, "),
        (lambda i: i.number(4), SiteError, r"expected 0 … 3, found 4"),
        (lambda i: i.locate(54), InputError, r"neuron: expected 0 … 53, found 54"),
        (lambda i: i.locate(-1), InputError, r"found -1"),
        (lambda i: i.flat("a.relu_1", (7,)), InputError, r"within \(7,\) of a\.relu_1, found \(7,\)"),
        (lambda i: i.flat("a.relu", (0, 0)), InputError, r"within \(3, 5, 2\) of a\.relu, found \(0, 0\)"),
        (lambda i: i.flat("a.relu", (0, 0, -1)), InputError, r"found \(0, 0, -1\)"),
        (lambda i: i.unpack(np.zeros((2, 7), np.uint8)), InputError, r"packed rows: expected 8 bytes, found 7"),
        (lambda i: i.pack(np.zeros((2, 53), np.bool_)), InputError, r"mask rows: expected 54 neurons, found 53"),
    ],
)
def test_errors(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(index())  # type: ignore[operator]


def test_json_round_trip_and_equality() -> None:
    for granularity in ("unit", "channel"):
        found = index(granularity)
        again = NeuronIndex.from_json(json.loads(json.dumps(found.to_json())))
        assert again == found
        assert hash(again) == hash(found)
    assert index() != index("channel")
    assert index() != NeuronIndex.build(BLOCKS[:3])
    assert index() != "index"
    renamed = NeuronIndex.build([("other", *BLOCKS[0][1:]), *BLOCKS[1:]], axes=AXES, folds=[1, 1, 1, 8])
    assert renamed != index()


def test_packing_is_numpys_a_site_at_a_time() -> None:
    found, rng = index(), np.random.default_rng(0)
    masks = rng.random((6, found.size)) < 0.4
    packed = found.pack(masks)
    assert packed.shape == (6, 8)
    assert packed.dtype == np.uint8
    for row, bits in zip(masks, packed, strict=True):
        expected = b"".join(np.packbits(row[site.slice], bitorder="little").tobytes() for site in found)
        assert bits.tobytes() == expected
    assert np.array_equal(found.unpack(packed), masks)
    assert np.array_equal(found.unpack(found.pack(masks[0])), masks[0])
    counts = [[row[site.slice].sum() for site in found] for row in masks]
    assert found.count_by_site(packed).tolist() == counts
    site = found.sites[0]
    assert np.array_equal(found.unpack_site(site, packed[:, site.bytes]), masks[:, site.slice])


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_packing_round_trip(sizes: list[int], seed: int) -> None:
    found = NeuronIndex.build([(f"s{n}", "relu", (size,)) for n, size in enumerate(sizes)])
    masks = np.random.default_rng(seed).random((3, found.size)) < 0.5
    packed = found.pack(masks)
    assert packed.shape == (3, sum(math.ceil(size / 8) for size in sizes))
    assert np.array_equal(found.unpack(packed), masks)
    assert np.array_equal(found.count_by_site(packed).sum(axis=1), masks.sum(axis=1))


# --- k --------------------------------------------------------------------------------------------------------------

TYPED = ["0", "0.1", "0.3", "0.5", "0.6", "0.7", "0.8", "0.9", "0.95", "0.98", "0.99", "0.999", repr(1 - 1 / 3)]


@pytest.mark.parametrize("typed", TYPED)
@pytest.mark.parametrize("units", [10, 100, 1000, 54, 2_763_104, 9_608_704, 13_555_712])
def test_k_is_exact(typed: str, units: int) -> None:
    found = NeuronIndex.build([("s", "relu", (units,))])
    expected = math.floor((1 - Fraction(typed)) * units)
    assert found.kept(float(typed)) == found.kept(typed) == found.kept(np.float64(typed)) == expected


def test_binary_floats_would_give_one_too_few() -> None:
    cases = [(sparsity, n) for sparsity in (0.9, 0.99, 0.7, 0.8) for n in range(10, 2000, 10)]
    wrong = [
        (sparsity, n)
        for sparsity, n in cases
        if int((1 - sparsity) * n) != NeuronIndex.build([("s", "relu", (n,))]).kept(sparsity)
    ]
    assert (0.9, 10) in wrong
    assert (0.8, 10) in wrong
    assert NeuronIndex.build([("s", "relu", (10,))]).kept(0.9) == 1
    assert len(wrong) > 100


def test_k_does_not_depend_on_the_decimal_context() -> None:
    found = NeuronIndex.build([("s", "relu", (13_555_712,))])
    with decimal.localcontext(decimal.Context(prec=4)):
        assert found.kept(0.9) == 1_355_571
        assert found.kept("0.99999999") == 0
    assert found.kept("0.9999999") == 1


@pytest.mark.parametrize(
    "wrong", [1, 1.0, -0.1, 2, float("nan"), float("inf"), "", "x", "nan", True, None, [0.9], "1e400"]
)
def test_sparsity_outside_of_its_range(wrong: object) -> None:
    with pytest.raises(SparsityError, match=r"expected a (share|number) in \[0, 1\), found") as caught:
        exact_sparsity(wrong)  # type: ignore[arg-type]
    assert isinstance(caught.value, KeyError)
    assert str(caught.value)[0] != "'"


def test_several_sparsities() -> None:
    assert checked_sparsities([0.9, "0.5"]) == (0.9, "0.5")
    assert checked_sparsities(np.array([0.25])) == (0.25,)
    assert checked_sparsities(x for x in (0.1,)) == (0.1,)
    for wrong in (0.9, "0.9"):
        with pytest.raises(SparsityError, match=r"expected a sequence such as \(0\.8, 0\.9\), found"):
            checked_sparsities(wrong)
    with pytest.raises(SparsityError, match="found 1"):
        checked_sparsities((0.5, 1))


# --- the cut --------------------------------------------------------------------------------------------------------


def oracle(values: np.ndarray, count: int) -> np.ndarray:
    """The k largest by a full sort in Python: value first, then the smaller index; zeros never."""
    order = sorted(range(values.size), key=lambda n: (-values[n], n))
    mask = np.zeros(values.size, dtype=bool)
    mask[[n for n in order[: max(count, 0)] if values[n] > 0]] = True
    return mask


@given(
    arrays.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.integers(0, 60),
        elements=st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 10, width=32)),
    ),
    st.lists(st.integers(-2, 70), max_size=6),
)
@settings(max_examples=300, deadline=None)
def test_the_largest_are_those_of_a_full_sort(values: np.ndarray, counts: list[int]) -> None:
    masks = select_largest(values, counts)
    assert masks.shape == (len(counts), values.size)
    for mask, count in zip(masks, counts, strict=True):
        assert np.array_equal(mask, oracle(values, count))


def test_ties_go_to_the_smaller_index() -> None:
    values = np.array([1.0, 2, 2, 0, 2, 1, 2])
    masks = select_largest(values, [1, 2, 3, 4, 5, 6, 7])
    assert [np.flatnonzero(mask).tolist() for mask in masks] == [
        [1], [1, 2], [1, 2, 4], [1, 2, 4, 6], [0, 1, 2, 4, 6], [0, 1, 2, 4, 5, 6], [0, 1, 2, 4, 5, 6],
    ]  # fmt: skip


def test_zero_is_never_taken() -> None:
    assert select_largest(np.zeros(9), [0, 3, 9, 20]).sum() == 0
    assert select_largest(np.array([0.0, 0, 5e-324, 0]), [3]).tolist() == [[False, False, True, False]]
    assert select_largest(np.array([-0.0, 1]), [2]).tolist() == [[False, True]]


SPREADS = {
    "normal": lambda rng, n: np.abs(rng.normal(size=n)),
    "half dead": lambda rng, n: np.maximum(rng.normal(size=n), 0),
    "few values": lambda rng, n: rng.integers(0, 5, n).astype(float),
    "all equal": lambda rng, n: np.ones(n),
    "ascending": lambda rng, n: np.arange(n, dtype=float),
    "descending": lambda rng, n: np.arange(n, dtype=float)[::-1].copy(),
    "large at the stride": lambda rng, n: np.where(np.arange(n) % (n // 16_384) == 0, 2.0, rng.random(n)),
    "small at the stride": lambda rng, n: np.where(np.arange(n) % (n // 16_384) == 0, 0.0, rng.random(n)),
    "long tail": lambda rng, n: np.exp(8 * rng.normal(size=n)),
}


@pytest.mark.parametrize("spread", SPREADS)
def test_large_rows_are_cut_exactly(spread: str) -> None:
    """Beyond 131 072 values a sample brackets the threshold; whatever the sample sees, the cut is exact."""
    values = SPREADS[spread](np.random.default_rng(1), 300_007).astype(np.float32)
    counts = [0, 1, 2, 299, 3_000, 30_000, 60_001, 150_000, 299_999, 300_006, 300_007]
    order = np.lexsort((np.arange(values.size), -values))
    masks = np.ones((len(counts), values.size), dtype=bool)
    assert select_largest(values, counts, out=masks) is masks
    for mask, count in zip(masks, counts, strict=True):
        expected = np.zeros(values.size, dtype=bool)
        expected[order[:count]] = True
        expected &= values > 0
        assert np.array_equal(mask, expected)
        assert count == 0 or nth_largest(values, count) == values[order[count - 1]]


def test_whole_channels_are_kept_while_they_fit() -> None:
    weights = np.array([10, 10, 1, 1, 8, 8])
    values = np.array([3.0, 1, 2, 2, 5, 0])
    masks = select_largest(values, [0, 7, 8, 17, 18, 19, 20, 29, 30, 38], weights)
    assert [np.flatnonzero(mask).tolist() for mask in masks] == [
        [], [], [4], [4], [0, 4], [0, 2, 4], [0, 2, 3, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4],
    ]  # fmt: skip
    for mask, count in zip(masks, [0, 7, 8, 17, 18, 19, 20, 29, 30, 38], strict=True):
        assert weights[mask].sum() <= count


# --- keys -----------------------------------------------------------------------------------------------------------


def test_keys_round_trip() -> None:
    texts = ["active", "neuron_mct@0.9", "random:per_layer=True,seed=3@0.99", "dgr:init=r@0.8", "x:a=0.5,b=1e-05@0.0"]
    for text in texts:
        assert str(PathwayKey.parse(text)) == text
    assert PathwayKey.parse("dgr:init=1@0.80") == PathwayKey("dgr", {"init": 1}, 0.8)
    assert PathwayKey.parse("random:seed=3@0.9").family == "random:seed=3"
    assert str(PathwayKey("s", {"b": 1, "a": 2.0})) == "s:a=2.0,b=1"  # sorted, floats by repr
    values = [True, 3, 0.1, 1e-5, "r"]
    for value, other in itertools.product(values, values):
        key = PathwayKey("s", {"p": value, "q": other}, 0.5)
        assert PathwayKey.parse(str(key)) == key
        assert type(parse_value(str(value))) is type(value)


@pytest.mark.parametrize("wrong", ["", "A@0.9", "x@", "x:@0.9", "x:a@0.9", "x:=1", "x@0.9@0.8", "x/y", "x:a=1/2"])
def test_texts_that_are_no_keys(wrong: str) -> None:
    with pytest.raises(StoreError, match=r"pathway key.*expected"):
        PathwayKey.parse(wrong)


def test_no_torch_is_needed() -> None:
    code = "import fxpath.neurons, fxpath.keys, fxpath.errors, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_site_is_plain_data() -> None:
    site = Site("s", "relu", (2, 3), 4, 1, 6)
    assert (site.slice, site.bytes, site.units, site.gate_shape) == (slice(4, 10), slice(1, 2), 6, (2, 3))
