"""A store read back: what was written, lazily, by names that are checked."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from processes import leftovers, run
from synthetic import KEYS, contents, same, synthetic_header, synthetic_index, synthetic_rows, synthetic_store

from fxpath.errors import SiteError, SparsityError, StoreError
from fxpath.neurons import NeuronIndex, select_largest
from fxpath.schema import CHUNK, chunk_shape
from fxpath.store import Rows, Store, open_store, write_store

KEY = "neuron_mct@0.9"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    return synthetic_store(folder / "run.h5", n=6, failed=[2], scores={"neuron_mct": "float16"}, thumbnails=True)


@pytest.fixture
def path(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sound, tmp_path / "run.h5"))


@pytest.mark.parametrize("granularity", ["unit", "channel"])
def test_everything_that_is_written_comes_back(tmp_path: Path, granularity: str) -> None:
    index = synthetic_index(granularity)
    header = synthetic_header(index)
    rows = synthetic_rows(index, 6, failed=[2], scores={"neuron_mct": "float32"}, thumbnails=True)
    write_store(tmp_path / "run.h5", header, rows)
    assert leftovers(tmp_path) == {"run.h5"}
    with open_store(tmp_path / "run.h5") as store:
        assert isinstance(store, Store)
        assert len(store) == 6
        assert store.complete
        assert store.index == index
        assert store.keys == tuple(rows.pathways) == KEYS  # an order that is not alphabetical
        assert store.families == ("neuron_mct", "greedy_pruning", "random:seed=3", "active")
        assert store.header.identity() == header.identity()
        assert store.classes == header.classes
        for name in ("model", "fingerprint", "input_shape", "preprocessing", "versions", "created", "notes"):
            assert getattr(store.header, name) == getattr(header, name)
        table = store.samples()
        assert list(table) == ["id", "label", "target", "prediction", "label_rank", "response", "probability", "status"]
        for name, values in rows.samples.items():
            np.testing.assert_array_equal(table[name].to_numpy(), values)
        assert store.ok.tolist() == [True, True, False, True, True, True]
        np.testing.assert_array_equal(store.active(), rows.active)
        for key, pathway in rows.pathways.items():
            assert store.parameters(key) == pathway.parameters
            assert (store.selector(key), store.sparsity(key)) == (pathway.selector, pathway.sparsity)
            np.testing.assert_array_equal(store.packed(key), pathway.columns["mask"])
            for name, values in pathway.columns.items():
                found = store.column(key, name)
                np.testing.assert_array_equal(found, values)
                assert found.dtype.kind == np.asarray(values).dtype.kind
            outcomes = store.outcomes(key)
            assert len(outcomes) == 6
            assert outcomes["same_class"].tolist() == pathway.columns["same_class"].tolist()
            assert "kept" not in outcomes
            assert outcomes["diagnostics/stopped"].tolist()[2] == "failed"
        signed, scale = rows.scores["neuron_mct"]
        assert store.score_families == ("neuron_mct",)
        np.testing.assert_array_equal(store.scores("neuron_mct", 4), signed[4] * scale[4])
        np.testing.assert_array_equal(store.thumbnail(3), rows.thumbnails[3])  # type: ignore[index]


def test_a_made_up_store_obeys_the_invariants(path: Path) -> None:
    with open_store(path) as store:
        index, active = store.index, store.active()
        alive = index.count_by_site(active)
        for key in store.keys:
            mask, kept, live = store.packed(key), store.column(key, "kept"), store.column(key, "live")
            np.testing.assert_array_equal(index.count_by_site(mask), kept)
            np.testing.assert_allclose(store.column(key, "density")[store.ok], kept.sum(1)[store.ok] / index.size)
            switched_on = index.count_by_site(mask & ~active)
            assert (live <= switched_on).all()
            assert (switched_on.sum() == 0) == (not key.startswith(("random", "greedy")))
            assert not mask[2].any()
            if store.sparsity(key) is not None:
                assert (kept.sum(1)[store.ok] == index.kept(store.sparsity(key))).all()
        assert (alive[store.ok].sum(1) > 0.3 * index.size).all()


def test_failed_samples_are_nan_and_empty(path: Path) -> None:
    with open_store(path) as store:
        assert store.samples()["status"][2] == "not an image"
        assert np.isnan(store.samples()["response"][2])
        for name in ("density", "response", "probability", "dropped_response", "seconds"):
            assert np.flatnonzero(np.isnan(store.column(KEY, name))).tolist() == [2]
        assert store.column(KEY, "missing").tolist() == ["", "", "not an image", "", "", ""]
        assert not store.mask(KEY, 2).any()


def test_plain_h5py_reads_the_bits_as_documented(tmp_path: Path) -> None:
    index = synthetic_index()
    rows = synthetic_rows(index, 3)
    write_store(tmp_path / "run.h5", synthetic_header(index), rows)
    with h5py.File(tmp_path / "run.h5") as file:
        assert file.attrs["schema"] == b"fxpath"
        assert file.attrs["version"] == 1
        np.testing.assert_array_equal(file["pathways"][KEY]["mask"][...], rows.pathways[KEY].columns["mask"])
        np.testing.assert_array_equal(file["active"][...], rows.active)
        assert file["samples/id"][0] == b"photo-0000.jpg"
        mask = index.unpack(rows.pathways[KEY].columns["mask"][1])
        # Little-endian bits: neuron 11 of site 1 is bit 3 of byte 1 after the site's first byte.
        first_byte, first_neuron = file["sites/first_byte"][1], file["sites/first_neuron"][1]
        for neuron in range(file["sites/neurons"][1]):
            byte = file["pathways"][KEY]["mask"][1, first_byte + neuron // 8]
            assert bool(byte >> (neuron % 8) & 1) == mask[first_neuron + neuron]
        types = []
        file.visititems(lambda name, found: types.append(found.dtype) if isinstance(found, h5py.Dataset) else None)
        assert not any(dtype.hasobject for dtype in types)


def test_a_site_and_a_range_of_rows_are_what_the_whole_holds(path: Path) -> None:
    with open_store(path) as store:
        whole, packed = store.mask(KEY, 4), store.packed(KEY)
        for number, site in enumerate(store.index.sites):
            for name in (number, number - len(store.index), site.name):
                part = store.mask(KEY, "photo-0004.jpg", name)
                assert part.shape == site.shape
                np.testing.assert_array_equal(part.reshape(-1), whole[site.slice])
            np.testing.assert_array_equal(store.packed(KEY, slice(1, 3), site.name), packed[1:3, site.bytes])
            np.testing.assert_array_equal(store.active(slice(-2, None), number), store.active()[-2:, site.bytes])
            np.testing.assert_array_equal(
                store.scores("neuron_mct", 1, number).reshape(-1), store.scores("neuron_mct", 1)[site.slice]
            )
        assert store.packed(KEY, slice(4, 2)).shape == (0, store.index.nbytes)
        np.testing.assert_array_equal(store.column(KEY, "kept", slice(2, 5)), store.column(KEY, "kept")[2:5])


def test_rows_of_several_chunks_are_put_together(tmp_path: Path) -> None:
    index = NeuronIndex.build([("a", "relu", (3_000_001,)), ("b", "relu", (7, 500_000)), ("c", "relu", (5_000_000,))])
    active = np.random.default_rng(0).integers(0, 256, (2, index.nbytes), dtype=np.uint8)
    nothing = np.full(2, np.nan)
    samples = {"id": ["p", "q"], "label": [1, 2], "target": [1, 2], "response": nothing, "probability": nothing}
    rows = Rows(samples | {"status": ["ok", "ok"]}, active)
    write_store(tmp_path / "run.h5", synthetic_header(index), rows)
    with h5py.File(tmp_path / "run.h5") as file:
        chunk = file["active"].chunks
        assert chunk == (1, -(-index.nbytes // -(-index.nbytes // CHUNK)))
        assert chunk[1] <= CHUNK
        assert -index.nbytes % chunk[1] < index.nbytes // CHUNK + 1  # padding of the last chunk
        np.testing.assert_array_equal(file["active"][...], active)
    with open_store(tmp_path / "run.h5") as store:
        np.testing.assert_array_equal(store.active(), active)
        for site in index.sites:
            np.testing.assert_array_equal(store.active(slice(1, 2), site), active[1:, site.bytes])
        assert store.samples()["label_rank"].tolist() == [-1, -1]  # the default: unknown
        assert store.keys == ()


@pytest.mark.parametrize(
    ("path", "tail", "itemsize", "expected"),
    [
        ("active", (345_388,), 1, (1, 172_694)),
        ("active", (CHUNK,), 1, (1, CHUNK)),
        ("active", (CHUNK + 1,), 1, (1, CHUNK // 2 + 1)),
        ("pathways/neuron_mct@0.9/mask", (13,), 1, (1, 13)),
        ("scores/dgr/signed", (2_763_104,), 2, (1, 125_596)),
        ("samples/thumbnails", (64, 64, 3), 1, (1, 64, 64, 3)),
        ("pathways/neuron_mct@0.9/kept", (26,), 4, (315, 26)),
        ("pathways/neuron_mct@0.9/diagnostics/mask", (26,), 4, (315, 26)),
        ("samples/id", (), 14, (1000,)),
    ],
)
def test_chunks(path: str, tail: tuple[int, ...], itemsize: int, expected: tuple[int, ...]) -> None:
    assert chunk_shape(path, 1000, tail, itemsize) == expected


def test_blocks_cover_all_samples_within_the_memory_given(path: Path) -> None:
    with open_store(path) as store:
        assert list(store.blocks()) == [slice(0, 6)]
        assert list(store.blocks(4 * store.index.nbytes + 3)) == [slice(0, 4), slice(4, 6)]
        assert list(store.blocks(1)) == [slice(row, row + 1) for row in range(6)]
        joined = np.concatenate([store.packed(KEY, rows) for rows in store.blocks(2 * store.index.nbytes)])
        np.testing.assert_array_equal(joined, store.packed(KEY))


def test_a_store_opens_from_a_path_a_binary_file_and_an_open_hdf5_file(path: Path) -> None:
    with open_store(str(path)) as store:
        expected = contents(store)
    with open_store(io.BytesIO(path.read_bytes())) as store:
        assert same(contents(store), expected)
    with h5py.File(path) as file:
        with open_store(file) as store:
            assert same(contents(store), expected)
        assert file  # the caller's file stays open


def test_a_pathway_cut_from_float32_scores_is_the_stored_one(tmp_path: Path) -> None:
    synthetic_store(tmp_path / "run.h5", n=3, scores={"neuron_mct": "float32"})
    with open_store(tmp_path / "run.h5") as store:
        for row in range(3):
            for sparsity in (0.9, 0.99):
                found = store.cut("neuron_mct", sparsity, row)
                np.testing.assert_array_equal(found, store.mask(f"neuron_mct@{sparsity}", row))
                assert found.sum() == store.index.kept(sparsity)


def test_a_pathway_cut_from_float16_scores_differs_only_within_rounding_of_the_threshold(tmp_path: Path) -> None:
    index = NeuronIndex.build([("a", "relu", (40, 30, 30)), ("b", "relu", (50_001,))])
    rows = synthetic_rows(
        index, 2, keys=("neuron_mct@0.5", "neuron_mct@0.9"), alive=0.7, scores={"neuron_mct": "float32"}
    )
    exact = [np.abs(values * scale) for values, scale in zip(*rows.scores["neuron_mct"], strict=True)]
    values, scale = rows.scores["neuron_mct"]
    rows = replace(rows, scores={"neuron_mct": (values.astype(np.float16), scale)})
    write_store(tmp_path / "run.h5", synthetic_header(index), rows)
    differing = 0
    with open_store(tmp_path / "run.h5") as store:
        for row in range(2):
            for sparsity in (0.5, 0.9):
                mask, cut = store.mask(f"neuron_mct@{sparsity}", row), store.cut("neuron_mct", sparsity, row)
                assert cut.sum() == mask.sum() == index.kept(sparsity)
                changed = np.flatnonzero(mask != cut)
                threshold = exact[row][mask].min()
                # Half a unit in the last place of float16: 2⁻¹¹ relative, 2⁻²⁵ of the scale where it is subnormal.
                bound = 2 * max(2**-11 * threshold, 2**-25 * scale[row])
                assert (np.abs(exact[row][changed] - threshold) <= bound).all()
                differing += changed.size
    assert 0 < differing < 0.002 * 4 * index.size  # 0 would mean that float16 was not tried


def test_cutting_counts_channels_whole_and_leaves_failed_samples_empty(tmp_path: Path) -> None:
    index = synthetic_index("channel")
    synthetic_store(
        tmp_path / "run.h5", index=index, keys=("neuron_mct@0.5",), failed=[1], scores={"neuron_mct": "float32"}
    )
    with open_store(tmp_path / "run.h5") as store:
        scores = np.abs(store.scores("neuron_mct", 0))
        cut = store.cut("neuron_mct", "0.5", 0)
        np.testing.assert_array_equal(cut, select_largest(scores, [index.kept("0.5")], index.weights)[0])
        np.testing.assert_array_equal(cut, store.mask("neuron_mct@0.5", 0))
        assert 0 < cut @ index.weights <= index.units // 2
        assert store.mask("neuron_mct@0.5", 0, "block.relu_1").shape == (1, 11)
        assert not store.cut("neuron_mct", 0.5, 1).any()
        with pytest.raises(SparsityError, match=r"in \[0, 1\)"):
            store.cut("neuron_mct", 1.0, 0)


def test_scores_that_are_nan_cut_to_an_empty_pathway(tmp_path: Path) -> None:
    index = synthetic_index()
    rows = synthetic_rows(index, 2)
    signed = np.ones((2, index.size), dtype=np.float16)
    signed[1] = np.nan
    rows = replace(rows, scores={"neuron_mct": (signed, np.ones(2))})
    write_store(tmp_path / "run.h5", synthetic_header(index), rows)
    with open_store(tmp_path / "run.h5") as store:
        assert store.cut("neuron_mct", 0.9, 0).sum() == index.kept(0.9)
        assert not store.cut("neuron_mct", 0.9, 1).any()


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        (lambda store: store.mask("neuron_mtc@0.9", 0), StoreError, "nearest: neuron_mct@0.9"),
        (lambda store: store.mask(KEY, "photo-004.jpg"), StoreError, "nearest: photo-0004.jpg"),
        (lambda store: store.mask(KEY, 6), StoreError, "a row 0 … 5, found 6"),
        (lambda store: store.row(1.5), StoreError, "found 1.5"),
        (lambda store: store.mask(KEY, 0, "block.rleu"), SiteError, "nearest: block.relu"),
        (lambda store: store.column(KEY, "densty"), StoreError, "nearest: density"),
        (lambda store: store.scores("neuron_mtc", 0), StoreError, "nearest: neuron_mct"),
        (lambda store: store.parameters("dgr@0.9"), StoreError, "there is no pathway 'dgr@0.9'"),
        (lambda store: store.packed(KEY, slice(0, 6, 2)), StoreError, "a step of 1"),
        (lambda store: store.packed(KEY, 3), StoreError, "rows: expected a slice"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(
    path: Path, wrong: Callable[[Store], Any], error: type[Exception], said: str
) -> None:
    with open_store(path) as store:
        with pytest.raises(error, match=said.replace("[", r"\[")) as found:
            wrong(store)
        assert error is SiteError or str(path) in str(found.value)
        assert store.row("photo-0004.jpg") == store.row(4) == store.row(-2) == store.row(np.int64(4)) == 4


def test_a_closed_store_says_so(path: Path) -> None:
    with open_store(path) as store:
        pass
    for use in (store.active, store.samples, lambda: store.mask(KEY, 0), lambda: store.parameters(KEY)):
        with pytest.raises(StoreError, match="closed"):
            use()


def test_opening_and_reading_one_site_reads_a_small_part_of_the_file(tmp_path: Path) -> None:
    class Counting(io.BytesIO):
        read_bytes = 0

        def readinto(self, buffer: Any) -> int:
            count = super().readinto(buffer)
            self.read_bytes += count
            return count

    index = NeuronIndex.build([(f"site{number}", "relu", (2_000_000,)) for number in range(6)])
    rows = synthetic_rows(index, 3, keys=("random@0.9",), alive=0.5)
    write_store(tmp_path / "run.h5", synthetic_header(index), rows)
    file = Counting((tmp_path / "run.h5").read_bytes())
    size = len(file.getvalue())
    assert size > 5_000_000
    with open_store(file) as store:
        opened = file.read_bytes
        assert opened < 200_000
        mask = store.mask("random@0.9", 1, "site3")
        assert file.read_bytes - opened < 2 * CHUNK + 100_000  # at most two chunks hold the site's 250 kB
    np.testing.assert_array_equal(
        mask, index.unpack(rows.pathways["random@0.9"].columns["mask"][1])[6_000_000:8_000_000]
    )


def test_importing_the_store_brings_no_torch_and_no_pandas() -> None:
    script = """
import sys, time
start = time.process_time()
import fxpath.store
print(time.process_time() - start)
print([name for name in ("torch", "pandas", "scipy", "numba", "pickle5") if name in sys.modules])
"""
    found = [run(script) for _ in range(3)]
    assert [result.returncode for result in found] == [0, 0, 0]
    assert all(result.stdout.split()[1] == "[]" for result in found)
    assert min(float(result.stdout.split()[0]) for result in found) < 0.5


def test_json_in_the_file_is_what_it_says(path: Path) -> None:
    with h5py.File(path) as file:
        assert json.loads(file["pathways"]["random:seed=3@0.9"].attrs["parameters"]) == {"seed": 3, "steps": 50}
        assert [json.loads(text) for text in file["sites/shape"]] == [[4, 7, 7], [8, 5, 5], [3, 11], [37]]
        assert np.isnan(file["pathways/active"].attrs["sparsity"])
        assert file["sites/edges"].shape == (6, 2)
