"""Writing: the whole file or nothing, and only what fits."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from processes import leftovers, run
from synthetic import synthetic_header, synthetic_index, synthetic_rows, synthetic_store

import fxpath.parts
from fxpath.errors import StoreError
from fxpath.neurons import NeuronIndex
from fxpath.store import Header, PathwayRows, Rows, merge_stores, open_store, write_store

KEY = "neuron_mct@0.9"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    return synthetic_store(folder / "run.h5", n=6, failed=[2], scores={"neuron_mct": "float16"}, thumbnails=True)


@pytest.fixture
def path(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sound, tmp_path / "run.h5"))


def changed_header(**changes: Any) -> Callable[[Header, Rows], tuple[Header, Rows]]:
    return lambda header, rows: (replace(header, **changes), rows)


def changed_pathway(**changes: Any) -> Callable[[Header, Rows], tuple[Header, Rows]]:
    return lambda header, rows: (
        header,
        replace(rows, pathways={**rows.pathways, KEY: replace(rows.pathways[KEY], **changes)}),
    )


def test_a_full_disk_leaves_nothing_and_says_what_to_do(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = synthetic_store(tmp_path / "other.h5", n=1, first=6, scores={"neuron_mct": "float16"}, thumbnails=True)
    before, names = path.read_bytes(), leftovers(tmp_path)
    index = synthetic_index()
    write = fxpath.parts.write_chunk
    for fail_at in (0, 1, 7, 30):
        for work in (
            lambda: write_store(path, synthetic_header(index), synthetic_rows(index, 2)),
            lambda: merge_stores([path, other], path),
        ):
            calls = iter(range(10**6))

            def full(*arguments: Any) -> None:
                if next(calls) >= fail_at:  # noqa: B023
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                write(*arguments)

            monkeypatch.setattr(fxpath.parts, "write_chunk", full)
            with pytest.raises(StoreError, match="No space left on device") as found:
                work()
            assert str(path) in str(found.value)
            assert "free disk space" in str(found.value)
            assert leftovers(tmp_path) == names
            assert path.read_bytes() == before


@pytest.mark.parametrize("exception", [KeyboardInterrupt, MemoryError, OSError])
def test_any_exception_before_the_rename_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exception: type[BaseException]
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise exception("now")

    monkeypatch.setattr(fxpath.parts, "rename", interrupted)
    with pytest.raises(StoreError if exception is OSError else exception, match="now"):
        synthetic_store(tmp_path / "run.h5")
    assert leftovers(tmp_path) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on file sizes")
def test_a_file_that_may_not_grow_leaves_nothing(tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
from synthetic import synthetic_store
from fxpath.errors import StoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 2_000, 20_000, 40_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        synthetic_store(Path(sys.argv[1]) / "run.h5", n=6)
    except StoreError as problem:
        print(limit, "File too large" in str(problem), sorted(Path(sys.argv[1]).iterdir()))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
synthetic_store(Path(sys.argv[1]) / "run.h5", n=6)
"""
    found = run(script, tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [f"{limit} True []" for limit in (0, 2_000, 20_000, 40_000)]
    with open_store(tmp_path / "run.h5") as store:
        assert len(store) == 6


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("kill_at", [1, 25, 60, "rename"])
def test_a_killed_writer_leaves_no_final_file_and_the_next_one_works(tmp_path: Path, kill_at: int | str) -> None:
    script = """
import itertools, os, signal, sys
from pathlib import Path
import fxpath.parts
from synthetic import synthetic_store
when, calls = sys.argv[2], itertools.count(1)
write = fxpath.parts.write_chunk
def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
def write_or_die(*arguments):
    if str(next(calls)) == when:
        kill()
    write(*arguments)
if when == "rename":
    fxpath.parts.rename = kill
fxpath.parts.write_chunk = write_or_die
synthetic_store(Path(sys.argv[1]))
"""
    path = tmp_path / "run.h5"
    assert run(script, path, kill_at).returncode == -signal.SIGKILL
    assert leftovers(tmp_path) <= {".run.h5.tmp"}
    assert run(script, path, "never").returncode == 0
    assert leftovers(tmp_path) == {"run.h5"}
    with open_store(path) as store:
        assert len(store) == 6


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: folder / "missing" / "run.h5",
        lambda folder: (folder / "run.h5").mkdir() or folder / "run.h5",
        lambda folder: ((folder / "file").write_text("") and None) or folder / "file" / "run.h5",
    ],
)
def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path, spoil: Callable[[Path], Path]) -> None:
    path = spoil(tmp_path)
    names = leftovers(tmp_path)
    with pytest.raises(StoreError, match="choose a folder that exists") as found:
        synthetic_store(path)
    assert str(path) in str(found.value)
    assert leftovers(tmp_path) == names


