"""Parts joined along their samples, and what keeps them apart."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from processes import leftovers
from synthetic import KEYS, contents, same, synthetic_header, synthetic_index, synthetic_rows, synthetic_store

from fxpath.errors import StoreError
from fxpath.neurons import NeuronIndex
from fxpath.store import Header, Rows, merge_stores, open_store, write_store

KEY = "neuron_mct@0.9"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    return synthetic_store(folder / "run.h5", n=6, failed=[2], scores={"neuron_mct": "float16"}, thumbnails=True)


@pytest.fixture
def path(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sound, tmp_path / "run.h5"))


def raw_chunks(path: Path, name: str) -> list[tuple[int, bytes]]:
    with h5py.File(path) as file:
        table = file[name].id
        corners = sorted(table.get_chunk_info(number).chunk_offset for number in range(table.get_num_chunks()))
        return [table.read_direct_chunk(corner) for corner in corners]


@pytest.mark.parametrize("sizes", [(6,), (1, 5), (4, 1, 1), (2, 2, 2)])
def test_joined_parts_equal_one_store_written_at_once(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    options: dict[str, Any] = {"scores": {"neuron_mct": "float16"}, "thumbnails": False}
    whole = synthetic_store(tmp_path / "whole.h5", n=6, **options)
    parts, first, told = [], 0, []
    for size in sizes:
        parts.append(tmp_path / f"part-{first}.h5")
        synthetic_store(parts[-1], n=size, first=first, complete=False, **options)
        first += size
        with open_store(parts[-1]) as part:
            assert not part.complete
    merge_stores(parts, tmp_path / "joined.h5", progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (6, 6)
    assert len(told) == len(sizes)
    with open_store(whole) as one, open_store(tmp_path / "joined.h5") as other:
        assert other.complete
        assert other.keys == one.keys == KEYS
        assert same(contents(one) | {"thumbnail": None}, contents(other) | {"thumbnail": None})
    for name in ("active", *(f"pathways/{key}/mask" for key in KEYS), "scores/neuron_mct/signed"):
        assert raw_chunks(whole, name) == raw_chunks(tmp_path / "joined.h5", name)


def test_parts_with_text_of_different_widths_join(tmp_path: Path) -> None:
    index, header = synthetic_index(), synthetic_header(synthetic_index())
    parts = []
    for number, name in enumerate(["a", "a much longer identifier é", "bcd"]):
        rows = synthetic_rows(index, 1, first=number)
        parts.append(tmp_path / f"{number}.h5")
        write_store(parts[-1], header, replace(rows, samples={**rows.samples, "id": [name]}), complete=False)
    merge_stores(parts, tmp_path / "run.h5")
    with open_store(tmp_path / "run.h5") as store:
        assert store.ids.tolist() == ["a", "a much longer identifier é", "bcd"]
        assert store.row("bcd") == 2


def test_many_parts_join_across_the_chunks_of_short_columns(tmp_path: Path) -> None:
    index = NeuronIndex.build([("a", "relu", (9,))])
    header = synthetic_header(index)
    sizes = [700, 1, 3000, 17, 5000]
    parts, first = [], 0
    for size in sizes:
        rows = synthetic_rows(index, size, keys=("random@0.5",), first=first)
        parts.append(tmp_path / f"{first}.h5")
        write_store(parts[-1], header, rows, complete=False)
        first += size
    write_store(tmp_path / "whole.h5", header, synthetic_rows(index, first, keys=("random@0.5",)))
    merge_stores(parts, tmp_path / "run.h5")
    with open_store(tmp_path / "run.h5") as joined, open_store(tmp_path / "whole.h5") as whole:
        assert len(joined) == first == 8718
        assert joined.ids.tolist() == whole.ids.tolist()
        for name in ("density", "kept", "live", "same_class", "missing", "diagnostics/completeness"):
            np.testing.assert_array_equal(joined.column("random@0.5", name), whole.column("random@0.5", name))
        np.testing.assert_array_equal(joined.packed("random@0.5"), whole.packed("random@0.5"))


def test_a_finished_store_is_extended_in_place(path: Path, tmp_path: Path) -> None:
    more = synthetic_store(tmp_path / "more.h5", n=2, first=6, scores={"neuron_mct": "float16"}, thumbnails=True)
    before = path.read_bytes()
    merge_stores([path, more], path)
    with open_store(path) as store, open_store(io.BytesIO(before)) as old:
        assert store.ids.tolist() == [f"photo-{row:04d}.jpg" for row in range(8)]
        np.testing.assert_array_equal(store.packed(KEY)[:6], old.packed(KEY))
        np.testing.assert_array_equal(store.thumbnail(5), old.thumbnail(5))


def test_a_part_with_other_chunks_is_packed_anew(path: Path, tmp_path: Path) -> None:
    other = synthetic_store(tmp_path / "other.h5", n=2, first=6, scores={"neuron_mct": "float16"}, thumbnails=True)
    with open_store(other) as store:
        expected = store.packed(KEY)
    with h5py.File(other, "r+") as file:
        del file[f"pathways/{KEY}/mask"]
        file[f"pathways/{KEY}"].create_dataset("mask", data=expected, chunks=(2, 7))
    merge_stores([path, other], tmp_path / "joined.h5")
    with open_store(tmp_path / "joined.h5") as store:
        np.testing.assert_array_equal(store.packed(KEY)[6:], expected)


def changed_header(**changes: Any) -> Callable[[Header, Rows], tuple[Header, Rows]]:
    return lambda header, rows: (replace(header, **changes), rows)


def changed_pathway(**changes: Any) -> Callable[[Header, Rows], tuple[Header, Rows]]:
    return lambda header, rows: (
        header,
        replace(rows, pathways={**rows.pathways, KEY: replace(rows.pathways[KEY], **changes)}),
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed_header(), None),
        (changed_header(created="2030-01-01", versions='{"torch": "3"}'), None),
        (
            changed_header(model="zoo:other", fingerprint="ab"),
            r"of zoo:other.*of zoo:synthetic.*its fingerprint differs",
        ),
        (changed_header(micro_batch=8), "micro_batch differs: expected 4, found 8"),
        (changed_header(threads=2), "threads differs: expected 1, found 2"),
        (changed_header(precision="float64"), "precision differs: expected float32, found float64"),
        (changed_header(target="labels"), "target differs"),
        (changed_header(classes=("cat",)), "classes differs"),
        (
            changed_header(edges=np.array([[-1, 0], [0, 4]])),
            r"edges differs: expected number 1: \[0, 1\], found \[0, 4\]",
        ),
        (changed_pathway(parameters={"steps": 51}), r'parameters of neuron_mct@0.9 differs.*"steps": 50.*"steps": 51'),
        (
            lambda header, rows: (header, replace(rows, pathways={KEY: rows.pathways[KEY]})),
            r"pathway keys differs: expected neuron_mct@0.9, neuron_mct@0.99.*found neuron_mct@0.9;",
        ),
        (lambda header, rows: (header, replace(rows, scores={})), "tables differs: expected scores/neuron_mct/scale"),
        (
            lambda header, rows: (header, replace(rows, thumbnails=np.zeros((2, 9, 9, 3), np.uint8))),
            r"type of samples/thumbnails differs: expected uint8 \(6, 5, 3\), found uint8 \(9, 9, 3\)",
        ),
    ],
)
def test_a_part_of_another_job_is_refused_by_name_and_field(
    path: Path, tmp_path: Path, change: Callable[[Header, Rows], tuple[Header, Rows]], said: str | None
) -> None:
    index = synthetic_index()
    rows = synthetic_rows(index, 2, first=6, scores={"neuron_mct": "float16"}, thumbnails=True)
    write_store(tmp_path / "odd.h5", *change(synthetic_header(index), rows))
    if said is None:
        merge_stores([path, tmp_path / "odd.h5"], tmp_path / "out.h5")
        return
    with pytest.raises(StoreError, match=said) as found:
        merge_stores([path, tmp_path / "odd.h5"], tmp_path / "out.h5")
    assert str(tmp_path / "odd.h5") in str(found.value)
    assert leftovers(tmp_path) == {"run.h5", "odd.h5"}


def test_a_part_of_another_index_names_the_first_site_that_differs(path: Path, tmp_path: Path) -> None:
    index = synthetic_index()
    blocks = [(site.name, site.op, site.shape) for site in index.sites]
    blocks[1] = ("block.relu", "relu", (8, 5, 6))
    other = NeuronIndex.build(blocks, axes=[0, 0, 1, 0], folds=[1, 1, 3, 1])
    synthetic_store(tmp_path / "odd.h5", index=other, first=6)
    with pytest.raises(StoreError, match=r"sites differs: expected number 1: .*\(8, 5, 5\).*found .*\(8, 5, 6\)"):
        merge_stores([path, tmp_path / "odd.h5"], tmp_path / "out.h5")


def test_joining_nothing_or_one_sample_twice_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="at least one part"):
        merge_stores([], tmp_path / "out.h5")
    with pytest.raises(StoreError, match=r"id 'photo-0000.jpg', which is in .*run.h5"):
        merge_stores([path, path], tmp_path / "out.h5")


def test_notes_of_parts_are_united(tmp_path: Path) -> None:
    index, parts = synthetic_index(), []
    for number, notes in enumerate([{"job": "abc", "rank": 0}, {"job": "abc", "rank": 1, "smaller_batch": 2}]):
        parts.append(tmp_path / f"{number}.h5")
        synthetic_store(parts[-1], n=1, first=number, index=index, header=synthetic_header(index, notes=notes))
    merge_stores(parts, tmp_path / "run.h5")
    with open_store(tmp_path / "run.h5") as store:
        assert store.header.notes == {"job": "abc", "rank": 0, "smaller_batch": 2}
