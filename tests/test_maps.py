"""Attribution maps in a store: what is written comes back, plain h5py reads it, and what is damaged is refused."""

from __future__ import annotations

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
from spoiling import attribute, huge, joined, linked, replaced, rewritten, virtual
from synthetic import contents, same, synthetic_header, synthetic_index, synthetic_maps, synthetic_rows, synthetic_store

from fxpath import merging, parts
from fxpath.errors import StoreError
from fxpath.keys import checked_map_key
from fxpath.maptables import MapRows, scaled
from fxpath.merging import add_maps, require_nothing_foreign
from fxpath.parts import write_map_part
from fxpath.store import merge_stores, open_store, write_store

KEY = "neuron_mct@0.9*"
METHODS = ("smooth_grad:samples=50,sigma=0.15", KEY, "gradient", "masked_gradient:dgr:init=r@0.9")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    return synthetic_store(folder / "run.h5", n=6, failed=[2], scores={"neuron_mct": "float16"}, maps=METHODS)


@pytest.fixture
def path(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sound, tmp_path / "run.h5"))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The same store without maps."""
    return synthetic_store(tmp_path / "run.h5", n=6, failed=[2], scores={"neuron_mct": "float16"})


def part(path: Path, rows: range, *keys: str, job: str = "j", **changes: Any) -> Path:
    """A part with the maps of some samples of these stores."""
    failed = [row - rows.start for row in rows if row == 2]
    maps = {key: synthetic_maps(key, len(rows), first=rows.start, failed=failed) for key in keys or METHODS}
    maps = {key: replace(made, **changes) for key, made in maps.items()}
    write_map_part(path, job, [f"photo-{row:04d}.jpg" for row in rows], maps)
    return path


# --- what is written comes back ---


def test_maps_come_back_signed_and_scaled(path: Path) -> None:
    with open_store(path) as store:
        assert store.map_keys == METHODS  # an order that is not alphabetical
        for key in METHODS:
            made = synthetic_maps(key, 6, failed=[2])
            expected = made.columns["signed"].astype(np.float32) * made.columns["scale"][:, None, None]
            found = store.maps(key)
            assert found.dtype == np.float32
            assert found.shape == (6, 15, 13)
            np.testing.assert_array_equal(found, expected)
            ok = [0, 1, 3, 4, 5]
            np.testing.assert_array_equal(found[ok] == 0, made.columns["signed"][ok] == 0)
            assert (found[0] < 0).any()
            assert (found[0] > 0).any()
            assert np.isnan(found[2]).all()
            assert np.isfinite(found[ok]).all()
            np.testing.assert_array_equal(store.maps(key, slice(1, 4)), expected[1:4])
            np.testing.assert_array_equal(store.map(key, 4), expected[4])
            np.testing.assert_array_equal(store.map(key, "photo-0004.jpg"), expected[4])
            np.testing.assert_array_equal(store.map(key, -1), expected[5])
            assert store.map_missing(key).tolist() == ["", "", "not an image", "", "", ""]
            assert store.map_seconds(key, slice(3, 5)).tolist() == [0.375, 0.5]
            assert store.map_parameters(key) == {"size": 3, "of": key}
            assert store.map_reduction(key) == "signed_max"


def test_plain_h5py_and_numpy_read_the_maps_as_documented(path: Path) -> None:
    script = (
        "import sys, h5py, numpy as np\n"
        "with h5py.File(sys.argv[1]) as file:\n"
        "    group = file['maps'][sys.argv[2]]\n"
        "    maps = group['signed'][...].astype('f4') * group['scale'][...][:, None, None]\n"
        "    says = {name: value.item() for name, value in group.attrs.items()}\n"
        "    kinds = [(name, table.dtype.str, table.chunks, table.compression) for name, table in group.items()]\n"
        "    missing = group['missing'][...].tolist()\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] in ('fxpath', 'torch')]\n"
        "np.save(sys.argv[3], maps); print(repr((says, kinds, missing)))\n"
    )
    done = run(script, path, KEY, path.with_name("maps.npy"))
    assert done.returncode == 0, done.stderr
    says, kinds, missing = eval(done.stdout)
    assert says == {
        "method": KEY.encode(), "parameters": json.dumps({"of": KEY, "size": 3}).encode(), "reduction": b"signed_max",
    }  # fmt: skip
    assert kinds == [
        ("missing", "|S12", (6,), "gzip"), ("scale", "<f4", (6,), "gzip"), ("seconds", "<f8", (6,), "gzip"),
        ("signed", "<f2", (1, 15, 13), "gzip"),
    ]  # fmt: skip
    assert missing == [b"", b"", b"not an image", b"", b"", b""]
    with open_store(path) as store:
        np.testing.assert_array_equal(np.load(path.with_name("maps.npy")), store.maps(KEY))


def test_a_large_map_is_cut_into_even_pieces(tmp_path: Path) -> None:
    index = synthetic_index()
    columns = {"signed": np.ones((1, 600, 500), np.float16), "scale": [2.0], "missing": [""], "seconds": [0.5]}
    rows = replace(synthetic_rows(index, 1), maps={"gradient": MapRows({}, "signed_sum", columns)})
    write_store(tmp_path / "run.h5", synthetic_header(index), rows)
    with h5py.File(tmp_path / "run.h5") as file:
        assert file["maps/gradient/signed"].chunks == (1, 200, 500)
    with open_store(tmp_path / "run.h5") as store:
        np.testing.assert_array_equal(store.map("gradient", 0), np.full((600, 500), 2, np.float32))
        assert store.map_reduction("gradient") == "signed_sum"


def test_a_store_without_maps_reads_as_before(bare: Path) -> None:
    with h5py.File(bare) as file:
        assert "maps" not in file
    with open_store(bare) as store:
        assert store.map_keys == ()
        with pytest.raises(StoreError, match=r"there is no map 'gradient' \(there is no map at all\)"):
            store.map("gradient", 0)


def test_names_that_are_not_there(path: Path) -> None:
    with open_store(path) as store:
        with pytest.raises(StoreError, match=r"run.h5: there is no map 'neuron_mct@0.9'; nearest: neuron_mct@0\.9\*"):
            store.maps("neuron_mct@0.9")
        with pytest.raises(StoreError, match=r"there is no map 'gradeint'; nearest: gradient"):
            store.map_reduction("gradeint")
        with pytest.raises(StoreError, match=r"there is no sample 'photo-0009.jpg'; nearest: photo-000"):
            store.map(KEY, "photo-0009.jpg")
        with pytest.raises(StoreError, match="expected an id or a row 0 … 5, found 6"):
            store.map(KEY, 6)
        with pytest.raises(StoreError, match="a slice with a step of 1"):
            store.maps(KEY, slice(0, 6, 2))
        with pytest.raises(StoreError, match=r"there is no map 'gradeint'; nearest: gradient"):
            store.map_missing("gradeint")
    with pytest.raises(StoreError, match="a store that is closed"):
        store.map(KEY, 0)


@pytest.mark.parametrize("key", [*METHODS, "grad_cam:site=Mixed_5b.branch1x1.relu-1", "a" * 200])
def test_keys_that_can_name_maps(key: str) -> None:
    assert checked_map_key(key) == key


@pytest.mark.parametrize("key", ["", "a/b", "../x", "Gradient", "a b", "é", "a" * 201, "9", "a\n", "a\0", ".", "*"])
def test_keys_that_cannot(key: str) -> None:
    with pytest.raises(StoreError, match="map key: expected <method>"):
        checked_map_key(key)


# --- scaled to float16 ---


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_a_scale_is_a_power_of_two_that_leaves_room(kind: type) -> None:
    maps = np.array([[[1.0, -3.0, 0.0, 2**-20]], [[2e-7, -1e-7, 6e-8, 0.0]], [[65504.0, -0.5, 1e-3, 7.0]]], dtype=kind)
    values, scale = scaled(maps)
    assert (values.dtype, scale.dtype) == (np.float16, np.float32)
    assert np.log2(scale).tolist() == [-13, -37, 1]
    assert ((np.abs(values).max(axis=(1, 2)) >= 2**14) & (np.abs(values).max(axis=(1, 2)) < 2**15)).all()
    exact = (maps.astype(np.float64) / scale[:, None, None]).astype(np.float16)
    np.testing.assert_array_equal(values, exact)  # a single rounding
    largest = np.full((1, 2, 2), np.finfo(np.float32).max if kind is not np.float16 else 65504, dtype=kind)
    values, scale = scaled(largest)
    np.testing.assert_allclose(values.astype(np.float64) * scale, largest.astype(np.float64), rtol=2**-11)
    values, scale = scaled(maps)
    if kind is np.float16:  # which there is none of
        np.testing.assert_array_equal(values.astype(np.float32) * scale[:, None, None], maps.astype(np.float32))


def test_what_is_not_zero_stays_so_and_only_that() -> None:
    rng = np.random.default_rng(3)
    maps = rng.standard_normal((6, 40, 50)) * np.logspace(-30, 6, 2000).reshape(40, 50)
    maps[:, ::7] = 0
    maps *= np.array([1, 1e-25, 1e30, 1e-40, 0, 1])[:, None, None]
    maps[5] = 0
    maps[5, 3, 3] = -1e-300  # less than float32 holds
    values, scale = scaled(maps)
    restored = values.astype(np.float32) * scale[:, None, None]
    assert np.isfinite(restored).all()
    np.testing.assert_array_equal(np.sign(restored), np.sign(maps))
    largest = np.abs(maps).max(axis=(1, 2), keepdims=True)
    precise = (np.abs(maps) > 2**-28 * largest) & (np.abs(maps) > 1e-34)
    assert [int(each.sum()) > 300 for each in precise] == [True, True, True, False, False, False]
    assert np.abs(restored[precise] / maps[precise] - 1).max() <= 2**-11
    coarse = (np.abs(maps[:3]) > 2**-38 * largest[:3]) & ~precise[:3]
    assert (np.abs(restored[:3] - maps[:3]) <= 2**-39 * largest[:3])[coarse].all()
    assert coarse.sum() > 100


# --- what does not fit is not written ---


def changed(**columns: Any) -> Callable[[MapRows], MapRows]:
    return lambda made: replace(made, columns={**made.columns, **columns})


BAD: dict[str, tuple[str, Callable[[MapRows], MapRows], str]] = {
    "a bad key": ("a/b", lambda made: made, "map key: expected"),
    "a reduction of absolute values": (KEY, lambda made: replace(made, reduction="max_abs"), "no reduction 'max_abs'"),
    "parameters that are no JSON": (KEY, lambda made: replace(made, parameters={"a": object()}), "JSON can hold"),
    "no scale": (KEY, lambda made: replace(made, columns={"signed": made.columns["signed"]}), "expected the columns"),
    "an unknown column": (KEY, changed(more=np.zeros(6)), "expected the columns signed, scale, seconds, missing"),
    "maps in float32": (KEY, changed(signed=np.zeros((6, 3, 3), np.float32)), "in float16, found .* in float32"),
    "maps with channels": (KEY, changed(signed=np.zeros((6, 3, 3, 3), np.float16)), r"found \(6, 3, 3, 3\)"),
    "maps of five samples": (KEY, changed(signed=np.zeros((5, 3, 3), np.float16)), r"expected shape \(6, 3, 3\)"),
    "maps of no pixels": (KEY, changed(signed=np.zeros((6, 0, 3), np.float16)), r"found \(6, 0, 3\)"),
    "scales of five samples": (KEY, changed(scale=np.ones(5)), r"expected shape \(6,\), found \(5,\)"),
    "scales in space": (KEY, changed(scale=np.ones((6, 1))), r"expected shape \(6,\), found \(6, 1\)"),
    "reasons that are no text": (KEY, changed(missing=[0] * 6), "expected 6 texts"),
}


@pytest.mark.parametrize("what", BAD)
def test_maps_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path, what: str) -> None:
    key, change, said = BAD[what]
    index = synthetic_index()
    rows = replace(synthetic_rows(index, 6), maps={key: change(synthetic_maps(KEY, 6))})
    with pytest.raises(StoreError, match=said):
        write_store(tmp_path / "run.h5", synthetic_header(index), rows)
    with pytest.raises(StoreError, match=said):
        write_map_part(tmp_path / "part.h5", "j", list("abcdef"), rows.maps)
    assert not leftovers(tmp_path)


# --- damaged and hostile files ---

SIGNED = f"maps/{KEY}/signed"
HOSTILE: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "maps is a table": (replaced("maps", lambda group, name, old: group.create_dataset(name, data=3)), "to be a group"),
    "a bad key": (lambda file: file.create_group("maps/Bad Key"), "/maps: map key: expected .* found 'Bad Key'"),
    "a table as maps of a method": (
        replaced(f"maps/{KEY}", lambda group, name, old: group.create_dataset(name, data=3)), "to be a group",
    ),
    "a linked group": (linked(f"maps/{KEY}", h5py.SoftLink("/maps/gradient")), "found a soft or external link"),
    "linked maps": (linked(SIGNED, h5py.ExternalLink("other.h5", "/x")), "found a soft or external link"),
    "no maps": (lambda file: file.pop(SIGNED), "expected dataset /maps/.*/signed, found none"),
    "no scale": (lambda file: file.pop(f"maps/{KEY}/scale"), "/scale, found none"),
    "no reasons": (lambda file: file.pop(f"maps/{KEY}/missing"), "/missing, found none"),
    "an unknown column": (
        lambda file: file[f"maps/{KEY}"].create_dataset("scael", data=np.zeros(6)), "no column 'scael'; nearest: scale",
    ),
    "maps too short": (rewritten(SIGNED, lambda old: old[:-1]), r"shape \(6, any, any\), found \(5, 15, 13\)"),
    "maps of rank 2": (rewritten(SIGNED, lambda old: old[0]), r"shape \(6, any, any\), found \(15, 13\)"),
    "maps in float32": (rewritten(SIGNED, lambda old: old.astype("f4")), "expected <f2, found <f4"),
    "maps of another order": (rewritten(SIGNED, lambda old: old.astype(">f2")), "expected <f2, found >f2"),
    "maps of variable length": (
        replaced(SIGNED, lambda group, name, old: group.create_dataset(name, (6, 1, 1), h5py.vlen_dtype("f2"),
                                                                       chunks=(1, 1, 1))),
        "expected <f2, found type object",
    ),
    "scale too long": (rewritten(f"maps/{KEY}/scale", lambda old: np.append(old, old[:1])), r"\(6\), found \(7,\)"),
    "scale in float64": (rewritten(f"maps/{KEY}/scale", lambda old: old.astype("f8")), "expected <f4, found <f8"),
    "reasons of variable length": (
        rewritten(f"maps/{KEY}/missing", lambda old: old.astype(object), dtype=h5py.string_dtype("utf-8")),
        "expected text, found variable-length text",
    ),
    "virtual maps": (replaced(SIGNED, virtual), "expected chunked with deflate alone, found virtual"),
    "shuffled maps": (rewritten(SIGNED, lambda old: old, shuffle=True), r"with filters \[2, 1\]"),
    "more maps than the file can hold": (
        replaced(SIGNED, huge((6, 10**7, 10**6), (1, 64, 64), "f2")),
        "which is all that a file of this size can hold, found 120000000000000",
    ),
    "a giant chunk": (replaced(SIGNED, huge((6, 2**20, 64), (1, 2**20, 64), "f2")), "chunks of at most 67108864 bytes"),
    "missing chunks": (replaced(SIGNED, huge((6, 15, 13), (1, 15, 13), "f2")), "/signed"),
    "a chunk that is no deflate": (
        lambda file: file[SIGNED].id.write_direct_chunk((0, 0, 0), b"rubbish" * 3), "cannot read /maps/.*/signed",
    ),
    "no method": (attribute("method", None, f"maps/{KEY}"), "attribute 'method', found none"),
    "another method": (attribute("method", np.bytes_("gradient"), f"maps/{KEY}"), r"expected the method .* 'gradient'"),
    "a method of variable length": (attribute("method", KEY, f"maps/{KEY}"), "attribute 'method' to be a fixed-length"),
    "an unknown reduction": (attribute("reduction", np.bytes_("signed_mxa"), f"maps/{KEY}"), "nearest: signed_max"),
    "broken parameters": (attribute("parameters", np.bytes_("{"), f"maps/{KEY}"), "attribute 'parameters'"),
    "a list of parameters": (attribute("parameters", np.bytes_("[1]"), f"maps/{KEY}"), "expected a JSON object"),
}  # fmt: skip


def read_all(path: Path) -> dict[str, Any]:
    with open_store(path) as store:
        return contents(store)


def test_the_store_that_is_spoiled_below_is_sound(path: Path) -> None:
    assert read_all(path)["map keys"] == METHODS


@pytest.mark.parametrize("what", HOSTILE)
def test_spoiled_maps_are_refused_with_file_object_and_reason(path: Path, what: str) -> None:
    spoil, said = HOSTILE[what]
    with h5py.File(path, "r+") as file:
        spoil(file)
    with pytest.raises(StoreError, match=said) as found:
        read_all(path)
    assert str(path) in str(found.value)


@pytest.mark.parametrize("what", HOSTILE)
def test_spoiled_maps_are_not_joined(path: Path, tmp_path: Path, what: str) -> None:
    good = synthetic_store(tmp_path / "good.h5", n=1, first=6, scores={"neuron_mct": "float16"}, maps=METHODS)
    if joined(path, HOSTILE[what][0], good):
        assert what == "a chunk that is no deflate"  # chunks move unread: it is found when it is read


def test_damage_in_one_map_spares_the_others(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file[SIGNED].id.write_direct_chunk((3, 0, 0), b"rubbish")
    with open_store(path) as store:
        assert np.isfinite(store.map(KEY, 4)).all()
        assert np.isfinite(store.map("gradient", 3)).all()
        with pytest.raises(StoreError, match=r"run.h5: cannot read /maps/neuron_mct@0\.9\*/signed"):
            store.map(KEY, 3)


# --- joining and adding ---


def raw(path: Path, name: str) -> list[tuple[int, bytes]]:
    """The chunks of a table as they are deflated."""
    with h5py.File(path) as file:
        table = file[name].id
        corners = sorted(table.get_chunk_info(number).chunk_offset for number in range(table.get_num_chunks()))
        return [table.read_direct_chunk(corner) for corner in corners]


def tables(path: Path) -> list[str]:
    found: list[str] = []
    with h5py.File(path) as file:
        file.visititems(lambda name, each: found.append(name) if isinstance(each, h5py.Dataset) else None)
    return found


@pytest.mark.parametrize("sizes", [(6,), (1, 5), (2, 2, 2)])
def test_joined_stores_keep_their_maps(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    whole = synthetic_store(tmp_path / "whole.h5", n=6, maps=METHODS)
    pieces, first = [], 0
    for size in sizes:
        pieces.append(synthetic_store(tmp_path / f"{first}.h5", n=size, first=first, maps=METHODS))
        first += size
    merge_stores(pieces, tmp_path / "joined.h5")
    assert same(read_all(whole), read_all(tmp_path / "joined.h5"))
    for key in METHODS:
        assert raw(whole, f"maps/{key}/signed") == raw(tmp_path / "joined.h5", f"maps/{key}/signed")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ((), "its map keys differs: expected neuron_mct@0.9*, gradient, found none"),
        ((KEY,), "its map keys differs: expected neuron_mct@0.9*, gradient, found neuron_mct@0.9*; only parts of"),
    ],
)
def test_stores_with_other_maps_are_not_joined(tmp_path: Path, other: tuple[str, ...], said: str) -> None:
    one = synthetic_store(tmp_path / "one.h5", n=2, maps=(KEY, "gradient"))
    two = synthetic_store(tmp_path / "two.h5", n=2, first=2, maps=other)
    with pytest.raises(StoreError) as found:
        merge_stores([one, two], tmp_path / "joined.h5")
    assert said in str(found.value)
    with pytest.raises(StoreError, match=r"its map keys differs: expected .*, found neuron_mct@0\.9"):
        merge_stores([two, one], tmp_path / "joined.h5")


def test_maps_of_another_reduction_or_size_are_not_joined(tmp_path: Path) -> None:
    index, header = synthetic_index(), synthetic_header(synthetic_index())
    made = synthetic_maps(KEY, 2)
    for name, maps in {
        "sum": replace(made, reduction="signed_sum"),
        "set": replace(made, parameters={"size": 5}),
        "wide": changed(signed=np.zeros((2, 15, 14), np.float16))(made),
        "one": made,
    }.items():
        rows = synthetic_rows(index, 2, first=0 if name == "one" else 2)
        write_store(tmp_path / f"{name}.h5", header, replace(rows, maps={KEY: maps}))
    for name, said in {"sum": "signed_sum", "set": "parameters of the maps", "wide": r"\(15, 14\)"}.items():
        with pytest.raises(StoreError, match=said):
            merge_stores([tmp_path / "one.h5", tmp_path / f"{name}.h5"], tmp_path / "joined.h5")


def test_maps_are_added_and_all_else_moves_as_it_is(bare: Path, tmp_path: Path) -> None:
    before, chunks = read_all(bare), {name: raw(bare, name) for name in tables(bare)}
    told: list[tuple[int, int]] = []
    pieces = [part(tmp_path / f"{rows.start}.h5", rows) for rows in (range(2), range(2, 3), range(3, 6))]
    add_maps(bare, pieces, progress=lambda done, total: told.append((done, total)))
    assert told == [(6, 12), (8, 12), (9, 12), (12, 12)]
    found = read_all(bare)
    assert found["map keys"] == METHODS
    assert same(before, {name: found[name] for name in before} | {"map keys": ()})
    assert {name: raw(bare, name) for name in chunks} == chunks
    # as if they had been written at once
    whole = synthetic_store(tmp_path / "whole.h5", n=6, failed=[2], scores={"neuron_mct": "float16"}, maps=METHODS)
    assert same(found, read_all(whole))


def test_more_maps_are_added_beside_those_there_are(path: Path, tmp_path: Path) -> None:
    before = read_all(path)
    add_maps(path, [part(tmp_path / "more.h5", range(6), "grad_cam")])
    found = read_all(path)
    assert found["map keys"] == (*METHODS, "grad_cam")
    assert same(before, {name: found[name] for name in before} | {"map keys": METHODS})
    with pytest.raises(StoreError, match=r"expected maps that it does not have yet, found grad_cam"):
        add_maps(path, [tmp_path / "more.h5"])


def test_parts_that_are_not_of_these_samples_are_refused(bare: Path, tmp_path: Path) -> None:
    before = bare.read_bytes()
    few, rest = part(tmp_path / "few.h5", range(4)), part(tmp_path / "rest.h5", range(4, 6))
    other = part(tmp_path / "other.h5", range(4, 6), KEY)
    for pieces, said in (
        ([], "found 0 of others"),
        ([few], "expected maps of its 6 samples in order, found 4 of others"),
        ([rest, few], "found 6 of others"),
        ([few, other], "its map keys differs"),
        ([bare], "expected schema 'fxpath maps' version 1, found 'fxpath'"),
    ):
        with pytest.raises(StoreError, match=said):
            add_maps(bare, pieces)
    assert bare.read_bytes() == before
    with pytest.raises(StoreError, match="expected schema 'fxpath' version 1, found 'fxpath maps'"):
        open_store(few)


def test_what_fxpath_does_not_know_is_not_lost(bare: Path, tmp_path: Path) -> None:
    whole = part(tmp_path / "part.h5", range(6))
    require_nothing_foreign(bare)
    for spoil, said in (
        (lambda file: file.create_group("connectivity"), "it holds /connectivity, which this version"),
        (lambda file: file.attrs.__setitem__("comment", "mine"), "it holds attribute 'comment', which"),
    ):
        spoilt = Path(shutil.copy(bare, tmp_path / "spoilt.h5"))
        with h5py.File(spoilt, "r+") as file:
            spoil(file)
        before = spoilt.read_bytes()
        with pytest.raises(StoreError, match=said):
            add_maps(spoilt, [whole])
        assert spoilt.read_bytes() == before
    with h5py.File(bare, "r+") as file:
        file.attrs["comment"] = np.bytes_("fixed")
    add_maps(bare, [whole])
    with h5py.File(bare) as file:
        assert file.attrs["comment"] == b"fixed"


@pytest.mark.parametrize("moment", ["chunk", "name"])
def test_a_store_is_the_old_one_until_the_new_one_is_whole(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    whole, before = part(tmp_path / "part.h5", range(6)), bare.read_bytes()
    calls = []

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        if moment == "name" or len(calls) == 80:
            raise OSError(28, "No space left on device")
        write(*arguments)

    write = parts.write_chunk
    monkeypatch.setattr(parts, "write_chunk" if moment == "chunk" else "rename", full)
    with pytest.raises(StoreError, match=r"cannot write the store .* No space left .* Nothing was left behind"):
        add_maps(bare, [whole])
    assert bare.read_bytes() == before
    assert leftovers(tmp_path) == {"run.h5", "part.h5"}
    monkeypatch.undo()
    add_maps(bare, [whole])
    assert read_all(bare)["map keys"] == METHODS


def test_neither_old_content_nor_maps_are_inflated_on_their_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = synthetic_store(tmp_path / "run.h5", n=6)
    pieces = [part(tmp_path / "one.h5", range(2)), part(tmp_path / "two.h5", range(2, 6))]
    read: list[str] = []

    def noted(dataset: h5py.Dataset, *wanted: slice) -> Any:
        read.append(dataset.name)
        return genuine(dataset, *wanted)

    genuine = merging.read
    monkeypatch.setattr(merging, "read", noted)
    add_maps(store, pieces)
    assert read
    assert all(name.startswith("/maps/") and not name.endswith("/signed") for name in read)
