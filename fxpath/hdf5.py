"""HDF5 that may be damaged or hostile: objects, attributes and tables are checked before they are read."""

from __future__ import annotations

import itertools
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, NoReturn, TypeAlias, TypeVar, cast

import h5py
import numpy as np
import numpy.typing as npt

from .errors import FxpathError, StoreError

TEXT = "text"  # how `table` calls fixed-length strings

Array = npt.NDArray[Any]
Source: TypeAlias = str | os.PathLike[str] | IO[bytes] | h5py.File
_Value = TypeVar("_Value", str, int, float)

_LARGEST_CHUNK = 64 * 2**20  # bytes
_DEFLATE = 1032  # no deflate stream expands further
_SMALL = 2**20  # bytes; what a file without any table may claim is hardly less


@contextmanager
def reading(file: object, what: str) -> Iterator[None]:
    """Turn whatever HDF5, zlib or a broken value raises into a `StoreError` that names the file and the object."""
    try:
        yield
    except FxpathError:
        raise
    except (
        OSError,
        RuntimeError,
        LookupError,
        ValueError,
        TypeError,
        ArithmeticError,
        AttributeError,
        MemoryError,
        zlib.error,
    ) as problem:
        raise StoreError(
            f"{name_of(file)}: cannot read {what}: {' '.join(str(problem).split()) or type(problem).__name__}. The "
            "file is damaged or was not written by fxpath: copy it again, or compute it again"
        ) from problem


def name_of(source: object) -> str:
    """How a message names a file, a path or an open file."""
    if isinstance(source, h5py.HLObject):
        return str(source.file.filename) if source else "closed store"
    return os.fspath(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", source))


def open_hdf5(source: Source) -> h5py.File:
    """Open an HDF5 file for reading by path or binary file; an open `h5py.File` is given back as it is."""
    if isinstance(source, h5py.File):
        return source
    name = name_of(source)
    try:
        return h5py.File(source, "r", locking="best-effort")
    except FileNotFoundError:
        raise StoreError(f"{name}: there is no such file; expected a store that `fxpath compute` wrote") from None
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, MemoryError) as problem:
        said = " ".join(str(problem).split())
        if isinstance(problem, IsADirectoryError) or os.path.isdir(name):
            said = "it is a folder"
        elif "file signature not found" in said:
            said = "it is no HDF5 file"
        raise StoreError(
            f"{name}: cannot open it as a store: {said}. Expected a whole HDF5 file: check the path, copy the file "
            "again, or compute it again"
        ) from problem


def attribute(of: h5py.Group, name: str, kind: type[_Value]) -> _Value:
    """A scalar attribute of fixed length as str, int or float; anything else is a `StoreError`."""
    what = f"attribute {name!r}"
    with reading(of, what):
        if not h5py.h5a.exists(of.id, name.encode()):
            raise StoreError(f"{name_of(of)}: expected {what}, found none; the file was not written by fxpath")
        value = attribute_or_none(of, name)
        if not isinstance(value, (int, float) if kind is float else kind):
            raise StoreError(
                f"{name_of(of)}: expected {what} to be a fixed-length {kind.__name__} scalar, found "
                f"{'another type' if value is None else repr(value)[:80]}; the file was not written by fxpath"
            )
        return kind(value)


def attribute_or_none(of: h5py.Group, name: str) -> str | int | float | None:
    """The value of an attribute, None where it is of a type that is not read (variable length, array, …)."""
    found = h5py.h5a.open(of.id, name.encode())
    stored = found.get_type()
    scalar = found.get_space().get_simple_extent_type() == h5py.h5s.SCALAR
    text = isinstance(stored, h5py.h5t.TypeStringID) and not stored.is_variable_str()
    number = isinstance(stored, h5py.h5t.TypeIntegerID | h5py.h5t.TypeFloatID)
    if not (scalar and (text or number) and stored.get_size() <= 2**16):
        return None
    value = np.empty((), dtype=found.dtype)
    found.read(value)
    plain = value[()].item() if number else bytes(value[()]).decode()
    return cast("str | int | float", plain)


def member(parent: h5py.Group, name: str, kind: type) -> Any:
    """A group or dataset right below `parent`, reached by a hard link; anything else is a `StoreError`."""
    with reading(parent, repr(name)):
        links = parent.id.links
        if not links.exists(name.encode()):
            raise StoreError(
                f"{name_of(parent)}: expected {kind.__name__.lower()} {_below(parent, name)}, found none; the file is "
                "not a whole store: compute it again"
            )
        hard = links.get_info(name.encode()).type == h5py.h5l.TYPE_HARD
        found = h5py.h5o.open(parent.id, name.encode()) if hard else None
        if not isinstance(found, h5py.h5g.GroupID if kind is h5py.Group else h5py.h5d.DatasetID):
            raise StoreError(
                f"{name_of(parent)}: expected {_below(parent, name)} to be a {kind.__name__.lower()} of this file, "
                f"found {'another kind of object' if hard else 'a soft or external link'}; links may point anywhere "
                "and are not followed: copy the data into the file"
            )
        return kind(found)


def holds(parent: h5py.Group, name: str) -> bool:
    """Whether there is anything of this name right below `parent`."""
    with reading(parent, repr(name)):
        return bool(parent.id.links.exists(name.encode()))


