"""Damaged and hostile files: found and named, never followed, never a crash."""

from __future__ import annotations

import io
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from processes import run
from spoiling import attribute, huge, joined, linked, replaced, rewritten, virtual, wider
from synthetic import contents, same, synthetic_store

from fxpath.errors import StoreError
from fxpath.store import open_store

KEY = "neuron_mct@0.9"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    return synthetic_store(folder / "run.h5", n=6, failed=[2], scores={"neuron_mct": "float16"}, thumbnails=True)


@pytest.fixture
def path(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sound, tmp_path / "run.h5"))


MASK = f"pathways/{KEY}/mask"
TEXTS = h5py.string_dtype("utf-8")


def chunk(payload: bytes) -> Callable[[h5py.File], None]:
    return lambda file: file[MASK].id.write_direct_chunk((0, 0), payload)


HOSTILE: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "no schema": (attribute("schema", None), "without it"),
    "another schema": (attribute("schema", np.bytes_("other")), "expected schema 'fxpath' version 1, found 'other'"),
    "a later version": (attribute("version", 2), "version 1, found 'fxpath' version 2; update fxpath"),
    "an earlier version": (attribute("version", 0), "compute it again"),
    "version as text": (attribute("version", np.bytes_("1")), "attribute 'version' to be a fixed-length int"),
    "schema as variable-length text": (attribute("schema", "fxpath"), "attribute 'schema' to be a fixed-length str"),
    "model as variable-length text": (attribute("model", "m"), "attribute 'model' to be a fixed-length str"),
    "an array of models": (attribute("model", np.array([b"a", b"b"])), "attribute 'model'"),
    "model not UTF-8": (attribute("model", np.bytes_(b"\xff\xfe")), "attribute 'model'"),
    "no threads": (attribute("threads", None), "attribute 'threads', found none"),
    "complete as text": (attribute("complete", np.bytes_("yes")), "attribute 'complete'"),
    "another granularity": (attribute("granularity", np.bytes_("layer")), "found 'layer'"),
    "channels instead of units": (attribute("granularity", np.bytes_("channel")), "do not follow from the shapes"),
    "broken versions": (attribute("versions", np.bytes_("{")), "versions: expected JSON"),
    "deep JSON": (attribute("versions", np.bytes_("[" * 50_000)), "the header"),
    "broken parameters": (attribute("parameters", np.bytes_("{'a': 1}"), f"pathways/{KEY}"), "attribute 'parameters'"),
    "a list of parameters": (attribute("parameters", np.bytes_("[1]"), f"pathways/{KEY}"), "expected a JSON object"),
    "another sparsity": (attribute("sparsity", 0.5, f"pathways/{KEY}"), "sparsity 0.9, found 'neuron_mct' and 0.5"),
    "no selector": (attribute("selector", None, f"pathways/{KEY}"), "attribute 'selector', found none"),
    "no active": (lambda file: file.pop("active"), "expected dataset /active, found none"),
    "no samples": (lambda file: file.pop("samples"), "expected group /samples, found none"),
    "no labels": (lambda file: file.pop("samples/label"), "expected dataset /samples/label, found none"),
    "no sites": (lambda file: file.pop("sites"), "expected group /sites, found none"),
    "no edges": (lambda file: file.pop("sites/edges"), "expected dataset /sites/edges, found none"),
    "no mask": (lambda file: file.pop(MASK), f"expected dataset /{MASK}, found none"),
    "no scale": (lambda file: file.pop("scores/neuron_mct/scale"), "/scores/neuron_mct/scale, found none"),
    "a group as mask": (replaced(MASK, lambda group, name, old: group.create_group(name)), "found another kind of"),
    "a dataset as pathway": (
        replaced(f"pathways/{KEY}", lambda group, name, old: group.create_dataset(name, data=3)),
        "to be a group of this file",
    ),
    "a bad key": (lambda file: file.create_group("pathways/Bad Key"), "found 'Bad Key'"),
    "a sparsity of 2": (lambda file: file.create_group("pathways/random@2.0"), r"expected a share in \[0, 1\)"),
    "scores of a sparsity": (lambda file: file.create_group("scores/random@0.9"), "expected a family"),
    "an unknown column": (
        lambda file: file[f"pathways/{KEY}"].create_dataset("densty", data=np.zeros(6)),
        "no column 'densty'; nearest: density",
    ),
    "active too wide": (rewritten("active", wider), r"shape \(any, 60\), found \(6, 61\)"),
    "mask too short": (rewritten(MASK, lambda old: old[:-1]), r"shape \(6, 60\), found \(5, 60\)"),
    "mask of rank 1": (rewritten(MASK, lambda old: old[0]), r"shape \(6, 60\), found \(60,\)"),
    "labels too short": (rewritten("samples/label", lambda old: old[:-1]), r"shape \(6\), found \(5,\)"),
    "kept too wide": (rewritten(f"pathways/{KEY}/kept", wider), r"\(6, 4\), found \(6, 5\)"),
    "diagnostics too short": (
        rewritten(f"pathways/{KEY}/diagnostics/completeness", lambda old: old[1:]),
        r"shape \(6, any\), found \(5, 4\)",
    ),
    "thumbnails in grey": (rewritten("samples/thumbnails", lambda old: old[..., :1]), "any, any, 3"),
    "mask of floats": (rewritten(MASK, lambda old: old.astype("f4")), r"expected \|u1, found <f4"),
    "signed mask": (rewritten(MASK, lambda old: old.astype("i1")), r"expected \|u1, found \|i1"),
    "labels of another order": (rewritten("samples/label", lambda old: old.astype(">i8")), "expected <i8, found >i8"),
    "scores in float64": (rewritten("scores/neuron_mct/signed", lambda old: old.astype("f8")), "float16 or float32"),
    "ids of variable length": (
        rewritten("samples/id", lambda old: old.astype(object), dtype=TEXTS),
        "expected text, found variable-length text",
    ),
    "masks of variable length": (
        replaced(MASK, lambda group, name, old: group.create_dataset(name, (6,), h5py.vlen_dtype("u1"), chunks=(1,))),
        r"expected \|u1, found type object",
    ),
    "diagnostics of variable length": (
        rewritten(f"pathways/{KEY}/diagnostics/stopped", lambda old: old.astype(object), dtype=TEXTS),
        "expected a fixed-length type, found variable-length text",
    ),
    "references as diagnostics": (
        lambda file: file[f"pathways/{KEY}/diagnostics"].create_dataset("r", (6,), h5py.ref_dtype, chunks=(6,)),
        "expected a fixed-length type, found type object",
    ),
    "compound labels": (
        replaced("samples/label", lambda group, name, old: group.create_dataset(name, (6,), "i4,f4", chunks=(6,))),
        "expected <i8, found type",
    ),
    "ids not UTF-8": (rewritten("samples/id", lambda old: np.array([b"\xff\xfe"] * 6)), "/samples/id"),
    "one id twice": (rewritten("samples/id", lambda old: np.array([b"same"] * 6)), "each id once"),
    "a soft link": (linked(MASK, h5py.SoftLink("/active")), "found a soft or external link"),
    "an external link": (linked("active", h5py.ExternalLink("other.h5", "/active")), "found a soft or external link"),
    "an external group": (linked("samples", h5py.ExternalLink("other.h5", "/samples")), "soft or external link"),
    "virtual storage": (replaced(MASK, virtual), "expected chunked with deflate alone, found virtual"),
    "external storage": (
        replaced(
            MASK,
            lambda group, name, old: group.create_dataset(name, (6, 60), "u1", external=[("other.raw", 0, 360)]),
        ),
        "found contiguous or external",
    ),
    "contiguous storage": (rewritten(MASK, lambda old: old, compression=None, chunks=None), "found contiguous"),
    "another filter": (rewritten(MASK, lambda old: old, compression="lzf"), r"with filters \[32000\]"),
    "a shuffled mask": (rewritten(MASK, lambda old: old, shuffle=True), r"with filters \[2, 1\]"),
    "more samples than the file can hold": (
        replaced("active", huge((10**13, 60), (1, 60))),
        "which is all that a file of this size can hold, found 600000000000000",
    ),
    "more edges than the file can hold": (replaced("sites/edges", huge((10**12, 2), (1, 2), "i4")), "can hold"),
    "a giant chunk": (replaced("sites/edges", huge((2**28, 2), (2**28, 2), "i4")), "chunks of at most 67108864 bytes"),
    "missing chunks": (replaced(MASK, huge((6, 60), (1, 60))), f"/{MASK}"),
    "a chunk that is no deflate": (chunk(b"rubbish" * 3), f"cannot read /{MASK}"),
    "a chunk that is too short": (chunk(zlib.compress(b"\0" * 59)), r"expected 60 bytes, found 59"),
    "a chunk that is cut off": (chunk(zlib.compress(bytes(range(60)))[:-5]), "does not end after 60 bytes"),
    "a chunk with a wrong checksum": (chunk(zlib.compress(bytes(range(60)))[:-1] + b"x"), "incorrect data check"),
    "a chunk that inflates to 10 MB": (chunk(zlib.compress(b"\0" * 10**7)), f"cannot read /{MASK}"),
    "a small chunk that inflates to 60 kB": (chunk(zlib.compress(b"\0" * 60_000)), "does not end after 60 bytes"),
    "a shape that is no JSON": (rewritten("sites/shape", lambda old: np.array([b"(4,)"] * 4)), "cannot read /sites"),
    "a shape of halves": (rewritten("sites/shape", lambda old: np.array([b"[1.5]"] * 4)), "JSON list of whole numbers"),
    "a negative shape": (rewritten("sites/shape", lambda old: np.array([b"[-4]"] * 4)), "JSON list of whole numbers"),
    "an enormous shape": (rewritten("sites/shape", lambda old: np.array([b"[%d, 1]" % 10**30] * 4)), "from the shapes"),
    "two sites of one name": (rewritten("sites/name", lambda old: np.array([b"a"] * 4)), "each name once"),
    "an axis outside": (rewritten("sites/axis", lambda old: old + 9), "a channel axis within"),
    "neurons that do not add up": (rewritten("sites/neurons", lambda old: old + 1), "do not follow from the shapes"),
    "bytes that do not add up": (rewritten("sites/first_byte", lambda old: old[::-1]), "do not follow from the shapes"),
    "an edge to nowhere": (rewritten("sites/edges", lambda old: old + 1), "edges: expected pairs of sites"),
}  # fmt: skip


