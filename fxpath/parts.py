"""Writing a store, or a part of one, in a single step that happens or does not."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from .errors import FxpathError, StoreError, unknown
from .hdf5 import TEXT, Array, reading
from .neurons import NeuronIndex
from .schema import (
    ATTRIBUTE,
    HEADER_ATTRIBUTES,
    SAMPLE_COLUMNS,
    SCHEMA,
    VERSION,
    Header,
    PathwayRows,
    Rows,
    check_header,
    chunk_shape,
    parse_key,
    pathway_columns,
)

_LEVEL = 1  # deflate: higher levels gain a few per cent on pathway bits and take several times as long
_SMALL = 2**14  # bytes of a block
_LARGE = 2**20  # bytes from which on more threads than one deflate a table
_AT_ONCE = 64  # chunks of it, so that few wait in memory to be written
_DIAGNOSTIC = re.compile(r"diagnostics/\w[\w.-]*")
_DEFAULTS: dict[str, Any] = {"prediction": -1, "label_rank": -1}


@dataclass(frozen=True)
class StoredPathway:
    """What a pathway's attributes say; `parameters` is JSON with sorted names, so that equal sets are equal text."""

    selector: str
    parameters: str
    sparsity: float | None


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
    pathways = {key: _described(key, pathway) for key, pathway in rows.pathways.items()}
    tables = _tables(header, rows, id_length)
    with appearing(Path(path)) as file:
        write_header(file, header, pathways, complete)
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


def write_header(file: h5py.File, header: Header, pathways: Mapping[str, StoredPathway], complete: bool) -> None:
    """Write all that is not by sample: root attributes, sites, classes and the pathways' attributes, in order."""
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
    for name, array in _site_tables(header).items():
        write_rows(create_table(file, name, array.shape, array.dtype), 0, array)
    group = file.create_group("pathways", track_order=True)
    for key, pathway in pathways.items():
        below = group.create_group(key)
        _set(below, "selector", pathway.selector)
        _set(below, "parameters", pathway.parameters)
        _set(below, "sparsity", math.nan if pathway.sparsity is None else float(pathway.sparsity))
    file.create_group("scores", track_order=True)


def _site_tables(header: Header) -> dict[str, Array]:
    sites = header.index.sites
    tables = {
        "sites/name": _text([site.name for site in sites], "site names"),
        "sites/op": _text([site.op for site in sites], "site operations"),
        "sites/shape": _text([json.dumps(site.shape) for site in sites], "site shapes"),
        "sites/axis": np.array([site.axis for site in sites], dtype="<i8"),
        "sites/fold": np.array([site.fold for site in sites], dtype="<i8"),
        "sites/first_neuron": np.array([site.start for site in sites], dtype="<i8"),
        "sites/first_byte": np.array([site.byte for site in sites], dtype="<i8"),
        "sites/neurons": np.array([site.neurons for site in sites], dtype="<i8"),
        "sites/edges": np.asarray(header.edges, dtype="<i4").reshape(-1, 2),
    }
    if header.classes:
        tables["classes"] = _text(header.classes, "class names")
    return tables


def _set(of: h5py.Group, name: str, value: str | int | float) -> None:
    if isinstance(value, str):
        text = _text([value], f"attribute {name!r}")[0]
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


def _text(values: Sequence[object] | Array, what: str, width: int | None = None) -> npt.NDArray[np.bytes_]:
    """Text as fixed-length UTF-8 `(n,)`, as wide as the longest or `width`."""
    try:
        encoded = [str(value).encode() for value in values]
    except UnicodeEncodeError as problem:
        raise StoreError(f"{what}: expected text that UTF-8 can hold, found {problem.object!r}; rename it") from None
    longest = max(encoded, key=len, default=b"")
    if any(text.endswith(b"\0") for text in encoded):
        raise StoreError(f"{what}: expected text without a NUL at its end, where fixed-length text ends; rename it")
    if width is not None and len(longest) > width:
        raise StoreError(f"{what}: expected at most {width} bytes, found {len(longest)}: {longest.decode()!r}")
    return np.array(encoded, dtype=f"S{width or max(len(longest), 1)}")


def _described(key: str, pathway: PathwayRows) -> StoredPathway:
    parsed = parse_key(key)
    if (parsed.selector, parsed.sparsity) != (pathway.selector, pathway.sparsity):
        raise StoreError(
            f"pathway {key}: expected selector {parsed.selector!r} and sparsity {parsed.sparsity}, found "
            f"{pathway.selector!r} and {pathway.sparsity}; key and rows must agree"
        )
    try:
        return StoredPathway(pathway.selector, json.dumps(dict(pathway.parameters), sort_keys=True), pathway.sparsity)
    except (TypeError, ValueError) as problem:
        raise StoreError(f"pathway {key}: expected parameters that JSON can hold: {problem}") from None


