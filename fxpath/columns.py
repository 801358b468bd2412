"""Header and rows as the arrays that a store keeps, converted to their stored types and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import StoreError, unknown
from .hdf5 import TEXT, Array
from .keys import checked_map_key
from .maptables import MAP_COLUMNS, MAP_REDUCTIONS, MapRows, StoredMap
from .neurons import NeuronIndex
from .schema import SAMPLE_COLUMNS, Header, PathwayRows, Rows, parse_key, pathway_columns

_DIAGNOSTIC = re.compile(r"diagnostics/\w[\w.-]*")
_DEFAULTS: dict[str, Any] = {"prediction": -1, "label_rank": -1}


@dataclass(frozen=True)
class StoredPathway:
    """What a pathway's attributes say; `parameters` is JSON with sorted names, so that equal sets are equal text."""

    selector: str
    parameters: str
    sparsity: float | None


def sample_arrays(header: Header, rows: Rows, id_length: int | None) -> dict[str, Array]:
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
        tables[f"samples/{name}"] = converted(
            values, f"samples/{name}", dtype, (count,), width=id_length if name == "id" else None
        )
    ids = tables["samples/id"]
    if len(np.unique(ids)) != count:
        values, times = np.unique(ids, return_counts=True)
        raise StoreError(f"samples/id: expected each id once, found {values[times > 1][0].decode()!r} more than once")
    tables["active"] = converted(rows.active, "active", "|u1", (count, index.nbytes))
    if rows.thumbnails is not None:
        height_width = np.shape(rows.thumbnails)[1:3]
        tables["samples/thumbnails"] = converted(
            rows.thumbnails, "samples/thumbnails", "|u1", (count, *height_width, 3)
        )
    if rows.units is not None:
        tables["samples/units"] = converted(rows.units, "samples/units", "<u4", (count, len(index)))
    for key, pathway in rows.pathways.items():
        tables |= _pathway_arrays(key, pathway, index, count)
    for family, (signed, scale) in rows.scores.items():
        if parse_key(family).sparsity is not None:
            raise StoreError(f"scores: expected a family without a sparsity, found {family!r}")
        kind = np.dtype(getattr(signed, "dtype", object)).newbyteorder("<").str
        wanted = kind if kind in ("<f2", "<f4") else "<f4"
        tables[f"scores/{family}/signed"] = converted(signed, f"scores/{family}", wanted, (count, index.size))
        tables[f"scores/{family}/scale"] = converted(scale, f"scale of scores/{family}", "<f4", (count,))
    return tables | map_arrays(rows.maps, count)


def map_arrays(maps: Mapping[str, MapRows], count: int) -> dict[str, Array]:
    """The tables of maps by path, converted to their stored types and checked."""
    tables: dict[str, Array] = {}
    for key, rows in maps.items():
        if rows.columns.keys() != MAP_COLUMNS.keys():
            found = ", ".join(rows.columns) or "none"
            raise StoreError(f"map {key}: expected the columns {', '.join(MAP_COLUMNS)}, found {found}")
        signed = np.asarray(rows.columns["signed"])
        if signed.ndim != 3 or signed.dtype != np.float16:
            raise StoreError(
                f"map {key}: expected signed values ({count}, H, W) in float16, found {signed.shape} in "
                f"{signed.dtype}; divide them by their scale first"
            )
        for name, dtype in MAP_COLUMNS.items():
            tail = signed.shape[1:] if name == "signed" else ()
            tables[f"maps/{key}/{name}"] = converted(rows.columns[name], f"maps/{key}/{name}", dtype, (count, *tail))
    return tables


def described_map(key: str, rows: MapRows) -> StoredMap:
    """What is written of maps besides their rows; raises `StoreError` where key or reduction cannot be."""
    checked_map_key(key)
    if rows.reduction not in MAP_REDUCTIONS:
        raise StoreError(f"map {key}: {unknown('reduction', rows.reduction, MAP_REDUCTIONS)}")
    return StoredMap(_json(f"map {key}", rows.parameters), rows.reduction)


def _pathway_arrays(key: str, pathway: PathwayRows, index: NeuronIndex, count: int) -> dict[str, Array]:
    known = pathway_columns(index)
    tables: dict[str, Array] = {}
    for name, values in {"missing": [""] * count, **pathway.columns}.items():
        what = f"pathways/{key}/{name}"
        if _DIAGNOSTIC.fullmatch(name):
            array = np.asarray(values)
            kind = TEXT if array.dtype.kind in "SUO" else array.dtype.newbyteorder("<").str
            tables[what] = converted(values, what, kind, (count, *array.shape[1:]))
        elif name in known:
            dtype, tail = known[name]
            tables[what] = converted(values, what, dtype or TEXT, (count, *tail))
        else:
            raise StoreError(f"pathway {key}: {unknown('column', name, [*known, 'diagnostics/<name>'])}")
    if f"pathways/{key}/mask" not in tables:
        raise StoreError(f"pathway {key}: expected a column 'mask', found {', '.join(pathway.columns)}")
    return tables


def described(key: str, pathway: PathwayRows) -> StoredPathway:
    """What is written of a pathway besides its rows; raises `StoreError` where its key and rows disagree."""
    parsed = parse_key(key)
    if (parsed.selector, parsed.sparsity) != (pathway.selector, pathway.sparsity):
        raise StoreError(
            f"pathway {key}: expected selector {parsed.selector!r} and sparsity {parsed.sparsity}, found "
            f"{pathway.selector!r} and {pathway.sparsity}; key and rows must agree"
        )
    return StoredPathway(pathway.selector, _json(f"pathway {key}", pathway.parameters), pathway.sparsity)


def _json(what: str, parameters: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(parameters), sort_keys=True)
    except (TypeError, ValueError) as problem:
        raise StoreError(f"{what}: expected parameters that JSON can hold: {problem}") from None


def site_tables(header: Header) -> dict[str, Array]:
    """All tables that are not by sample, by path: sites, their graph, class names."""
    sites = header.index.sites
    tables = {
        "sites/name": stored_text([site.name for site in sites], "site names"),
        "sites/op": stored_text([site.op for site in sites], "site operations"),
        "sites/shape": stored_text([json.dumps(site.shape) for site in sites], "site shapes"),
        "sites/axis": np.array([site.axis for site in sites], dtype="<i8"),
        "sites/fold": np.array([site.fold for site in sites], dtype="<i8"),
        "sites/first_neuron": np.array([site.start for site in sites], dtype="<i8"),
        "sites/first_byte": np.array([site.byte for site in sites], dtype="<i8"),
        "sites/neurons": np.array([site.neurons for site in sites], dtype="<i8"),
        "sites/edges": np.asarray(header.edges, dtype="<i4").reshape(-1, 2),
    }
    if header.classes:
        tables["classes"] = stored_text(header.classes, "class names")
    return tables


def stored_text(values: Sequence[object] | Array, what: str, width: int | None = None) -> npt.NDArray[np.bytes_]:
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


def converted(values: Any, what: str, dtype: str, shape: tuple[int | None, ...], *, width: int | None = None) -> Array:
    """Values as the array that is stored; a `StoreError` where the shape is wrong or the type would lose something."""
    if dtype == TEXT:
        texts = list(values)  # not an array of str, which would drop a NUL at the end
        if len(texts) != shape[0] or len(shape) != 1 or not all(isinstance(text, str | bytes) for text in texts):
            raise StoreError(f"{what}: expected {shape[0]} texts, one a sample, found {str(texts)[:80]}")
        return stored_text([text.decode() if isinstance(text, bytes) else text for text in texts], what, width)
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
