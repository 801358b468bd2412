"""Attribution maps in a store: the group /maps, its tables and attributes, and the checks that they fit each other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from .errors import StoreError, unknown
from .hdf5 import TEXT, Array, attribute, holds, member, name_of, reading, table
from .keys import checked_map_key

MAP_PART = "fxpath maps"  # the schema of a file that holds some samples' maps and no more
MAP_COLUMNS: dict[str, str] = {"signed": "<f2", "scale": "<f4", "seconds": "<f8", "missing": TEXT}
MAP_REDUCTIONS = ("signed_max", "signed_sum")


@dataclass(frozen=True, eq=False)
class MapRows:
    """The maps of one method for n samples.

    `parameters` is the method's whole parameter set. `columns` holds "signed" `(n, H, W)` float16 and "scale" `(n,)`
    float32, whose product is the map, NaN where there is none; "missing" `(n,)` text, why there is none, else ""; and
    "seconds" `(n,)`. `reduction` says what became of channels: "signed_max" keeps the value of largest magnitude with
    its sign, so that its absolute value is the paper's score; "signed_sum" their sum.
    """

    parameters: Mapping[str, Any]
    reduction: str
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class StoredMap:
    """What a map's attributes say; `parameters` is JSON with sorted names, so that equal sets are equal text."""

    parameters: str
    reduction: str


def scaled(maps: Array) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """Maps `(n, H, W)` that are finite in float32 as float16 and a scale `(n,)` float32, whose product they are.

    The scale is a power of two, so that nothing but the rounding to float16 changes a value, by at most one part in
    2048: a sample's largest |value| comes to 2¹⁴ … 2¹⁵, a quarter to half of what float16 holds, and values down to a
    2⁻²⁸ of it are as exact. Smaller ones round to steps of at most 2⁻³⁸ of it, but never to 0, which stays 0 alone.

    >>> values, scale = scaled(np.array([[[0.0, -3.0, 1e-20]]]))
    >>> scale.item(), values.tolist()
    (0.0001220703125, [[[0.0, -24576.0, 5.960464477539063e-08]]])
    """
    largest = np.abs(maps).max(axis=(1, 2)).astype(np.float64)
    exponent = np.frexp(largest)[1] - 15
    # above 2⁻¹⁰² every float16 times the scale is a normal number in float32
    scale = np.ldexp(np.float32(1), np.where(largest > 0, np.maximum(exponent, -102), 0))
    divided = maps / scale[:, None, None].astype(np.float64)
    values = divided.astype(np.float16)
    lost = (values == 0) & (divided != 0)
    values[lost] = np.copysign(np.finfo(np.float16).smallest_subnormal, divided[lost])
    return values, scale


def map_names(file: h5py.File) -> tuple[str, ...]:
    """The keys in /maps in the order in which they were written, () where there is no such group."""
    if not holds(file, "maps"):
        return ()
    with reading(file, "/maps"):
        names = tuple(member(file, "maps", h5py.Group))
        for name in names:
            try:
                checked_map_key(name)
            except StoreError as problem:
                raise StoreError(f"{name_of(file)}: /maps: {problem}") from None
        return names


def map_tables(file: h5py.File, key: str, count: int) -> dict[str, h5py.Dataset]:
    """The tables of one method's maps by column, checked: "signed" `(n, H, W)`, all others `(n,)`."""
    group = _group(file, key)
    with reading(group, group.name):
        for name in group:
            if name not in MAP_COLUMNS:
                raise StoreError(f"{name_of(group)}: {group.name}: {unknown('column', name, MAP_COLUMNS)}")
    size = (None, None)
    return {
        name: table(group, name, dtype, (count, *(size if name == "signed" else ())))
        for name, dtype in MAP_COLUMNS.items()
    }


def map_attributes(file: h5py.File, key: str) -> StoredMap:
    """Whole parameter set and reduction of one method's maps."""
    group = _group(file, key)
    method, reduction = attribute(group, "method", str), attribute(group, "reduction", str)
    with reading(group, f"attribute 'parameters' of {group.name}"):
        parameters = json.loads(attribute(group, "parameters", str))
        if not isinstance(parameters, dict):
            raise ValueError(f"expected a JSON object, found {str(parameters)[:80]}")
    if method != key:
        raise StoreError(
            f"{name_of(group)}: {group.name}: expected the method {key!r}, found {method!r}; the file is damaged: "
            "compute it again"
        )
    if reduction not in MAP_REDUCTIONS:
        raise StoreError(f"{name_of(group)}: {group.name}: {unknown('reduction', reduction, MAP_REDUCTIONS)}")
    return StoredMap(json.dumps(parameters, sort_keys=True), reduction)


def _group(file: h5py.File, key: str) -> h5py.Group:
    found: h5py.Group = member(member(file, "maps", h5py.Group), key, h5py.Group)
    return found