def _tables(header: Header, rows: Rows, id_length: int | None) -> dict[str, Array]:
    """All per-sample tables of a file by path, converted to their stored types and checked against the index."""
    index, count = header.index, len(rows)
    if not (count and index.nbytes):
        raise StoreError(
            f"a store: expected samples and neurons, found {count} samples of {index.size} neurons; there is nothing "
            "to write"
        )
    for name in rows.samples:
        if name not in SAMPLE_COLUMNS:
            raise StoreError(f"samples: {unknown('column', name, SAMPLE_COLUMNS)}")
    tables: dict[str, Array] = {}
    for name, dtype in SAMPLE_COLUMNS.items():
        values = rows.samples.get(name, np.full(count, _DEFAULTS[name]) if name in _DEFAULTS else None)
        if values is None:
            raise StoreError(f"samples: expected a column {name!r}, found {', '.join(rows.samples)}")
        tables[f"samples/{name}"] = _converted(
            values, f"samples/{name}", dtype, (count,), width=id_length if name == "id" else None
        )
    ids = tables["samples/id"]
    if len(np.unique(ids)) != count:
        values, times = np.unique(ids, return_counts=True)
        raise StoreError(f"samples/id: expected each id once, found {values[times > 1][0].decode()!r} more than once")
    tables["active"] = _converted(rows.active, "active", "|u1", (count, index.nbytes))
    if rows.thumbnails is not None:
        height_width = np.shape(rows.thumbnails)[1:3]
        tables["samples/thumbnails"] = _converted(
            rows.thumbnails, "samples/thumbnails", "|u1", (count, *height_width, 3)
        )
    if rows.units is not None:
        tables["samples/units"] = _converted(rows.units, "samples/units", "<u4", (count, len(index)))
    for key, pathway in rows.pathways.items():
        tables |= _pathway_tables(key, pathway, index, count)
    for family, (signed, scale) in rows.scores.items():
        if parse_key(family).sparsity is not None:
            raise StoreError(f"scores: expected a family without a sparsity, found {family!r}")
        kind = np.dtype(getattr(signed, "dtype", object)).newbyteorder("<").str
        wanted = kind if kind in ("<f2", "<f4") else "<f4"
        tables[f"scores/{family}/signed"] = _converted(signed, f"scores/{family}", wanted, (count, index.size))
        tables[f"scores/{family}/scale"] = _converted(scale, f"scale of scores/{family}", "<f4", (count,))
    return tables


def _pathway_tables(key: str, pathway: PathwayRows, index: NeuronIndex, count: int) -> dict[str, Array]:
    known = pathway_columns(index)
    tables: dict[str, Array] = {}
    for name, values in {"missing": [""] * count, **pathway.columns}.items():
        what = f"pathways/{key}/{name}"
        if _DIAGNOSTIC.fullmatch(name):
            array = np.asarray(values)
            kind = TEXT if array.dtype.kind in "SUO" else array.dtype.newbyteorder("<").str
            tables[what] = _converted(values, what, kind, (count, *array.shape[1:]))
        elif name in known:
            dtype, tail = known[name]
            tables[what] = _converted(values, what, dtype or TEXT, (count, *tail))
        else:
            raise StoreError(f"pathway {key}: {unknown('column', name, [*known, 'diagnostics/<name>'])}")
    if f"pathways/{key}/mask" not in tables:
        raise StoreError(f"pathway {key}: expected a column 'mask', found {', '.join(pathway.columns)}")
    return tables


def _converted(values: Any, what: str, dtype: str, shape: tuple[int | None, ...], *, width: int | None = None) -> Array:
    """Values as the array that is stored; a `StoreError` where the shape is wrong or the type would lose something."""
    if dtype == TEXT:
        texts = list(values)  # not an array of str, which would drop a NUL at the end
        if len(texts) != shape[0] or len(shape) != 1 or not all(isinstance(text, str | bytes) for text in texts):
            raise StoreError(f"{what}: expected {shape[0]} texts, one a sample, found {str(texts)[:80]}")
        return _text([text.decode() if isinstance(text, bytes) else text for text in texts], what, width)
    array = np.asarray(values)
    if array.shape != shape or 0 in shape:
        raise StoreError(f"{what}: expected shape {shape}, found {array.shape}; rows and index must fit each other")
    wanted = np.dtype(dtype)
    if array.dtype.kind in "iu" and wanted.kind in "iu":
        bounds = np.iinfo(wanted)
        fits = int(array.min()) >= bounds.min and int(array.max()) <= bounds.max
    else:
        fits = array.dtype.kind in "biuf" and np.can_cast(array.dtype, wanted, casting="same_kind")
    if not fits:
        raise StoreError(f"{what}: expected numbers that {wanted} can hold, found {array.dtype}; convert them first")
    return array.astype(wanted, copy=False)
