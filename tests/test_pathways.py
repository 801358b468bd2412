"""Scores → pathways: the network-wide cut, bits, and, or, Jaccard; and `Samples`, the bundle that travels."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpath.errors import InputError, RestrictionError, SampleError, SparsityError
from fxpath.neurons import NeuronIndex
from fxpath.pathways import Pathways, Scores, Selection, gather_bits, pack_bits
from fxpath.samples import Samples, class_numbers


def index_of(*sizes: int) -> NeuronIndex:
    return NeuronIndex.build([(f"s{number}", "relu", (size,)) for number, size in enumerate(sizes)])


def grid(granularity: str = "unit") -> NeuronIndex:
    blocks = [("a", "relu", (3, 2, 2)), ("b", "relu", (5,)), ("c", "relu", (4, 2))]
    return NeuronIndex.build(blocks, axes=[0, 0, 1], granularity=granularity)  # type: ignore[arg-type]


def sorted_cut(signed: Tensor, count: int) -> Tensor:
    """The k largest |c| of each row by a stable full sort: equal ones by index; zeros never."""
    values = signed.double().abs()
    order = torch.sort(values, dim=1, descending=True, stable=True).indices[:, :count]
    mask = torch.zeros(values.shape, dtype=torch.bool).scatter_(1, order, True)
    return mask & (values > 0)


@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1 - 1 / 3]), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.sampled_from([1, 3, 1000]),
)
@settings(max_examples=200, deadline=None)
def test_threshold_is_that_of_a_full_sort(
    batch: int, size: int, sparsities: list[float], seed: int, kind: torch.dtype, levels: int
) -> None:
    """Ties (few levels), zeros, signs, every dtype; the host's way and the device's way alike."""
    generator = torch.Generator().manual_seed(seed)
    signed = torch.randint(-levels, levels + 1, (batch, size), generator=generator).to(kind) / levels
    scores = Scores(signed, index_of(size))
    counts = [scores.index.kept(sparsity) for sparsity in sparsities]
    expected = [sorted_cut(signed, count) for count in counts]
    found = scores.threshold(sparsities)
    device = scores._threshold_on_device(counts)
    for pathways, other, mask, count in zip(found, device, expected, counts, strict=True):
        assert torch.equal(pathways.mask, mask)
        assert torch.equal(other, mask)
        assert bool((pathways.count <= count).all())
        full = (signed != 0).sum(1) >= count
        assert bool((pathways.count[full] == count).all())


def test_threshold_of_a_row_larger_than_its_sample() -> None:
    signed = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0)).relu()
    scores = Scores(signed, index_of(200_000))
    sparsities = (0.3, 0.8, 0.9, 0.99)
    counts = [scores.index.kept(sparsity) for sparsity in sparsities]
    assert counts == [140_000, 40_000, 20_000, 2_000]
    for pathways, device, count in zip(
        scores.threshold(sparsities), scores._threshold_on_device(counts), counts, strict=True
    ):
        assert torch.equal(pathways.mask, sorted_cut(signed, count))
        assert torch.equal(pathways.mask, device)


def test_counts_and_density() -> None:
    signed = torch.tensor([[3.0, -4, 0, 0, 1], [0, 0, 0, 0, 0], [-1, 1, -1, 1, -1]])
    scores = Scores(signed, index_of(2, 3))
    assert scores.pathways(0.4).mask.int().tolist() == [[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert scores.pathways(0.4).count.tolist() == [3, 0, 3]
    assert scores.pathways(0.4).density.tolist() == [0.6, 0.0, 0.6]
    assert scores.pathways(0).mask.int().tolist() == [[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert scores.pathways(0.99).count.tolist() == [0, 0, 0]
    assert scores.values.tolist() == signed.abs().tolist()
    assert scores.site(1).tolist() == [[0, 0, 1], [0, 0, 0], [-1, 1, -1]]


def test_pathways_are_nested_over_sparsities() -> None:
    signed = torch.randn(3, 101, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    levels = (0.0, 0.3, 0.5, 0.8, 0.9, 0.99)
    found = Scores(signed, index_of(50, 51)).threshold(levels)
    for larger, smaller in itertools.pairwise(found):
        assert not bool((smaller.mask & ~larger.mask).any())


def test_whole_channels_are_kept() -> None:
    index = grid("channel")
    assert (index.size, index.units) == (3 + 5 + 2, 12 + 5 + 8)
    signed = torch.tensor([[9.0, -8, 7, 0, 6, 5, 0, 0, 8.5, 0.5]])
    scores = Scores(signed, index)
    order = [0, 8, 1, 2, 4, 5, 9]  # by |score|; 4, 4, 4, 4, 1, 1, 4 units each
    weights = index.weights
    for sparsity in (0.9, 0.84, 0.68, 0.5, 0.4, 0.32, 0.3, 0.2, 0.05, 0):
        budget, expected = index.kept(sparsity), []
        for channel in order:
            if budget < weights[channel]:
                break
            budget -= weights[channel]
            expected.append(channel)
        pathways = scores.pathways(sparsity)
        assert pathways.mask[0].nonzero().flatten().tolist() == sorted(expected)
        assert int(pathways.count) == sum(weights[channel] for channel in expected) <= index.kept(sparsity)
        assert float(pathways.density) == int(pathways.count) / 25
    assert torch.equal(Scores(signed.half(), index).pathways(0.5).mask, scores.pathways(0.5).mask)


def test_scores_that_are_not_finite_are_named() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        signed = torch.ones(4, 6)
        signed[1, 2], signed[3, 0] = bad, bad
        with pytest.raises(
            SampleError, match=r"mine: the scores of sample 1, 3 of the batch are NaN or infinite"
        ) as caught:
            Scores(signed, index_of(6), key="mine").pathways(0.5)
        assert caught.value.positions == (1, 3)
        assert len(caught.value.reasons) == 2
    opposite = torch.tensor([[float("inf"), -float("inf")], [1, 2]])
    with pytest.raises(SampleError) as caught:
        Scores(opposite, index_of(2)).require_finite()
    assert caught.value.positions == (0,)
    huge = torch.full((2, 4), torch.finfo(torch.float32).max)  # finite, though their sum is not
    assert Scores(huge, index_of(4)).pathways(0.5).count.tolist() == [2, 2]


def test_sparsities_are_checked() -> None:
    scores = Scores(torch.ones(1, 4), index_of(4))
    for wrong in (1.0, -0.1, float("nan"), "many"):
        with pytest.raises(SparsityError, match=r"in \[0, 1\), found"):
            scores.pathways(wrong)  # type: ignore[arg-type]
    with pytest.raises(SparsityError, match=r"a sequence such as \(0\.8, 0\.9\)"):
        scores.threshold(0.9)  # type: ignore[arg-type]
    assert scores.threshold([]) == []


def test_threads_are_gone_afterwards() -> None:
    before = threading.active_count()
    Scores(torch.rand(5, 100), index_of(100)).pathways(0.5)
    assert threading.active_count() == before


# --- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(8, 16), (3, 5, 9), (1,), (7, 8, 1, 64), (130,)])
def test_pack_and_unpack(sizes: tuple[int, ...]) -> None:
    index = index_of(*sizes)
    mask = torch.rand(4, index.size, generator=torch.Generator().manual_seed(2)) < 0.4
    pathways = Pathways(mask, index)
    packed = pathways.packed()
    assert packed.shape == (4, index.nbytes)
    assert packed.dtype == torch.uint8
    assert np.array_equal(packed.numpy(), index.pack(mask.numpy()))
    for source in (packed, packed.numpy(), packed[:, :].clone()):
        assert torch.equal(Pathways.from_packed(source, index).mask, mask)
    # the way of devices: pad each site to whole bytes, then gather eight booleans at a time
    padded = torch.zeros(4, index.nbytes * 8, dtype=torch.bool)
    for site in index.sites:
        padded[:, site.byte * 8 : site.byte * 8 + site.neurons] = mask[:, site.slice]
    assert torch.equal(gather_bits(padded), packed)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_gathered_bits_are_numpys(batch: int, count: int, seed: int) -> None:
    mask = torch.from_numpy(np.random.default_rng(seed).random((batch, 8 * count)) < 0.5)
    expected = np.packbits(mask.numpy(), axis=1, bitorder="little")
    assert np.array_equal(gather_bits(mask).numpy(), expected)


def test_all_256_bytes_and_views() -> None:
    every = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")).bool()
    assert gather_bits(every).flatten().tolist() == list(range(256))
    wide = torch.zeros(1, 24, dtype=torch.bool)
    wide[0, 5] = True
    assert gather_bits(wide[:, 3:11]).tolist() == [[4]]  # contiguous, at an odd address
    columns = torch.zeros(8, 3, dtype=torch.bool)
    columns[7, 1] = True
    assert gather_bits(columns.t()).flatten().tolist() == [0, 128, 0]


def test_packing_a_view_or_a_mask_with_history() -> None:
    index = index_of(5, 6)
    wide = torch.rand(6, 11) < 0.5
    assert torch.equal(pack_bits(wide[::2], index), pack_bits(wide[::2].clone(), index))


# --- sets -----------------------------------------------------------------------------------------------------------


def test_sets_and_jaccard() -> None:
    index = index_of(4, 2)
    a = Pathways(torch.tensor([[1, 1, 0, 0, 1, 0], [0] * 6, [1] * 6, [1, 0, 0, 0, 0, 0]], dtype=torch.bool), index)
    b = Pathways(torch.tensor([[1, 0, 1, 0, 1, 1], [0] * 6, [1] * 6, [0, 1, 0, 0, 0, 0]], dtype=torch.bool), index)
    assert (a & b).count.tolist() == [2, 0, 6, 0]
    assert (a | b).count.tolist() == [5, 0, 6, 2]
    assert (a - b).count.tolist() == [1, 0, 0, 1]
    assert (~a).count.tolist() == [3, 6, 0, 5]
    overlap = a.jaccard(b)
    assert overlap.dtype == torch.float64
    assert overlap.tolist()[0] == 2 / 5
    assert overlap.tolist()[2:] == [1.0, 0.0]
    assert bool(overlap.isnan()[1])
    assert torch.equal(a.jaccard(b).nan_to_num(-1), b.jaccard(a).nan_to_num(-1))
    one = a.take([2])
    assert (one & b).count.tolist() == b.count.tolist()  # one pathway meets each of many
    assert one.jaccard(b).tolist()[0] == 4 / 6


def test_jaccard_of_channels_counts_units() -> None:
    index = grid("channel")
    a, b = torch.zeros(1, 10, dtype=torch.bool), torch.zeros(1, 10, dtype=torch.bool)
    a[0, [0, 3]] = True  # 4 + 1 units
    b[0, [0, 4, 8]] = True  # 4 + 1 + 4
    assert Pathways(a, index).jaccard(Pathways(b, index)).tolist() == [4 / 10]
    assert Pathways(b, index).density.tolist() == [9 / 25]


def test_pathways_by_site_and_gates() -> None:
    index = grid()
    mask = torch.rand(2, index.size) < 0.5
    pathways = Pathways(mask, index)
    assert torch.equal(pathways.site("c"), mask[:, 17:].view(2, 4, 2))
    assert pathways.site("c").data_ptr() == mask[:, 17:].data_ptr()
    assert [tuple(gate.shape) for gate in pathways.gates()] == [(2, 3, 2, 2), (2, 5), (2, 4, 2)]
    channels = grid("channel")
    mask = torch.rand(2, channels.size) < 0.5
    assert [tuple(gate.shape) for gate in Pathways(mask, channels).gates()] == [(2, 3, 1, 1), (2, 5), (2, 1, 2)]
    assert Pathways(mask, channels).site("a").shape == (2, 3)


def test_pathways_refuse_what_does_not_fit() -> None:
    index = index_of(4)
    for wrong in (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(4, dtype=torch.bool), torch.zeros(2, 4)):
        with pytest.raises(InputError, match=r"expected a bool mask \(B, 4\), found torch\.(bool|float32)"):
            Pathways(wrong, index)
    a = Pathways(torch.ones(2, 4, dtype=torch.bool), index)
    with pytest.raises(RestrictionError, match="two of one index"):
        a & Pathways(torch.ones(2, 5, dtype=torch.bool), index_of(5))
    with pytest.raises(RestrictionError, match="expected equal batches, found 2 and 3"):
        a.jaccard(Pathways(torch.ones(3, 4, dtype=torch.bool), index))


def test_selection_says_why_a_sparsity_is_missing() -> None:
    pathways = Pathways(torch.ones(1, 4, dtype=torch.bool), index_of(4))
    selection = Selection({0.9: pathways}, missing={0.99: "no neuron with a score is left"})
    assert selection[0.9] is pathways
    assert list(selection) == [0.9]
    assert len(selection) == 1
    with pytest.raises(KeyError, match=r"sparsity 0\.99 was not reached: no neuron with a score is left"):
        selection[0.99]
    with pytest.raises(SparsityError, match=r"sparsity 0\.5 was not asked for; there is 0\.9"):
        selection[0.5]
    with pytest.raises(SparsityError, match=r"there is the one pathway: \[None\]"):
        Selection({None: pathways})[0.9]


# --- samples --------------------------------------------------------------------------------------------------------


def test_samples_of_every_form() -> None:
    x, y = torch.rand(3, 2), torch.rand(3, 4)
    assert Samples(x).args[0] is x
    assert Samples((x, y)).args == (x, y)
    assert Samples({"a": x, "b": y}).kwargs == {"a": x, "b": y}
    assert Samples({"a": x, "flag": True}).batch == 3
    assert Samples(x).names == (0, 1, 2)
    assert Samples(x, ids=["p", "q", "r"]).names == ("p", "q", "r")
    assert Samples(x, ids=np.array([5, 6, 7])).names == Samples(x, ids=torch.tensor([5, 6, 7])).names == (5, 6, 7)
    given_ = Samples(x, target=1)
    assert Samples.of(given_) is given_
    assert Samples.of(given_, 2).target == 2
    assert Samples.of(x, [0, 1, 2]).target == [0, 1, 2]
    assert Samples((x.to(torch.int64), y)).device == torch.device("cpu")


def test_samples_taken() -> None:
    x = torch.arange(6.0).view(3, 2)
    for target in ([4, 5, 6], torch.tensor([4, 5, 6]), np.array([4, 5, 6]), (4, 5, 6)):
        taken = Samples({"x": x, "flag": None}, target, ids=["p", "q", "r"]).take([2, 0, 2])
        assert taken.kwargs["x"].tolist() == [[4, 5], [0, 1], [4, 5]]
        assert taken.kwargs["flag"] is None
        assert taken.target.tolist() == [6, 4, 6]  # type: ignore[union-attr]
        assert taken.names == ("r", "p", "r")
    assert Samples(x, 1).take([0]).target.tolist() == [1]  # type: ignore[union-attr]
    assert Samples(x, [1]).take([0, 1]).target.tolist() == [1]  # type: ignore[union-attr]
    assert Samples(x).take([1]).target is None
    assert Samples(x).take([1]).names == (1,)  # the name that it had


@pytest.mark.parametrize(
    ("inputs", "more", "message"),
    [
        ([torch.ones(2)], {}, r"a tuple or a dict of them, found list; wrap a list"),
        ("x", {}, r"found str"),
        ((), {}, r"expected tensors with the batch axis in front, found nothing; put them"),
        (({"x": 3, "y": "z"},), {}, r"expected tensors with the batch axis in front, found int, str; put them"),
        ((torch.ones(2, 1), torch.ones(3, 1)), {}, r"one common batch axis.*\[\(2, 1\), \(3, 1\)\]"),
        (torch.tensor(1.0), {}, r"one common batch axis.*\[\(\)\]"),
        ((torch.ones(2), torch.tensor(1.0)), {}, r"one common batch axis"),
        (torch.ones(0, 3), {}, r"at least one sample, found an empty batch"),
        (torch.ones(2, 3), {"ids": ["a"]}, r"ids: expected 2, one a sample, found 1"),
        (torch.ones(2, 3), {"target": [1, 2, 3]}, r"target: expected one class, or 2, one a sample, found 3"),
        (torch.ones(2, 3), {"target": []}, r"target: expected (one|whole)"),
        (torch.ones(2, 3), {"target": "cat"}, r"target: expected a class number, or one a sample, found 'cat'"),
        (torch.ones(2, 3), {"target": 1.0}, r"target: expected whole class numbers, found torch\.float32"),
        (torch.ones(2, 3), {"target": True}, r"target: expected whole class numbers, found torch\.bool"),
        (torch.ones(2, 3), {"target": [0.5, 1.5]}, r"target: expected whole class numbers"),
        (torch.ones(2, 3), {"target": [[1, 2], [3]]}, r"target: expected a class number"),
    ],
)
def test_samples_that_do_not_fit(inputs: object, more: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Samples(inputs, **more)  # type: ignore[arg-type]


def test_class_numbers_of_every_form() -> None:
    for target in (3, np.int64(3), torch.tensor(3), [3], np.array([3], dtype=np.uint8), torch.tensor([[3]])):
        assert class_numbers(target).tolist() == [3]
        assert class_numbers(target).dtype == torch.int64


def test_samples_that_are_not_finite_are_named() -> None:
    x = torch.ones(4, 2, 2)
    x[1, 0, 1], x[3, 1, 1] = float("nan"), float("inf")
    with pytest.raises(SampleError, match=r"sample 'q', 's' holds NaN or infinite values") as caught:
        Samples((x, torch.ones(4, dtype=torch.int64)), ids=list("pqrs")).require_finite()
    assert caught.value.positions == (1, 3)
    good = Samples((torch.ones(2, 2), torch.ones(2, dtype=torch.int64)))
    assert good.require_finite() is good
    with pytest.raises(SampleError, match="sample 0 holds"):
        Samples(torch.tensor([float("nan"), 1.0])).require_finite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex64])
def test_one_number_that_is_not_finite_is_found(bad: float, dtype: torch.dtype) -> None:
    x = torch.ones(3, 4)
    assert Samples(x.to(dtype)).require_finite().batch == 3
    x[2, 1] = bad
    with pytest.raises(SampleError, match="sample 2 holds"):
        Samples(x.to(dtype)).require_finite()