def read_all(path: Path) -> dict[str, Any]:
    with open_store(path) as store:
        store.row("photo-0001.jpg")
        return contents(store)


def test_the_store_that_is_spoiled_below_is_sound(path: Path) -> None:
    assert len(read_all(path)) > 50


@pytest.mark.parametrize("what", HOSTILE)
def test_a_spoiled_store_is_refused_with_file_object_and_reason(path: Path, what: str) -> None:
    spoil, said = HOSTILE[what]
    with h5py.File(path, "r+") as file:
        spoil(file)
    with pytest.raises(StoreError, match=said) as found:
        read_all(path)
    assert str(path) in str(found.value)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_spoiled_part_is_refused_or_joined_whole(path: Path, tmp_path: Path, what: str) -> None:
    good = synthetic_store(tmp_path / "good.h5", n=1, first=6, scores={"neuron_mct": "float16"}, thumbnails=True)
    # Chunks move unread and names of chunks are not looked into: what is wrong there is found when it is read.
    if joined(path, HOSTILE[what][0], good):
        assert "chunk" in what or what == "one id twice"


def test_attributes_of_other_programs_are_passed_over(path: Path) -> None:
    expected = read_all(path)
    with h5py.File(path, "r+") as file:
        file.attrs["comment"] = "of variable length"
        file.attrs["list"] = [1, 2, 3]
        file.create_group("connectivity").create_dataset("later", data=[1.0])
    assert same(read_all(path), expected)


