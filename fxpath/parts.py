"""Writing a store, or a part of one, in a single step that happens or does not."""

from __future__ import annotations

import itertools
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from isal import isal_zlib

from .columns import (
    StoredPathway,
    converted,
    described,
    described_map,
    map_arrays,
    sample_arrays,
    site_tables,
    stored_text,
)
from .errors import FxpathError, StoreError
from .hdf5 import TEXT, Array, reading
from .maptables import MAP_PART, MapRows, StoredMap
from .schema import ATTRIBUTE, HEADER_ATTRIBUTES, SCHEMA, VERSION, Header, Rows, check_header, chunk_shape

_LEVEL = 1  # deflate: higher levels gain a few per cent on pathway bits and take several times as long
_SMALL = 2**14  # bytes of a block
_LARGE = 2**20  # bytes from which on more threads than one deflate a table
_AT_ONCE = 64  # chunks of it, so that few wait in memory to be written


def write_store(
    path: str | os.PathLike[str],
    header: Header,
    rows: Rows,
    *,
    id_length: int | None = None,
    complete: bool = True,
) -> None:
    """Write n samples to `path`: the whole file appears under its name, or nothing does.

    `id_length` fixes the width of the ids in bytes (default: the longest). Raises `StoreError` where header and rows
    do not fit each other, a text is too long, or the file cannot be written.
    """
    try:
        check_header(header)
    except ValueError as problem:
        raise StoreError(f"{path}: cannot write the header: {problem}") from None
    pathways = {key: described(key, pathway) for key, pathway in rows.pathways.items()}
    maps = {key: described_map(key, one) for key, one in rows.maps.items()}
    tables = sample_arrays(header, rows, id_length)
    with appearing(Path(path)) as file:
        write_header(file, header, pathways, maps, complete)
        _write_tables(file, tables)


def write_map_part(path: str | os.PathLike[str], job: str, ids: Sequence[str], maps: Mapping[str, MapRows]) -> None:
    """Write the maps of some samples to a file that `merging.add_maps` takes; `job` names the job that made them."""
    described = {key: described_map(key, one) for key, one in maps.items()}
    tables = {"id": converted(ids, "ids", TEXT, (len(ids),)), **map_arrays(maps, len(ids))}
    with appearing(Path(path)) as file:
        _set(file, "schema", MAP_PART)
        _set(file, "version", VERSION)
        _set(file, "job", job)
        _write_maps(file, described)
        _write_tables(file, tables)


def _write_tables(file: h5py.File, tables: Mapping[str, Array]) -> None:
    for name, array in tables.items():
        write_rows(create_table(file, name, array.shape, array.dtype), 0, array)


# ---------------------------------------------------------------------------------------------------- one file


def write_chunk(dataset: h5py.Dataset, corner: tuple[int, ...], payload: bytes, skipped: int = 0) -> None:
    """The one place where a chunk reaches the file; `skipped` says which filters the payload did not pass."""
    dataset.id.write_direct_chunk(corner, payload, skipped)


def rename(temporary: Path, path: Path) -> None:
    """The one place where a file gets its final name."""
    os.replace(temporary, path)


def temporary_name(path: Path) -> Path:
    """Where a file is written before it gets its name: `run.h5` → `.run.h5.tmp` in the same folder."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def appearing(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file that gets its final name after it is whole and on the disk; on any exception it is gone."""
    temporary = temporary_name(path)
    try:
        temporary.unlink(missing_ok=True)  # a killed run's
        # From 1.10 on HDF5 can put a checksum on all of its own structures; damage is then found, not followed.
        file = h5py.File(temporary, "w", libver=("v110", "v110"), locking=False)
        try:
            yield file
        except BaseException:
            with suppress(OSError, RuntimeError):
                file.close()
            raise
        file.close()
        _sync(temporary, os.O_RDWR)
        rename(temporary, path)
        with suppress(OSError):  # not every file system lets a folder be synced; the file itself is
            _sync(path.parent, os.O_RDONLY)
    except BaseException as problem:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(problem, OSError | RuntimeError) and not isinstance(problem, FxpathError):
            said = " ".join(str(problem).split())
            raise StoreError(
                f"{path}: cannot write the store (under its temporary name {temporary.name}): {said}. Nothing was left "
                "behind; free disk space, or choose a folder that exists and that you may write to"
            ) from problem
        raise


def _sync(path: Path, flags: int) -> None:
    number = os.open(path, flags)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def deflated(block: Array) -> bytes:
    """A block as HDF5's deflate filter writes it.

    ISA-L is 5 to 8 times faster than zlib and lets other threads run, but may give a block other bytes (of the same
    content) in another process; zlib, for all that is small, never does.
    """
    data = np.ascontiguousarray(block).view(np.uint8).data
    packed: bytes = zlib.compress(data, _LEVEL) if data.nbytes < _SMALL else isal_zlib.compress(data, _LEVEL)
    return packed


