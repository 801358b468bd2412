"""Analyses of stores against naive boolean arrays, on indices with awkward sites."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from scipy import stats
from synthetic import synthetic_header, synthetic_index, synthetic_rows, synthetic_store

from fxpath.analysis import (
    bootstrap_interval,
    chance_jaccard,
    dead_by_sample,
    dead_share,
    diagnostics,
    intersection_moments,
    jaccard_moments,
    overlap,
    overlap_by_sample,
    random_active,
    shortfall,
    summary,
)
from fxpath.analysis.null import Moments
from fxpath.errors import FxpathError, InputError, SparsityError, StoreError
from fxpath.keys import PathwayKey
from fxpath.neurons import NeuronIndex
from fxpath.store import PathwayRows, Rows, open_store, write_store

ROOT = Path(__file__).parents[1]
KEYS = ("neuron_mct@0.8", "greedy_pruning@0.8", "dgr:init=r@0.8", "neuron_mct@0.9", "active")
FAILED, UNREACHED, EMPTY = 2, 4, 6  # rows; the last two of greedy_pruning and of dgr

Bools = npt.NDArray[np.bool_]


@dataclass
class Truth:
    """A small store and the boolean arrays that went into it."""

    path: Path
    index: NeuronIndex
    active: Bools
    masks: dict[str, Bools]
    live: dict[str, Bools]
    ok: Bools
    reached: dict[str, Bools]

    def sites(self) -> list[tuple[str, slice]]:
        return [("network", slice(0, self.index.size)), *((site.name, site.slice) for site in self.index.sites)]


def awkward_index(granularity: str = "unit") -> NeuronIndex:
    """Sites of 1, 15, 16, 1, 37 and 9 neurons."""
    blocks = [
        ("one.relu", "relu", (1,)),
        ("conv.relu", "relu", (3, 5)),
        ("even.relu", "relu", (16,)),
        ("gate", "relu", (1, 1, 1)),
        ("wide.relu", "relu", (37,)),
        ("fold.relu", "relu", (3, 3)),
    ]
    return NeuronIndex.build(blocks, axes=[0, 0, 0, 0, 0, 1], folds=[1, 1, 1, 1, 1, 3], granularity=granularity)  # type: ignore[arg-type]


def make(path: Path, *, n: int = 9, seed: int = 0, live: bool = True, granularity: str = "unit") -> Truth:
    """A store in which a sample failed, a pathway was not reached, and another one is empty."""
    index = awkward_index(granularity)
    rng = np.random.default_rng(seed)
    ok = np.arange(n) != FAILED
    active = (rng.random((n, index.size)) < rng.random((n, 1))) & ok[:, None]
    active[1, index.sites[2].slice] = False  # a site without an active neuron
    masks, lives, reached, pathways = {}, {}, {}, {}
    for key in KEYS:
        parsed = PathwayKey.parse(key)
        mask = active.copy()
        if key != "active":
            mask = rng.random((n, index.size)) < (0.5 if parsed.selector == "greedy_pruning" else 0.3)
            mask &= active | (parsed.selector != "neuron_mct")
        reached[key] = ok.copy()
        if parsed.selector == "greedy_pruning":
            reached[key][UNREACHED] = False
        mask[~reached[key]] = False
        if parsed.selector == "dgr":
            mask[EMPTY] = False
        masks[key] = mask
        lives[key] = mask & ~active & (rng.random(mask.shape) < 0.5)
        packed = index.pack(mask)
        columns = {
            "mask": packed,
            "density": np.where(reached[key], mask.mean(axis=1), np.nan),
            "response": np.where(reached[key], 2.0 + np.arange(n), np.nan),
            "dropped_response": np.where(reached[key], -1.0, np.nan),
            "same_class": reached[key] & (np.arange(n) % 2 == 0),
            "missing": ["" if found else "stalled" for found in reached[key]],
        }
        if live:
            columns["live"] = index.count_by_site(index.pack(lives[key])).astype(np.uint32)
        pathways[key] = PathwayRows(parsed.selector, {"steps": 50, **parsed.parameters}, parsed.sparsity, columns)
    samples = {
        "id": [f"s{row}" for row in range(n)],
        "label": np.zeros(n, dtype=np.int64),
        "target": np.zeros(n, dtype=np.int64),
        "response": np.where(ok, np.arange(n) - 3.0, np.nan).astype(np.float32),  # 0 for row 3
        "probability": np.full(n, 0.5, dtype=np.float32),
        "status": ["ok" if fine else "not an image" for fine in ok],
    }
    write_store(path, synthetic_header(index), Rows(samples, index.pack(active), pathways))
    return Truth(path, index, active, masks, lives, ok, reached)


@pytest.fixture(scope="module", params=["unit", "channel"])
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return make(tmp_path_factory.mktemp("analysis") / "run.h5", granularity=request.param)


def divided(part: float, whole: float) -> float:
    return part / whole if whole else np.nan


def naive_dead(truth: Truth, key: str, site: slice) -> dict[str, list[float]]:
    """Every per-sample number of a key and site, sample after sample."""
    found: dict[str, list[float]] = {name: [] for name in ("kept", "dead", "density", "base", "share", "on", "still")}
    for row in np.flatnonzero(truth.reached[key]):
        mask, dead = truth.masks[key][row, site], ~truth.active[row, site]
        on = (truth.live[key][row, site] & mask & dead).sum()
        found["kept"].append(mask.sum())
        found["dead"].append((mask & dead).sum())
        found["density"].append(mask.mean())
        found["base"].append(dead.mean())
        found["share"].append(divided((mask & dead).sum(), mask.sum()))
        found["on"].append(divided(on, mask.sum()))
        found["still"].append(divided((mask & dead).sum() - on, mask.sum()))
    return found


# ------------------------------------------------------------------------------------------------------ dead share


@pytest.mark.parametrize("block_bytes", [1, 40, 16 << 20])
def test_dead_share_equals_boolean_arrays(truth: Truth, block_bytes: int) -> None:
    with open_store(truth.path) as store:
        table = dead_share(store, block_bytes=block_bytes)
    assert len(table) == len(KEYS) * (1 + len(truth.index))
    assert list(dict.fromkeys(table["key"])) == list(KEYS)
    for key in KEYS:
        part = table[table["key"] == key]
        assert part["site_number"].tolist() == list(range(-1, len(truth.index)))
        for (name, site), (_, row) in zip(truth.sites(), part.iterrows(), strict=True):
            expected = naive_dead(truth, key, site)
            assert row["site"] == name
            assert row["neurons"] == site.stop - site.start
            assert row["samples"] == np.count_nonzero(~np.isnan(expected["share"]))
            for column, wanted in (
                ("kept", "kept"),
                ("density", "density"),
                ("base_rate", "base"),
                ("dead_share", "share"),
                ("switched_on_share", "on"),
                ("still_dead_share", "still"),
            ):
                values = np.array(expected[wanted], dtype=float)
                mean = values[~np.isnan(values)].mean() if not np.isnan(values).all() else np.nan
                np.testing.assert_allclose(row[column], mean, rtol=1e-12, err_msg=f"{key} {name} {column}")


def test_dead_share_leaves_failed_unreached_and_empty_out(truth: Truth) -> None:
    with open_store(truth.path) as store:
        network = dead_share(store)[lambda table: table["site_number"] < 0].set_index("key")
    assert network["samples"].tolist() == [8, 7, 7, 8, 8]  # of 9: one failed; greedy stalled once; one dgr is empty
    assert network.loc["active", "dead_share"] == 0
    assert network.loc["neuron_mct@0.8", "dead_share"] == 0
    assert network.loc["greedy_pruning@0.8", "dead_share"] > 0.1
    split = network["switched_on_share"] + network["still_dead_share"]
    np.testing.assert_allclose(split, network["dead_share"], atol=1e-15)
    np.testing.assert_array_equal(network["sparsity"], [0.8, 0.8, 0.8, 0.9, np.nan])


def test_dead_by_sample_equals_boolean_arrays(truth: Truth) -> None:
    with open_store(truth.path) as store:
        table = dead_by_sample(store, by_site=True, block_bytes=30)
        network = dead_by_sample(store, "greedy_pruning@0.8")
    for key in KEYS:
        for number, (_, site) in enumerate(truth.sites(), start=-1):
            part = table[(table["key"] == key) & (table["site_number"] == number)]
            expected = naive_dead(truth, key, site)
            assert part["sample"].tolist() == np.flatnonzero(truth.reached[key]).tolist()
            assert part["id"].tolist() == [f"s{row}" for row in np.flatnonzero(truth.reached[key])]
            assert part["kept"].tolist() == expected["kept"]
            assert part["dead"].tolist() == expected["dead"]
            np.testing.assert_array_equal(part["dead_share"], expected["share"])
            np.testing.assert_array_equal(part["still_dead_share"], expected["still"])
            np.testing.assert_allclose(part["base_rate"], expected["base"], rtol=1e-15)
    pd.testing.assert_frame_equal(
        network,
        table[(table["key"] == "greedy_pruning@0.8") & (table["site_number"] < 0)].reset_index(drop=True),
    )


def test_interval_is_the_bootstrap_of_the_samples(truth: Truth) -> None:
    with open_store(truth.path) as store:
        table = dead_share(store, "greedy_pruning@0.8", seed=3)
        values = dead_by_sample(store, "greedy_pruning@0.8")["dead_share"]
    assert (table["low"][0], table["high"][0]) == bootstrap_interval(values, seed=3)
    assert table["low"][0] < table["dead_share"][0] < table["high"][0]
    assert table["low"][1:].isna().all()


def test_without_live_the_split_is_missing(tmp_path: Path) -> None:
    truth = make(tmp_path / "run.h5", live=False)
    with open_store(truth.path) as store:
        table = dead_share(store, "greedy_pruning@0.8")
    expected = naive_dead(truth, "greedy_pruning@0.8", slice(0, truth.index.size))
    assert table["dead_share"][0] == pytest.approx(np.mean(expected["share"]), rel=1e-12)
    assert table["switched_on_share"].isna().all()
    assert table["still_dead_share"].isna().all()


def test_live_that_does_not_belong_to_the_mask_is_refused(tmp_path: Path) -> None:
    index = synthetic_index()
    rows = synthetic_rows(index, 3)
    rows.pathways["neuron_mct@0.9"].columns["live"][1, 2] = 5  # type: ignore[index]
    write_store(tmp_path / "run.h5", synthetic_header(index), rows)
    with open_store(tmp_path / "run.h5") as store, pytest.raises(StoreError, match=r"run\.h5: neuron_mct@0\.9 counts"):
        dead_share(store)


# --------------------------------------------------------------------------------------------------------- overlap


def jaccard_of(first: Bools, second: Bools) -> float:
    return divided((first & second).sum(), (first | second).sum())


@pytest.mark.parametrize("block_bytes", [1, 200, 16 << 20])
def test_overlap_equals_boolean_arrays(truth: Truth, block_bytes: int) -> None:
    with open_store(truth.path) as store:
        table = overlap(store, block_bytes=block_bytes)
    pairs = [(one, two) for one, two in combinations(KEYS, 2) if one[-4:] == two[-4:] or two == "active"]
    assert list(dict.fromkeys(zip(table["first"], table["second"], strict=True))) == pairs
    for one, two in pairs:
        part = table[(table["first"] == one) & (table["second"] == two)]
        for (name, site), (_, row) in zip(truth.sites(), part.iterrows(), strict=True):
            use = np.flatnonzero(truth.reached[one] & truth.reached[two])
            found = np.array([jaccard_of(truth.masks[one][r, site], truth.masks[two][r, site]) for r in use])
            a, b = truth.masks[one][use, site].mean(axis=1), truth.masks[two][use, site].mean(axis=1)
            chance = np.array([divided(p * q, p + q - p * q) for p, q in zip(a, b, strict=True)])
            assert row["site"] == name
            assert row["sparsity"] == float(one[-3:])
            assert row["samples"] == np.count_nonzero(~np.isnan(found))
            for column, values in (
                ("jaccard", found),
                ("chance", chance),
                ("density_first", a),
                ("density_second", b),
            ):
                mean = values[~np.isnan(values)].mean() if not np.isnan(values).all() else np.nan
                np.testing.assert_allclose(row[column], mean, rtol=1e-12, err_msg=f"{one} {two} {name} {column}")


def test_overlap_of_unreached_is_missing_and_of_empty_is_zero(truth: Truth) -> None:
    with open_store(truth.path) as store:
        table = overlap_by_sample(store, ["greedy_pruning@0.8", "dgr:init=r@0.8"])
    assert table["sample"].tolist() == [row for row in range(9) if row not in (FAILED, UNREACHED)]
    assert table.set_index("sample")["jaccard"][EMPTY] == 0  # empty against something
    with open_store(truth.path) as store:
        sites = overlap_by_sample(store, ["greedy_pruning@0.8", "dgr:init=r@0.8"], by_site=True)
    both_empty = sites["union"] == 0
    assert both_empty.any()
    assert (sites["jaccard"].isna() == both_empty).all()


def test_overlap_by_sample_gives_mean_null_and_z(truth: Truth) -> None:
    with open_store(truth.path) as store:
        rows = overlap_by_sample(store, ["greedy_pruning@0.8", "neuron_mct@0.9"], by_site=True, block_bytes=1)
        table = overlap(store, ["greedy_pruning@0.8", "neuron_mct@0.9"])
    assert table["sparsity"].isna().all()  # given by name, pairs may differ in sparsity
    for _, row in table.iterrows():
        part = rows[rows["site_number"] == row["site_number"]]
        both = part[part["jaccard"].notna() & part["null_mean"].notna()]
        assert row["samples"] == part["jaccard"].notna().sum()
        assert row["null_samples"] == len(both)
        np.testing.assert_allclose(row["jaccard"], part["jaccard"].mean(), rtol=1e-12)
        np.testing.assert_allclose(row["null_mean"], both["null_mean"].mean(), rtol=1e-12)
        sd = np.sqrt((both["null_sd"] ** 2).sum()) / len(both)
        np.testing.assert_allclose(row["null_sd"], sd, rtol=1e-9, atol=1e-15)
        if sd > 0:
            np.testing.assert_allclose(row["z"], (both["jaccard"].mean() - both["null_mean"].mean()) / sd, rtol=1e-9)
        else:
            assert np.isnan(row["z"])
    assert (table["low"][0], table["high"][0]) == bootstrap_interval(rows[rows["site_number"] < 0]["jaccard"])


def test_overlap_with_active_has_no_z(truth: Truth) -> None:
    with open_store(truth.path) as store:
        table = overlap(store, ["neuron_mct@0.8", "active"])
    assert table["z"].isna().all()  # a part of the active neurons overlaps all of them by its size alone
    np.testing.assert_allclose(table["jaccard"], table["null_mean"], rtol=1e-12)
    assert (table["short"] == 0).all()


def test_sparsity_leaves_its_pairs_and_active(truth: Truth) -> None:
    with open_store(truth.path) as store:
        table = overlap(store, sparsity="0.9")
        everything = overlap(store)
    assert set(zip(table["first"], table["second"], strict=True)) == {("neuron_mct@0.9", "active")}
    expected = everything[(everything["first"] == "neuron_mct@0.9") & (everything["second"] == "active")]
    pd.testing.assert_frame_equal(table, expected.reset_index(drop=True))


def test_chance_is_what_random_sets_share() -> None:
    assert chance_jaccard(0.1, 0.1) == pytest.approx(0.1 / 1.9)
    assert np.isnan(chance_jaccard(0.0, 0.0))
    assert chance_jaccard(0.0, 0.4) == 0
    rng = np.random.default_rng(0)
    a, b = rng.random(2_000_000) < 0.2, rng.random(2_000_000) < 0.6
    assert chance_jaccard(0.2, 0.6) == pytest.approx(jaccard_of(a, b), abs=2e-3)


# ------------------------------------------------------------------------------------------------------------ null


def test_intersection_moments_are_the_hypergeometric_ones() -> None:
    cases = np.array([(a, b, m) for m in (1, 2, 7, 40) for a in range(0, m + 1, 3) for b in range(0, m + 1, 2)])
    moments = intersection_moments(*cases.T)
    values = np.arange(41)
    laws = [stats.hypergeom.pmf(values, m, a, b) for a, b, m in cases]
    means = np.array([(law * values).sum() for law in laws])
    variances = [(law * (values - mean) ** 2).sum() for law, mean in zip(laws, means, strict=True)]
    np.testing.assert_allclose(moments.mean, means, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(moments.variance, variances, rtol=1e-10, atol=1e-11)
    large = intersection_moments(np.array([10**7]), np.array([2 * 10**7]), np.array([10**8]))
    assert large.mean[0] == 2e6
    assert large.variance[0] == pytest.approx(1_440_000.0144, rel=1e-9)
    nothing = intersection_moments(np.array([0]), np.array([0]), np.array([0]))
    assert (nothing.mean[0], nothing.variance[0]) == (0, 0)


def test_jaccard_moments_against_the_exact_law() -> None:
    for a, b, m in ((20, 30, 60), (5, 40, 50), (12, 12, 200)):
        law = stats.hypergeom(m, a, b)
        values = np.arange(min(a, b) + 1)
        jaccard, weights = values / (a + b - values), law.pmf(values)
        mean = (jaccard * weights).sum()
        sd = np.sqrt((jaccard**2 * weights).sum() - mean**2)
        found = jaccard_moments(np.array([a + b]), Moments(np.array([law.mean()]), np.array([law.var()])))
        assert found.mean[0] == pytest.approx(mean, abs=0.02 * sd)
        assert np.sqrt(found.variance[0]) == pytest.approx(sd, rel=0.06)
        first_order = law.mean() / (a + b - law.mean())
        assert abs(found.mean[0] - mean) < 0.5 * abs(first_order - mean)
    tiny = jaccard_moments(np.array([4]), intersection_moments(np.array([2]), np.array([2]), np.array([10])))
    slope, bend, spread = 4 / 3.6**2, 8 / 3.6**3, 0.4 * 64 / 90  # by hand: mu 0.4, union 3.6
    assert tiny.mean[0] == pytest.approx(0.4 / 3.6 + bend * spread / 2, rel=1e-12)
    assert tiny.variance[0] == pytest.approx(slope**2 * spread + bend**2 * spread**2 / 2, rel=1e-12)
    exact = np.sqrt(16 / 45 / 9 + 1 / 45 - (16 / 45 / 3 + 1 / 45) ** 2)
    assert 1 - np.sqrt(tiny.variance[0]) / exact == pytest.approx(0.18, abs=0.005)  # as the docstring says
    empty = jaccard_moments(np.array([0]), Moments(np.array([0.0]), np.array([0.0])))
    assert np.isnan(empty.mean[0])
    assert np.isnan(empty.variance[0])


def test_null_moments_against_draws(tmp_path: Path) -> None:
    keys = ("neuron_mct@0.8", "greedy_pruning@0.8")
    synthetic_store(tmp_path / "run.h5", 3, keys)
    draws = 400
    with open_store(tmp_path / "run.h5") as store:
        table = overlap_by_sample(store, keys, by_site=True)
        for sample in range(3):
            first, second = (
                np.array([random_active(store, key, sample, seed) for seed in range(draws)]) for key in keys
            )
            shared = store.index.count_by_site(first & second)
            total = store.index.count_by_site(first) + store.index.count_by_site(second)
            assert (total == total[0]).all()
            part = table[table["sample"] == sample].set_index("site_number")
            counts = {-1: (shared.sum(axis=1), total[0].sum())}
            counts |= {site: (shared[:, site], total[0, site]) for site in range(len(store.index))}
            active = store.index.count_by_site(store.active(slice(sample, sample + 1)))[0]
            sizes = [store.index.count_by_site(drawn[:1])[0] for drawn in (first, second)]
            exact = intersection_moments(*sizes, active)
            error = np.sqrt(exact.variance / draws)
            assert (np.abs(shared.mean(axis=0) - exact.mean) < 4 * error).all()
            np.testing.assert_allclose(shared.var(axis=0), exact.variance, rtol=0.35)
            for site, (inside, size) in counts.items():
                jaccard = inside / (size - inside)
                mean, sd = part.loc[site, "null_mean"], part.loc[site, "null_sd"]
                assert abs(jaccard.mean() - mean) < 4 * sd / np.sqrt(draws) + 0.02 * sd
                assert sd == pytest.approx(jaccard.std(), rel=0.2)


def test_z_of_random_active_pathways_is_standard_normal(tmp_path: Path) -> None:
    index = awkward_index()
    rng = np.random.default_rng(5)
    n, count = 25, 40
    active = rng.random((n, index.size)) < 0.6
    masks = {}
    for seed in range(count):
        mask = np.zeros_like(active)
        for row, site in ((row, site) for row in range(n) for site in index.sites):
            alive = site.start + np.flatnonzero(active[row, site.slice])
            mask[row, rng.choice(alive, len(alive) // 2, replace=False)] = True
        masks[f"random:seed={seed}@0.5"] = mask
    rows = synthetic_rows(index, n, list(masks))
    pathways = {
        key: PathwayRows(old.selector, old.parameters, old.sparsity, {"mask": index.pack(masks[key])})
        for key, old in rows.pathways.items()
    }
    write_store(tmp_path / "run.h5", synthetic_header(index), Rows(rows.samples, index.pack(active), pathways))
    with open_store(tmp_path / "run.h5") as store:
        keys = list(masks)
        z = [overlap(store, keys[place : place + 2])["z"][0] for place in range(0, count, 2)]
    assert abs(np.mean(z)) < 0.8  # 3.6 standard errors of 20 independent pairs
    assert 0.6 < np.std(z) < 1.45


def test_random_active_matches_sizes_within_the_active_neurons(truth: Truth) -> None:
    with open_store(truth.path) as store:
        for key in ("greedy_pruning@0.8", "neuron_mct@0.8"):
            for sample in (0, 1, 7):
                drawn = random_active(store, key, sample, seed=4)
                assert drawn.shape == (store.index.nbytes,)
                assert not (drawn & ~store.active(slice(sample, sample + 1))[0]).any()
                for number, site in enumerate(store.index.sites):
                    kept = int(truth.masks[key][sample, site.slice].sum())
                    alive = int(truth.active[sample, site.slice].sum())
                    found = int(store.index.unpack_site(site, drawn[site.bytes]).sum())
                    assert found == min(kept, alive)
                    assert shortfall(store, key, sample)[number] == max(kept - alive, 0)
        table = overlap(store, ["greedy_pruning@0.8", "neuron_mct@0.8"])
        use = [row for row in range(9) if row not in (FAILED, UNREACHED)]
        short = [shortfall(store, "greedy_pruning@0.8", row).sum() for row in use]
    assert sum(short) > 0
    assert table["short"][0] == pytest.approx(np.mean(short))


def test_random_active_depends_on_seed_id_and_key_alone(tmp_path: Path) -> None:
    keys = ("neuron_mct@0.9", "random@0.9", "active")
    rows = synthetic_rows(synthetic_index(), 5, keys)
    backwards = Rows(
        {
            name: list(values)[::-1] if isinstance(values, list) else values[::-1]
            for name, values in rows.samples.items()
        },
        rows.active[::-1],
        {
            "active": PathwayRows("active", {}, None, {"mask": rows.active[::-1]}),
            "neuron_mct@0.9": PathwayRows(
                "neuron_mct", {}, 0.9, {"mask": rows.pathways["neuron_mct@0.9"].columns["mask"][::-1]}
            ),
        },
    )
    write_store(tmp_path / "a.h5", synthetic_header(synthetic_index()), rows)
    write_store(tmp_path / "b.h5", synthetic_header(synthetic_index()), backwards)
    with open_store(tmp_path / "a.h5") as one, open_store(tmp_path / "b.h5") as two:
        for name in one.ids.tolist():
            drawn = random_active(one, "neuron_mct@0.9", name, seed=1)
            np.testing.assert_array_equal(drawn, random_active(two, "neuron_mct@0.9", name, seed=1))
            np.testing.assert_array_equal(drawn, random_active(one, "neuron_mct@0.9", one.row(name), seed=1))
            assert (drawn != random_active(one, "neuron_mct@0.9", name, seed=2)).any()
            assert (drawn != random_active(one, "random@0.9", name, seed=1)).any()
            np.testing.assert_array_equal(
                random_active(one, "active", name), one.active(slice(one.row(name), one.row(name) + 1))[0]
            )


# ------------------------------------------------------------------------------------------- intervals and summary


def test_bootstrap_interval_is_scipys() -> None:
    values = np.random.default_rng(0).exponential(size=40)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="BCa", random_state=np.random.default_rng(7)
    ).confidence_interval
    assert bootstrap_interval(values, seed=7) == (expected.low, expected.high)
    assert bootstrap_interval([*values, np.nan], seed=7) == (expected.low, expected.high)
    wide = bootstrap_interval(values, confidence=0.99, seed=7)
    assert wide[0] < expected.low < values.mean() < expected.high < wide[1]


def test_bootstrap_interval_where_bca_has_no_answer() -> None:
    assert bootstrap_interval([0.25, 0.25, np.nan, 0.25]) == (0.25, 0.25)
    assert np.isnan(bootstrap_interval([0.5])).all()
    assert np.isnan(bootstrap_interval([])).all()
    assert np.isnan(bootstrap_interval([np.nan, np.nan])).all()
    low, high = bootstrap_interval([0.0] * 30 + [1e-300])  # so small that BCa's skewness is 0/0
    assert 0 <= low <= high <= 1e-300
    many = np.random.default_rng(1).normal(size=4000)
    low, high = bootstrap_interval(many)
    assert low == pytest.approx(many.mean() - 1.96 * many.std() / np.sqrt(4000), abs=0.004)
    assert high == pytest.approx(many.mean() + 1.96 * many.std() / np.sqrt(4000), abs=0.004)
    for wrong in ({"confidence": 1.0}, {"resamples": 0}):
        with pytest.raises(InputError, match=r"expected a confidence in \(0, 1\)"):
            bootstrap_interval([1.0, 2.0], **wrong)  # type: ignore[arg-type]


def test_bootstrap_interval_covers_the_mean() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.exponential(size=40), resamples=400)
        hits += low <= 1 <= high
    assert 0.87 <= hits / 200 <= 0.98


def test_summary(truth: Truth) -> None:
    with open_store(truth.path) as store:
        table = summary(store).set_index("key")
        network = dead_share(store)[lambda rows: rows["site_number"] < 0].set_index("key")
    assert table.index.tolist() == list(KEYS)
    assert table["samples"].tolist() == [8, 7, 8, 8, 8]
    assert table["missing"].tolist() == [0, 1, 0, 0, 0]
    assert table.loc["dgr:init=r@0.8", "parameters"] == '{"init": "r", "steps": 50}'
    for column in ("density", "kept", "dead_share", "still_dead_share", "base_rate", "low", "high"):
        np.testing.assert_array_equal(table[column], network[column])
    for key in KEYS:
        rows = np.array([row for row in np.flatnonzero(truth.reached[key]) if row != 3])  # response 0: no share
        assert table.loc[key, "response_share"] == pytest.approx(np.mean((2.0 + rows) / (rows - 3.0)))
        assert table.loc[key, "dropped_share"] == pytest.approx(np.mean(-1.0 / (rows - 3.0)))
        assert table.loc[key, "class_kept"] == pytest.approx(np.mean(np.flatnonzero(truth.reached[key]) % 2 == 0))


def test_summary_of_masks_alone(tmp_path: Path) -> None:
    index = synthetic_index()
    rows = synthetic_rows(index, 3, ["neuron_mct@0.9"])
    bare = PathwayRows("neuron_mct", {}, 0.9, {"mask": rows.pathways["neuron_mct@0.9"].columns["mask"]})
    write_store(tmp_path / "run.h5", synthetic_header(index), Rows(rows.samples, rows.active, {"neuron_mct@0.9": bare}))
    with open_store(tmp_path / "run.h5") as store:
        row = summary(store).iloc[0]
    assert row["kept"] == index.kept(0.9)
    assert row["dead_share"] == 0
    assert row[["response_share", "class_kept", "dropped_share", "switched_on_share"]].isna().all()


# ------------------------------------------------------------------------------------------------ scale, bad input


def random_store(path: Path, n: int) -> None:
    """n samples of 200 000 neurons."""
    index = NeuronIndex.build([(f"site{number}.relu", "relu", (50, 800)) for number in range(5)])
    rng = np.random.default_rng(0)
    active = rng.integers(0, 256, (n, index.nbytes), dtype=np.uint8)
    pathways = {}
    for selector in ("random", "magnitude"):
        mask = rng.integers(0, 256, (n, index.nbytes), dtype=np.uint8)
        live = np.zeros((n, 5), dtype=np.uint32)
        pathways[f"{selector}@0.5"] = PathwayRows(selector, {}, 0.5, {"mask": mask, "live": live})
    samples = {
        "id": [str(number) for number in range(n)],
        "label": np.zeros(n, dtype=np.int64),
        "target": np.zeros(n, dtype=np.int64),
        "response": np.ones(n, dtype=np.float32),
        "probability": np.ones(n, dtype=np.float32),
        "status": ["ok"] * n,
    }
    write_store(path, synthetic_header(index), Rows(samples, active, pathways))


def peak(path: Path, of: str) -> int:
    block = 4 * 25_000
    with open_store(path) as store:
        tracemalloc.start()
        try:
            {"dead": dead_share, "overlap": overlap}[of](store, block_bytes=block)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


def test_memory_does_not_grow_with_samples(tmp_path: Path) -> None:
    random_store(tmp_path / "few.h5", 20)
    random_store(tmp_path / "many.h5", 200)  # 4.5 MB more of every pathway
    for of in ("dead", "overlap"):
        peak(tmp_path / "few.h5", of)  # what is imported now does not count
        few = peak(tmp_path / "few.h5", of)
        assert peak(tmp_path / "many.h5", of) < few + 1_500_000  # the bootstrap's batches fill up to about 1 MB


def test_bad_input_names_the_file_and_a_way_out(tmp_path: Path) -> None:
    synthetic_store(tmp_path / "run.h5", 3, failed=[1])
    with open_store(tmp_path / "run.h5") as store:
        for call in (dead_share, dead_by_sample, overlap, overlap_by_sample):
            with pytest.raises(StoreError, match=r"run\.h5.*no pathway 'neuron_mtc@0\.9'; nearest: neuron_mct@0\.9"):
                call(store, ["neuron_mtc@0.9", "active"])
            with pytest.raises(InputError, match="block_bytes of at least 1, found 0"):
                call(store, block_bytes=0)
        with pytest.raises(StoreError, match=r"no pathway to analyse; the store holds neuron_mct@0\.9"):
            dead_share(store, [])
        with pytest.raises(
            SparsityError, match=r"run\.h5: no pathway has sparsity 0\.95; nearest: 0\.99 \(all: 0\.9, 0\.99"
        ):
            overlap(store, sparsity=0.95)
        with pytest.raises(SparsityError, match=r"expected a share in \[0, 1\)"):
            overlap(store, sparsity=9)
        for keys in ("active", ["active", "active"]):
            with pytest.raises(
                InputError, match=r"at least two pathways of one sparsity to compare, found active in .*run\.h5"
            ):
                overlap(store, keys)
        with pytest.raises(StoreError, match=r"sample 'photo-0001\.jpg' failed"):
            random_active(store, "active", 1)
        with pytest.raises(InputError, match="a seed of at least 0, found -1"):
            random_active(store, "active", 0, seed=-1)
        with pytest.raises(InputError, match="more neurons are drawn than are active"):
            intersection_moments(np.array([3]), np.array([1]), np.array([2]))
    with (
        open_store(make(tmp_path / "b.h5").path) as store,
        pytest.raises(StoreError, match="was not reached for sample"),
    ):
        shortfall(store, "greedy_pruning@0.8", UNREACHED)


def test_a_store_without_usable_samples_or_pathways(tmp_path: Path) -> None:
    synthetic_store(tmp_path / "failed.h5", 3, failed=[0, 1, 2])
    with open_store(tmp_path / "failed.h5") as store:
        for call in (dead_share, overlap, summary):
            with pytest.raises(StoreError, match=r"no sample of .*failed\.h5 is ok \(3 × not an image\)"):
                call(store)
    synthetic_store(tmp_path / "none.h5", 2, [])
    with open_store(tmp_path / "none.h5") as store:
        for refused in (dead_share, dead_by_sample, summary, overlap):
            with pytest.raises(FxpathError, match=r"none\.h5"):
                refused(store)


def test_a_pathway_that_no_sample_reached(tmp_path: Path) -> None:
    index = synthetic_index()
    rows = synthetic_rows(index, 3, ["neuron_mct@0.9"])
    nothing = {"mask": np.zeros_like(rows.active), "missing": ["stalled"] * 3}
    pathways = {**rows.pathways, "greedy_pruning@0.9": PathwayRows("greedy_pruning", {}, 0.9, nothing)}
    write_store(tmp_path / "run.h5", synthetic_header(index), Rows(rows.samples, rows.active, pathways))
    with open_store(tmp_path / "run.h5") as store:
        dead = dead_share(store).set_index(["key", "site_number"]).loc[("greedy_pruning@0.9", -1)]
        both = overlap(store)
        assert len(dead_by_sample(store, "greedy_pruning@0.9")) == 0
        assert len(overlap_by_sample(store)) == 0
        row = summary(store).set_index("key").loc["greedy_pruning@0.9"]
    assert dead["samples"] == 0
    assert np.isnan(dead[["kept", "density", "dead_share", "base_rate", "low"]].astype(float)).all()
    assert (both["samples"] == 0).all()
    assert both[["jaccard", "null_mean", "z"]].isna().all().all()
    assert (row["samples"], row["missing"]) == (0, 3)


def test_analysis_imports_neither_torch_nor_what_is_slow() -> None:
    code = "import sys, fxpath.store, fxpath.analysis; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = {"torch", "torchvision", "pandas", "scipy", "scipy.stats", "numba", "matplotlib"} & set(loaded.split())
    assert found == set()
    assert "fxpath.analysis.null" in loaded.split()


# --- the null of dead shares ---


def test_dead_share_against_random_neurons(tmp_path: Path) -> None:
    """Drawn many times: the mean and spread of the dead share of as many random neurons of each site."""
    index = synthetic_index()
    rows = synthetic_rows(index, 3, ["random@0.8"])
    path = tmp_path / "run.h5"
    write_store(path, synthetic_header(index), rows)
    with open_store(path) as store:
        table = dead_share(store)
        alive = index.unpack(store.active())
        kept = index.count_by_site(store.packed("random@0.8"))
    rng = np.random.default_rng(0)
    draws = np.empty((4000, 1 + len(index.sites)))
    for number in range(len(draws)):
        shares = []
        for sample in range(3):
            dead = [
                int((~rng.permutation(alive[sample, site.slice])[:own]).sum())
                for site, own in zip(index.sites, kept[sample], strict=True)
            ]
            with np.errstate(invalid="ignore"):
                shares.append(np.array([sum(dead), *dead]) / np.array([kept[sample].sum(), *kept[sample]]))
        draws[number] = np.nanmean(shares, axis=0)
    errors = draws.std(axis=0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - table["null_mean"]) < 5 * errors + 1e-12).all()
    np.testing.assert_allclose(table["null_sd"], draws.std(axis=0), rtol=0.1, atol=1e-12)
    z = (table["dead_share"] - table["null_mean"]) / table["null_sd"]
    known = table["null_sd"] > 0
    np.testing.assert_allclose(table["z"][known], z[known])
    assert table["z"][~known].isna().all()


# --- diagnostics ---


def test_diagnostics_are_means_over_samples(tmp_path: Path) -> None:
    index = synthetic_index()
    rows = synthetic_rows(index, 5, ["neuron_mct@0.9"], failed=[1])
    nan = np.nan
    by_site = np.full((5, len(index.sites)), 2.0)
    by_site[2] = np.nan
    by_site[3, 1:] = np.nan
    by_site[3, 0] = 6.0
    rows.pathways["neuron_mct@0.9"].columns.update(
        {
            "diagnostics/level": np.array([1.0, 7.0, nan, 3.0, 8.0]),  # the second sample failed
            "diagnostics/iterate": np.array([10, 0, -1, 30, 50], dtype=np.int32),
            "diagnostics/kept": np.array([True, False, False, True, True]),
            "diagnostics/error_by_site": by_site,
            "diagnostics/never": np.full(5, nan),
            "diagnostics/curve": np.ones((5, len(index.sites))),
        }
    )
    path = tmp_path / "run.h5"
    write_store(path, synthetic_header(index), rows)
    with open_store(path) as store:
        table = diagnostics(store).set_index("diagnostic")
        with pytest.raises(StoreError, match="neuron_mtc"):
            diagnostics(store, "neuron_mtc@0.9")
    assert set(table.index) == {
        "level",
        "iterate",
        "kept",
        "error_by_site",
        "never",
        "completeness",
    }  # no curve, no text
    assert set(table["key"]) == {"neuron_mct@0.9"}
    shown = table[["samples", "mean", "smallest", "largest"]]
    assert shown.loc["level"].tolist() == [3, 4.0, 1.0, 8.0]
    assert shown.loc["iterate"].tolist() == [3, 30.0, 10.0, 50.0]
    assert shown.loc["kept"].tolist() == [4, 0.75, 0.0, 1.0]
    assert shown.loc["error_by_site"].tolist() == [3, 10 / 3, 2.0, 6.0]
    assert shown.loc["never"].isna().tolist() == [False, True, True, True]
    assert (table.loc["level", "low"], table.loc["level", "high"]) == bootstrap_interval([1.0, 3.0, 8.0])
