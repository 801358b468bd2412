"""Statistics of attribution maps against formulas by hand: Gini index, zeros, ties, and paired differences."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from mapstore import MapsInMemory, sparse_maps
from scipy import stats

from fxpath.analysis import (
    bootstrap_interval,
    gini,
    holm,
    map_differences,
    map_statistics,
    map_statistics_by_sample,
    paired_test,
)
from fxpath.errors import InputError, StoreError

KEYS = ("gradient", "neuron_mct@0.9", "neuron_mct@0.9*")


def store(count: int = 9) -> MapsInMemory:
    """Nine samples: one failed, one has no pathway map, one has a pathway map that is 0 everywhere."""
    arrays = {
        key: sparse_maps(count, 5, 7, share, seed)
        for seed, (key, share) in enumerate(zip(KEYS, (0, 0.6, 0.3), strict=True))
    }
    arrays["neuron_mct@0.9"][3] = np.nan
    arrays["neuron_mct@0.9"][4] = 0
    arrays["neuron_mct@0.9*"][:, :2] = 0.5
    found = MapsInMemory(arrays, failed=(2,))
    found.arrays["gradient"][2] = found.arrays["neuron_mct@0.9*"][2] = 1.0  # of a sample that failed nothing counts
    return found


# ----------------------------------------------------------------------------------------------------------- Gini


def test_gini_of_known_cases() -> None:
    assert gini(np.ones(7)) == 0
    assert gini([3.0]) == 0
    one = np.zeros(50)
    one[13] = -1e-30
    assert gini(one) == pytest.approx(49 / 50, rel=1e-12)
    assert gini([1, 2, 3, 4]) == pytest.approx(0.25, rel=1e-12)  # Σ(2i − 5)·i = 10, over 4·10
    ramp = np.arange(1, 1001)
    assert gini(ramp) == pytest.approx(999 / 3000, rel=1e-12)  # (n² − 1) / 3n² of 1 … n, over (n + 1)/n
    assert gini([0, 0, 1, 1]) == 0.5


def test_gini_is_the_mean_difference_of_two_pixels_over_twice_the_mean() -> None:
    values = np.random.default_rng(0).standard_normal((3, 4, 21))
    sizes = np.abs(values)
    pairs = np.abs(sizes[..., :, None] - sizes[..., None, :]).mean(axis=(-1, -2))
    np.testing.assert_allclose(gini(values), pairs / (2 * sizes.mean(axis=-1)), rtol=1e-12)


@pytest.mark.parametrize("factor", [-1.0, 1e-300, 1e300, 3.7])
def test_gini_knows_no_scale_and_no_order(factor: float) -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal(200)
    np.testing.assert_allclose(gini(factor * values), gini(values), rtol=1e-12)
    np.testing.assert_allclose(gini(rng.permutation(values)), gini(values), rtol=1e-12)


def test_gini_is_missing_where_it_has_no_meaning() -> None:
    nan, inf = np.nan, np.inf
    found = gini([[0.0, 0, 0], [nan, 1, 2], [inf, 1, 2], [-inf, inf, 1], [0, 0, 1]])
    np.testing.assert_allclose(found, [nan, nan, nan, nan, 2 / 3])
    with pytest.raises(InputError, match=r"found the shape \(4, 0\)"):
        gini(np.ones((4, 0)))
    with pytest.raises(InputError, match=r"found the shape \(\)"):
        gini(3.0)


# ----------------------------------------------------------------------------------------------------- statistics


def test_statistics_are_means_over_samples() -> None:
    found = store()
    table = map_statistics(found, progress=False, seed=3)
    assert table["key"].tolist() == list(KEYS)
    assert table["samples"].tolist() == [8, 7, 8]
    assert table["missing"].tolist() == [0, 1, 0]
    assert table["all_zero"].tolist() == [0, 1, 0]
    for row in table.to_dict("records"):
        maps = np.abs([each.ravel() for each in found.arrays[row["key"]][found.ok] if np.isfinite(each).all()]).astype(
            float
        )
        ginis = [float(gini(each)) for each in maps]
        assert row["gini"] == pytest.approx(np.nanmean(ginis), rel=1e-12)
        assert (row["low"], row["high"]) == bootstrap_interval(ginis, seed=3)
        assert row["zero_share"] == pytest.approx(np.mean(maps == 0), rel=1e-12)
        tied = [(stats.rankdata(each, "min") != stats.rankdata(each, "max")).mean() for each in maps]
        assert row["tied_share"] == pytest.approx(np.mean(tied), rel=1e-12)
    assert table["zero_share"].tolist() == pytest.approx([0, (0.6 * 6 + 1) / 7, 0.3 * 3 / 5], abs=0.07)
    assert table["tied_share"][2] > 0.4  # two of five lines are equal


def test_by_sample_says_which() -> None:
    found = store()
    table = map_statistics_by_sample(found, "neuron_mct@0.9", progress=False)
    assert table["sample"].tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert table["id"].tolist() == [f"photo-{row}.jpg" for row in table["sample"]]
    assert table.set_index("sample")["zero_share"][4] == 1
    assert table["gini"].isna().tolist() == [False, False, True, False, False, False, False]
    for sample, value in zip(table["sample"], table["gini"], strict=True):
        np.testing.assert_allclose(value, gini(found.arrays["neuron_mct@0.9"][sample].ravel()), rtol=1e-12)
    given = map_statistics(found, "neuron_mct@0.9", table, progress=False)
    pd.testing.assert_frame_equal(given, map_statistics(found, "neuron_mct@0.9", progress=False))


@pytest.mark.parametrize("block_bytes", [1, 40 * 35 * 2, 40 * 35 * 2 * 3])
def test_samples_are_read_in_blocks_that_change_nothing(block_bytes: int) -> None:
    found = store()
    whole = map_statistics_by_sample(found, progress=False), map_differences(found, "gradient", progress=False)
    assert max(found.read) == 9
    found.read.clear()
    parts = map_statistics_by_sample(found, block_bytes=block_bytes, progress=False)
    assert max(found.read) == max(1, block_bytes // (40 * 35))
    found.read.clear()
    differences = map_differences(found, "gradient", block_bytes=block_bytes, progress=False)
    assert max(found.read) == max(1, block_bytes // (40 * 35 * 2))
    pd.testing.assert_frame_equal(parts, whole[0], check_exact=True)
    pd.testing.assert_frame_equal(differences, whole[1], check_exact=True)


def test_a_method_without_any_map() -> None:
    found = store()
    found.arrays["neuron_mct@0.9"][:] = np.nan
    table = map_statistics(found, progress=False).set_index("key")
    assert table.loc["neuron_mct@0.9", ["samples", "missing"]].tolist() == [0, 8]
    assert table.loc["neuron_mct@0.9", ["gini", "low", "zero_share", "tied_share"]].isna().all()
    row = map_differences(found, "gradient", "neuron_mct@0.9", progress=False).iloc[0]
    assert (row["samples"], row["correlated"]) == (0, 0)
    assert row[["difference", "low", "p", "p_holm", "spearman", "spearman_low"]].isna().all()


# ---------------------------------------------------------------------------------------------------- differences


def test_differences_are_paired() -> None:
    found = store()
    table = map_differences(found, "gradient", seed=5, progress=False).set_index("second")
    assert table.index.tolist() == list(KEYS[1:])
    for key, rows in ((KEYS[1], [0, 1, 5, 6, 7, 8]), (KEYS[2], [0, 1, 3, 4, 5, 6, 7, 8])):
        row = table.loc[key]
        one, two = (np.abs(found.arrays[each][rows].reshape(len(rows), -1)).astype(float) for each in ("gradient", key))
        both = gini(one), gini(two)
        assert row["samples"] == row["correlated"] == len(rows)
        assert row["gini_first"] == pytest.approx(both[0].mean(), rel=1e-12)
        assert row["gini_second"] == pytest.approx(both[1].mean(), rel=1e-12)
        assert row["difference"] == pytest.approx((both[0] - both[1]).mean(), rel=1e-9)
        assert (row["low"], row["high"]) == pytest.approx(bootstrap_interval(both[0] - both[1], seed=5), rel=1e-9)
        signs = np.array(list(itertools.product([1, -1], repeat=len(rows))))
        swapped = np.abs((signs * (both[0] - both[1])).mean(axis=1))
        assert row["p"] == pytest.approx((swapped >= abs(row["difference"]) - 1e-12).mean(), rel=1e-9)
        correlations = [stats.spearmanr(a, b).statistic for a, b in zip(one, two, strict=True)]
        assert row["spearman"] == pytest.approx(np.mean(correlations), rel=1e-9)
        interval = bootstrap_interval(correlations, seed=5)
        assert (row["spearman_low"], row["spearman_high"]) == pytest.approx(interval, abs=0.01)  # BCa counts ties
    p = table["p"].to_numpy()
    assert table["p_holm"].tolist() == pytest.approx(
        np.minimum(1, [max(2 * p.min(), p[i] * (1 + (p[i] == p.min()))) for i in (0, 1)])
    )


def test_only_other_maps_of_one_shape_are_compared() -> None:
    found = store()
    all_keys = map_differences(found, "gradient", KEYS, progress=False)
    assert all_keys["second"].tolist() == list(KEYS[1:])
    with pytest.raises(InputError, match="expected another map than gradient"):
        map_differences(found, "gradient", "gradient", progress=False)
    found.arrays["neuron_mct@0.9"] = sparse_maps(9, 4, 7, 0.5)
    with pytest.raises(InputError, match=r"one shape .* gradient: \(5, 7\), neuron_mct@0\.9: \(4, 7\)"):
        map_differences(found, "gradient", "neuron_mct@0.9", progress=False)


def test_equal_maps_do_not_differ() -> None:
    maps = sparse_maps(6, 4, 4, 0.2)
    maps[5] = 2.0  # constant: no correlation, a Gini index of 0
    row = map_differences(MapsInMemory({"a": maps, "b": -4 * maps}), "a", progress=False).iloc[0]
    assert row["difference"] == pytest.approx(0, abs=1e-15)
    assert row["p"] == 1
    assert (row["samples"], row["correlated"]) == (6, 5)
    assert row["spearman"] == pytest.approx(1)


def test_paired_test_by_hand_and_at_random() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.standard_normal((2, 30))
    assert paired_test(one, one) == 1
    assert paired_test(one + 5, two) == pytest.approx(2 / 10000)  # no random permutation is as extreme
    exact = [paired_test([1, 2, 3], [0, 0, 0]), paired_test([0, 0, 0], [1, 2, 3])]
    assert exact == [0.25, 0.25]
    assert paired_test(one, two, seed=1) == paired_test(one, two, seed=1)
    difference = one - two
    signs = rng.choice([1, -1], (200_000, 30))
    expected = (np.abs((signs * difference).mean(axis=1)) >= abs(difference.mean())).mean()
    assert paired_test(one, two) == pytest.approx(expected, abs=0.02)
    assert np.isnan(paired_test([1.0], [2.0]))
    for wrong in (([1, 2], [1, 2, 3]), ([1, np.nan], [1, 2]), ([[1, 2]], [[1, 2]])):
        with pytest.raises(InputError, match="expected two numbers of each sample"):
            paired_test(*wrong)
    with pytest.raises(InputError, match="at least one resample"):
        paired_test([1, 2], [2, 3], resamples=0)


def test_holm_by_hand() -> None:
    found = holm([0.01, 0.04, np.nan, 0.03])
    np.testing.assert_allclose(found, [0.03, 0.06, np.nan, 0.06])
    np.testing.assert_array_equal(holm([0.2, np.nan]), [0.2, np.nan])
    assert holm([]).shape == (0,)


# ------------------------------------------------------------------------------------------------------ bad input


def test_bad_input_says_what_there_is() -> None:
    found = store()
    with pytest.raises(StoreError, match=r"run\.h5: there is no map 'neuron_mtc@0\.9'; nearest: neuron_mct@0\.9"):
        map_statistics(found, ["neuron_mtc@0.9"])
    with pytest.raises(StoreError, match="there is no map 'grad'; nearest: gradient"):
        map_differences(found, "grad")
    with pytest.raises(StoreError, match="no attribution map to look at"):
        map_statistics(found, [])
    with pytest.raises(InputError, match="block_bytes of at least 1, found 0"):
        map_statistics(found, block_bytes=0)
    with pytest.raises(StoreError, match="no sample is ok"):
        map_statistics(MapsInMemory({"gradient": sparse_maps(2, 3, 3, 0)}, failed=(0, 1)))
