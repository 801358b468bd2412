"""Ways to spoil a whole store: other values, types, layouts and links in the place of an object."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from processes import leftovers

from fxpath.errors import StoreError
from fxpath.store import merge_stores


def replaced(name: str, make: Callable[[h5py.Group, str, Any], object]) -> Callable[[h5py.File], None]:
    """Delete an object of a whole store and put another in its place."""

    def change(file: h5py.File) -> None:
        group, _, last = name.rpartition("/")
        parent = file[group] if group else file
        old = parent[last][...] if isinstance(parent[last], h5py.Dataset) else None
        del parent[last]
        make(parent, last, old)

    return change


def rewritten(name: str, convert: Callable[[Any], Any], **options: Any) -> Callable[[h5py.File], None]:
    """The same table with other values, type or layout, chunked and deflated unless told otherwise."""
    return replaced(
        name,
        lambda group, last, old: group.create_dataset(
            last, data=convert(old), **({"compression": "gzip", "chunks": True} | options)
        ),
    )


def attribute(name: str, value: Any, of: str = "/") -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[of].attrs[name]
        if value is not None:
            file[of].attrs[name] = value

    return change


def linked(name: str, link: object) -> Callable[[h5py.File], None]:
    return replaced(name, lambda group, last, old: group.__setitem__(last, link))


def wider(old: Any) -> Any:
    return np.pad(old, ((0, 0), (0, 1)))


def virtual(group: h5py.Group, name: str, old: Any) -> None:
    layout = h5py.VirtualLayout(old.shape, old.dtype)
    layout[...] = h5py.VirtualSource("other.h5", "data", old.shape)
    group.create_virtual_dataset(name, layout)


def huge(shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str = "u1") -> Callable[[h5py.Group, str, Any], None]:
    return lambda group, name, old: group.create_dataset(name, shape, dtype, chunks=chunks, compression="gzip")


def joined(path: Path, spoil: Callable[[h5py.File], object], good: Path) -> bool:
    """Whether a spoiled store is joined with a good one, the only other file of the folder; else nothing is left."""
    with h5py.File(path, "r+") as file:
        spoil(file)
    try:
        merge_stores([good, path], path.with_name("joined.h5"))
    except StoreError as problem:
        assert str(path) in str(problem)  # noqa: PT017
        assert leftovers(path.parent) == {good.name, path.name}
        return False
    return True