def create_table(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> h5py.Dataset:
    """An empty table with its chunks, plain deflate and fixed-length type."""
    chunks = chunk_shape(name, shape[0], shape[1:], dtype.itemsize)
    growing = (h5py.h5s.UNLIMITED, *shape[1:]) if not shape[0] else None  # HDF5 has no chunks for an empty fixed table
    kind = h5py.string_dtype("utf-8", dtype.itemsize) if dtype.kind == "S" else dtype
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)  # in HDF5's own terms: create_dataset takes five times as long
    plan.set_chunk(chunks)
    plan.set_deflate(_LEVEL)
    plan.set_obj_track_times(False)
    link = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    link.set_create_intermediate_group(True)
    link.set_char_encoding(h5py.h5t.CSET_UTF8)
    space = h5py.h5s.create_simple(shape, growing)
    made = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(kind, logical=True), space, plan, link)
    return h5py.Dataset(made)


def write_rows(dataset: h5py.Dataset, start: int, array: Array) -> None:
    """Write rows from `start` on, which is the first row of a chunk; the last chunk is filled up with zeros."""
    chunks: tuple[int, ...] = dataset.chunks

    def payload(corner: tuple[int, ...]) -> bytes:
        piece = array[tuple(slice(first, first + chunk) for first, chunk in zip(corner, chunks, strict=True))]
        if piece.shape != chunks:
            padded = np.zeros(chunks, dtype=piece.dtype)
            padded[tuple(map(slice, piece.shape))] = piece
            piece = padded
        return deflated(piece)

    steps = (range(0, size, chunk) for size, chunk in zip(array.shape, chunks, strict=True))
    corners = list(itertools.product(*steps))
    with _deflating(array.nbytes) as each:
        for first in range(0, len(corners), _AT_ONCE):
            some = corners[first : first + _AT_ONCE]
            for corner, packed in zip(some, each(payload, some), strict=True):
                write_chunk(dataset, (start + corner[0], *corner[1:]), packed)


@contextmanager
def _deflating(size: int) -> Iterator[Callable[..., Iterable[bytes]]]:
    """How to deflate the chunks of `size` bytes, in order: several at once where there are enough of them."""
    if size < _LARGE:
        yield map
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(min(4, cores), thread_name_prefix="fxpath-deflate") as pool:
            yield pool.map


def move_rows(dataset: h5py.Dataset, start: int, source: h5py.Dataset) -> None:
    """Write all rows of `source`, which has the same chunks and filters, from row `start` on, deflated as they are."""
    for corner in itertools.product(
        *(range(0, size, chunk) for size, chunk in zip(source.shape, source.chunks, strict=True))
    ):
        with reading(source, source.name):
            skipped, payload = source.id.read_direct_chunk(corner)
        write_chunk(dataset, (start + corner[0], *corner[1:]), payload, skipped)


# ------------------------------------------------------------------------------------------- what goes into it


def write_header(
    file: h5py.File,
    header: Header,
    pathways: Mapping[str, StoredPathway],
    maps: Mapping[str, StoredMap],
    complete: bool,
) -> None:
    """Write all that is not by sample: root attributes, sites, classes, and what pathways and maps are, in order."""
    clash = HEADER_ATTRIBUTES & set(header.notes)
    if clash:
        raise StoreError(f"notes: expected names that the store does not use itself, found {', '.join(sorted(clash))}")
    values: dict[str, str | int | float] = {
        "schema": SCHEMA,
        "version": VERSION,
        "complete": int(complete),
        "model": header.model,
        "fingerprint": header.fingerprint,
        "input_shape": header.input_shape,
        "preprocessing": header.preprocessing,
        "granularity": header.index.granularity,
        "micro_batch": header.micro_batch,
        "threads": header.threads,
        "precision": header.precision,
        "target": header.target,
        "response": header.response,
        "versions": header.versions,
        "created": header.created,
        **header.notes,
    }
    for name, value in values.items():
        _set(file, name, value)
    _write_tables(file, site_tables(header))
    group = file.create_group("pathways", track_order=True)
    for key, pathway in pathways.items():
        below = group.create_group(key)
        _set(below, "selector", pathway.selector)
        _set(below, "parameters", pathway.parameters)
        _set(below, "sparsity", math.nan if pathway.sparsity is None else float(pathway.sparsity))
    file.create_group("scores", track_order=True)
    if maps:
        _write_maps(file, maps)


def _write_maps(file: h5py.File, maps: Mapping[str, StoredMap]) -> None:
    group = file.create_group("maps", track_order=True)
    for key, found in maps.items():
        below = group.create_group(key)
        for name, value in {"method": key, "parameters": found.parameters, "reduction": found.reduction}.items():
            _set(below, name, value)


def _set(of: h5py.Group, name: str, value: str | int | float) -> None:
    if isinstance(value, str):
        text = stored_text([value], f"attribute {name!r}")[0]
        if len(text) > ATTRIBUTE:
            raise StoreError(
                f"attribute {name!r} of {of.name}: expected at most {ATTRIBUTE} bytes of text, found {len(text)}; HDF5 "
                "keeps no longer ones in an attribute: shorten it"
            )
        of.attrs.create(name, text, dtype=h5py.string_dtype("utf-8", max(len(text), 1)))
    elif isinstance(value, int | np.integer):
        of.attrs.create(name, int(value), dtype="<i8")
    elif isinstance(value, float | np.floating):
        of.attrs.create(name, float(value), dtype="<f8")
    else:
        raise StoreError(f"attribute {name!r} of {of.name}: expected text or a number, found {type(value).__name__}")