def test_a_stale_temporary_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".run.h5.tmp").write_bytes(b"left by a killed run")
    synthetic_store(tmp_path / "run.h5")
    assert leftovers(tmp_path) == {"run.h5"}


def wrong_rows(**changes: Any) -> Callable[[Header, Rows], tuple[Header, Rows]]:
    return lambda header, rows: (header, replace(rows, **changes))


def wrong_sample(name: str, values: Any) -> Callable[[Header, Rows], tuple[Header, Rows]]:
    return lambda header, rows: (header, replace(rows, samples={**rows.samples, name: values}))


def wrong_column(name: str, values: Any) -> Callable[[Header, Rows], tuple[Header, Rows]]:
    def change(header: Header, rows: Rows) -> tuple[Header, Rows]:
        pathway = rows.pathways[KEY]
        return header, replace(rows, pathways={KEY: replace(pathway, columns={**pathway.columns, name: values})})

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (wrong_sample("id", ["a", "a", "b"]), "each id once, found 'a'"),
        (wrong_sample("id", ["a", "b"]), "expected 3 texts"),
        (wrong_sample("id", [1, 2, 3]), "expected 3 texts"),
        (wrong_sample("id", ["a", "b", "\udcff"]), "text that UTF-8 can hold"),
        (wrong_sample("id", ["a", "b", "c\0"]), "without a NUL"),
        (wrong_sample("label", [0.5, 1.0, 2.0]), "samples/label: expected numbers that int64 can hold, found float64"),
        (wrong_sample("lable", [0, 1, 2]), "nearest: label"),
        (wrong_sample("response", [[1.0], [2.0], [3.0]]), r"expected shape \(3,\), found \(3, 1\)"),
        (wrong_rows(samples={"id": ["a", "b", "c"]}), "expected a column 'label'"),
        (wrong_rows(active=np.zeros((3, 61), np.uint8)), r"active: expected shape \(3, 60\), found \(3, 61\)"),
        (wrong_rows(active=np.zeros((3, 60), np.int8)), None),  # whole numbers that fit are taken
        (wrong_rows(active=np.full((3, 60), 256)), "numbers that uint8 can hold, found int64"),
        (wrong_rows(thumbnails=np.zeros((3, 4, 4), np.uint8)), r"expected shape \(3, 4, 4, 3\)"),
        (wrong_rows(scores={"neuron_mct": (np.zeros((3, 465)), np.ones(3))}), r"expected shape \(3, 466\)"),
        (wrong_rows(scores={"neuron_mct@0.9": (np.zeros((3, 466)), np.ones(3))}), "a family without a sparsity"),
        (wrong_column("kept", np.full((3, 4), -1)), "numbers that uint32 can hold"),
        (wrong_column("kept", np.zeros((3, 5), np.uint32)), r"expected shape \(3, 4\), found \(3, 5\)"),
        (wrong_column("densty", np.zeros(3)), "nearest: density"),
        (wrong_column("diagnostics/a/b", np.zeros(3)), "there is no column 'diagnostics/a/b'"),
        (wrong_column("diagnostics/none", np.zeros((3, 0))), r"found \(3, 0\)"),
        (changed_pathway(columns={}), "expected a column 'mask'"),
        (changed_pathway(selector="dgr"), "expected selector 'neuron_mct'"),
        (changed_pathway(sparsity=0.8), "sparsity 0.9, found .* and 0.8"),
        (changed_pathway(parameters={"steps": object()}), "parameters that JSON can hold"),
        (wrong_rows(pathways={"Bad Key": PathwayRows("bad", {}, None, {})}), "pathway key: expected"),
        (wrong_rows(pathways={"random:b=1,a=2": PathwayRows("random", {}, None, {})}), "the form 'random:a=2,b=1'"),
        (changed_header(preprocessing="x" * 60_001), "attribute 'preprocessing'.*at most 60000 bytes.*found 60001"),
        (changed_header(preprocessing="x" * 60_000), None),
        (changed_header(notes={"version": 3}), "notes: .*found version"),
        (changed_header(notes={"list": [1]}), "expected text or a number, found list"),  # type: ignore[dict-item]
        (changed_header(versions="{"), "versions: expected JSON"),
        (changed_header(edges=np.array([[0, 5]])), "pairs of sites −1 … 4"),
        (changed_header(edges=np.zeros((0, 2))), None),
        (changed_header(index=NeuronIndex(synthetic_index().sites[1:])), "do not follow from the shapes"),
        (changed_header(index=NeuronIndex([])), "found 3 samples of 0 neurons"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, change: Callable[[Header, Rows], tuple[Header, Rows]], said: str | None
) -> None:
    index = synthetic_index()
    header, rows = change(synthetic_header(index, edges=np.zeros((0, 2))), synthetic_rows(index, 3))
    if said is None:
        write_store(tmp_path / "run.h5", header, rows)
        with open_store(tmp_path / "run.h5") as store:
            assert store.header.preprocessing == header.preprocessing
        return
    with pytest.raises(StoreError, match=said):
        write_store(tmp_path / "run.h5", header, rows)
    assert leftovers(tmp_path) == set()