def _below(parent: h5py.Group, name: str) -> str:
    return f"{(parent.name or '').rstrip('/')}/{name}"


def table(parent: h5py.Group, name: str, dtype: str | None, shape: Sequence[int | None]) -> h5py.Dataset:
    """A dataset after its checks: chunked, plain deflate, fixed-length `dtype`, `shape` (None: any length), sane size.

    `dtype` is a numpy dtype's string, "text" for fixed-length strings, or None for any fixed-length type.
    """
    dataset: h5py.Dataset = member(parent, name, h5py.Dataset)
    with reading(parent, repr(name)):
        stored, sizes = dataset.id.dtype, dataset.id.shape
        found = _kind(dataset, stored)
        if found != dtype and (dtype or not (found == TEXT or stored.kind in "biuf")):
            refuse(dataset, dtype or "a fixed-length type", found)
        if len(sizes) != len(shape) or any(w not in (None, s) for w, s in zip(shape, sizes, strict=True)):
            wanted = ("any" if size is None else str(size) for size in shape)
            refuse(dataset, f"shape ({', '.join(wanted)})", f"{sizes}")
        plan = dataset.id.get_create_plist()
        layout = plan.get_layout()
        filters = [plan.get_filter(number)[0] for number in range(plan.get_nfilters())]
        if layout != h5py.h5d.CHUNKED or filters not in ([], [h5py.h5z.FILTER_DEFLATE]):
            kinds = ("compact", "contiguous or external", "chunked", "virtual")
            refuse(dataset, "chunked with deflate alone", f"{kinds[layout]} with filters {filters}")
        chunk = math.prod(plan.get_chunk()) * stored.itemsize
        if chunk > _LARGEST_CHUNK:
            refuse(dataset, f"chunks of at most {_LARGEST_CHUNK} bytes", f"{chunk}")
        size = math.prod(sizes) * stored.itemsize
        if size > _SMALL:
            bound = _DEFLATE * h5py.h5i.get_file_id(dataset.id).get_filesize()
            if size > bound:
                refuse(dataset, f"at most {bound} bytes, which is all that a file of this size can hold", f"{size}")
        return dataset


def _kind(dataset: h5py.Dataset, dtype: np.dtype[Any]) -> str:
    """A stored type as `table` names it; types that are never read are named so that no wanted one equals them."""
    stored = dataset.id.get_type()
    if isinstance(stored, h5py.h5t.TypeStringID):
        return "variable-length text" if stored.is_variable_str() else TEXT
    return str(dtype.str) if dtype.kind in "biuf" and not dtype.shape else f"type {dtype}"


def refuse(dataset: h5py.Dataset, expected: str, found: str) -> NoReturn:
    """Raise the `StoreError` that a table is not what it must be."""
    raise StoreError(
        f"{name_of(dataset)}: {dataset.name}: expected {expected}, found {found}; the file is damaged or was not "
        "written by fxpath: copy it again, or compute it again"
    )


def read(dataset: h5py.Dataset, *wanted: slice) -> Array:
    """The part of a checked dataset within `wanted` (steps of 1; a missing slice is the whole axis), inflated here.

    HDF5's own filter would inflate a chunk to whatever size it claims, and read a missing chunk as zeros.
    """
    with reading(dataset, dataset.name):
        bounds = [
            range(*(wanted[axis] if axis < len(wanted) else slice(None)).indices(size))
            for axis, size in enumerate(dataset.id.shape)
        ]
        stored, plan = dataset.id.dtype, dataset.id.get_create_plist()
        is_bool = stored == np.bool_
        dtype = np.dtype(np.uint8) if is_bool else stored
        out = np.empty([len(bound) for bound in bounds], dtype=dtype)
        chunks = plan.get_chunk()
        expected = math.prod(chunks) * dtype.itemsize
        buffer = np.empty(expected + expected // 64 + 64, dtype=np.uint8)
        filtered = plan.get_nfilters() > 0
        for corner in itertools.product(
            *(range(b.start // c * c, b.stop, c) if len(b) else b for b, c in zip(bounds, chunks, strict=True))
        ):
            skipped, payload = dataset.id.read_direct_chunk(corner, out=buffer)
            if filtered and not skipped & 1:
                stream = zlib.decompressobj()
                payload = stream.decompress(payload, expected + 1)
                if not stream.eof:
                    raise ValueError(f"the chunk at {corner} does not end after {expected} bytes")
            if len(payload) != expected:
                raise ValueError(f"the chunk at {corner}: expected {expected} bytes, found {len(payload)}")
            block = np.frombuffer(payload, dtype=dtype).reshape(chunks)
            inside, place = [], []
            for bound, chunk, first in zip(bounds, chunks, corner, strict=True):
                begin, end = max(bound.start, first), min(bound.stop, first + chunk)
                inside.append(slice(begin - first, end - first))
                place.append(slice(begin - bound.start, end - bound.start))
            out[tuple(place)] = block[tuple(inside)]
        return out != 0 if is_bool else out


def read_text(dataset: h5py.Dataset, *wanted: slice) -> npt.NDArray[np.str_]:
    """Fixed-length UTF-8 text as a numpy array of str."""
    stored = read(dataset, *wanted)
    with reading(dataset, dataset.name):
        return np.char.decode(stored, "utf-8")