@pytest.mark.parametrize("text", [b"", b"not HDF5 at all", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + bytes(4096)])
def test_a_file_that_is_no_hdf5_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "run.h5").write_bytes(text)
    with pytest.raises(StoreError, match=r"run.h5: cannot open it as a store: .*copy the file again"):
        open_store(tmp_path / "run.h5")
    with pytest.raises(StoreError, match="cannot open it as a store"):
        open_store(io.BytesIO(text))


def test_a_file_of_another_kind_is_named_so(tmp_path: Path) -> None:
    (tmp_path / "run.h5").write_text("not HDF5 at all")
    with pytest.raises(StoreError, match=r"run.h5: cannot open it as a store: it is no HDF5 file\. Expected"):
        open_store(tmp_path / "run.h5")


def test_a_path_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"run.h5: there is no such file"):
        open_store(tmp_path / "run.h5")
    with pytest.raises(StoreError, match=r"cannot open it as a store: it is a folder\. Expected"):
        open_store(tmp_path)
    h5py.File(tmp_path / "plain.h5", "w").close()
    with pytest.raises(StoreError, match=r"plain.h5: expected a store .* found an HDF5 file without it"):
        open_store(tmp_path / "plain.h5")


DAMAGE = """
import sys
from pathlib import Path
import numpy as np
from synthetic import contents, same
from fxpath.errors import StoreError
from fxpath.store import merge_stores, open_store
path, mode, tries = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
whole = path.read_bytes()
with open_store(path) as store:
    expected = contents(store)
rng = np.random.default_rng(5)
spoiled = path.with_name("spoiled.h5")
refused = equal = 0
for number in range(tries):
    if mode == "cut":
        data = whole[: number * len(whole) // tries]
    else:
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] ^= rng.integers(1, 256)
    spoiled.write_bytes(data)
    try:
        with open_store(spoiled) as store:
            assert same(contents(store), expected), "damage was read as data"
        equal += 1
    except StoreError as problem:
        assert str(spoiled) in str(problem), problem
        refused += 1
print(refused, equal)
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return synthetic_store(
        tmp_path / "small.h5", n=4, keys=(KEY, "random@0.9"), scores={"neuron_mct": "float16"}, maps=("gradient",)
    )


def test_a_store_cut_off_anywhere_is_refused(small: Path) -> None:
    found = run(DAMAGE, small, "cut", 150)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split() == ["150", "0"]


def test_flipped_bytes_are_found_or_harmless_and_never_crash(small: Path) -> None:
    found = run(DAMAGE, small, "flip", 200)
    assert found.returncode == 0, found.stderr[-2000:]
    refused, equal = map(int, found.stdout.split())
    assert refused + equal == 200
    assert refused > 150  # the rest hit bytes that nothing uses


def test_the_damaged_chunk_of_one_sample_spares_the_others(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file[MASK].id.write_direct_chunk((3, 0), b"rubbish")
    with open_store(path) as store:
        assert store.mask(KEY, 2).shape == (store.index.size,)
        with pytest.raises(StoreError, match=rf"run.h5: cannot read /{MASK}"):
            store.mask(KEY, 3)
        assert store.mask(KEY, 4).any()