def test_ids_get_the_width_asked_for(tmp_path: Path) -> None:
    index = synthetic_index()
    header, rows = synthetic_header(index), synthetic_rows(index, 2)
    write_store(tmp_path / "run.h5", header, rows, id_length=40)
    with h5py.File(tmp_path / "run.h5") as file:
        assert file["samples/id"].dtype == "S40"
    with pytest.raises(StoreError, match="at most 5 bytes, found 14: 'photo-0000"):
        write_store(tmp_path / "run.h5", header, rows, id_length=5)


def test_several_threads_deflate_to_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deflated, threads = fxpath.parts.deflated, set()

    def noted(block: Any) -> bytes:
        threads.add(threading.current_thread().name)
        return deflated(block)

    monkeypatch.setattr(fxpath.parts, "deflated", noted)
    monkeypatch.setattr(fxpath.parts, "_LARGE", 2**60)
    synthetic_store(tmp_path / "alone.h5", n=6, scores={"neuron_mct": "float16"}, thumbnails=True)
    assert threads == {threading.current_thread().name}
    monkeypatch.setattr(fxpath.parts, "_LARGE", 0)
    monkeypatch.setattr(fxpath.parts, "_AT_ONCE", 2)
    threads.clear()
    synthetic_store(tmp_path / "together.h5", n=6, scores={"neuron_mct": "float16"}, thumbnails=True)
    assert all(name.startswith("fxpath-deflate") for name in threads)
    assert (tmp_path / "alone.h5").read_bytes() == (tmp_path / "together.h5").read_bytes()


def test_a_large_table_is_deflated_by_two_threads_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deflated, calls, both = fxpath.parts.deflated, itertools.count(), threading.Barrier(2, timeout=30)

    def together(block: Any) -> bytes:
        if next(calls) < 2:
            both.wait()  # is broken, and raises, where one thread does all
        return deflated(block)

    monkeypatch.setattr(fxpath.parts, "deflated", together)
    monkeypatch.setattr(fxpath.parts.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    table = np.random.default_rng(0).integers(0, 256, (200, 30_000), dtype=np.uint8)
    with h5py.File(tmp_path / "table.h5", "w") as file:
        dataset = fxpath.parts.create_table(file, "active", table.shape, table.dtype)
        fxpath.parts.write_rows(dataset, 0, table)
    with h5py.File(tmp_path / "table.h5") as file:
        assert np.prod(np.ceil(np.divide(table.shape, file["active"].chunks))) > 2 * fxpath.parts._AT_ONCE
        np.testing.assert_array_equal(file["active"][:], table)


def test_running_out_of_memory_in_a_deflating_thread_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(block: Any) -> bytes:
        raise MemoryError("now")

    monkeypatch.setattr(fxpath.parts, "_LARGE", 0)
    monkeypatch.setattr(fxpath.parts, "deflated", exhausted)
    with pytest.raises(MemoryError, match="now"):
        synthetic_store(tmp_path / "run.h5")
    assert leftovers(tmp_path) == set()


DEFLATE = """
import hashlib, threading
import numpy as np
from fxpath.parts import deflated

digests = set()

def work():
    generator = np.random.default_rng(0)
    digest = hashlib.sha256()
    for size in (1, 8, 60, 200, 500, 2000, 16_000) * 50:
        digest.update(deflated(generator.integers(0, 4, size, dtype=np.uint8)))
    digests.add(digest.hexdigest())

work()
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(*digests)
"""


def test_small_blocks_deflate_to_the_same_bytes_in_every_thread_and_process() -> None:
    said = {run(DEFLATE).stdout for _ in range(6)}
    assert len(said) == 1
    assert len(said.pop().split()) == 1
