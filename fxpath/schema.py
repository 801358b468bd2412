"""What a store holds and where: its tables and attributes, and the checks that they fit each other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import h5py
import numpy as np
import numpy.typing as npt

from .errors import SparsityError, StoreError, unknown
from .hdf5 import (
    TEXT,
    Array,
    Source,
    attribute,
    attribute_or_none,
    holds,
    member,
    name_of,
    open_hdf5,
    read,
    read_text,
    reading,
    refuse,
    table,
)
from .keys import PathwayKey
from .maptables import MapRows
from .neurons import Granularity, NeuronIndex, Site

SCHEMA = "fxpath"
VERSION = 1

CHUNK = 256 * 1024  # bytes of the largest chunk that is written
ATTRIBUTE = 60_000  # bytes; HDF5 itself ends at 64 KiB

Kind = tuple[str | None, tuple[int | None, ...]]  # dtype (None: any of fixed length) and the shape of a sample's entry

SAMPLE_COLUMNS: dict[str, str] = {
    "id": TEXT,
    "label": "<i8",
    "target": "<i8",
    "prediction": "<i8",
    "label_rank": "<i8",
    "response": "<f4",
    "probability": "<f4",
    "status": TEXT,
}
_BY_SAMPLE = re.compile(r"active|pathways/[^/]+/mask|scores/[^/]+/signed|maps/[^/]+/signed|samples/thumbnails")
_SITE_TABLES = {
    "name": TEXT,
    "op": TEXT,
    "shape": TEXT,
    "axis": "<i8",
    "fold": "<i8",
    "first_neuron": "<i8",
    "first_byte": "<i8",
    "neurons": "<i8",
}
HEADER_ATTRIBUTES = frozenset(
    (
        *("schema", "version", "complete", "model", "fingerprint", "input_shape", "preprocessing", "granularity"),
        *("micro_batch", "threads", "precision", "target", "response", "versions", "created"),
    )
)


@dataclass(frozen=True, eq=False)
class Header:
    """What a store says of the network and the job: its root attributes, site index, site graph and class names.

    `edges` `(m, 2)` int32 is the site graph: −1 is the input, `len(index.sites)` the response. `input_shape` and
    `versions` are JSON; `created` is a UTC time in ISO form; `notes` become further root attributes.
    """

    model: str
    fingerprint: str
    index: NeuronIndex
    edges: npt.NDArray[np.int32]
    classes: tuple[str, ...] = ()
    input_shape: str = ""
    preprocessing: str = ""
    micro_batch: int = field(kw_only=True)
    threads: int = field(kw_only=True)
    precision: str = "float32"
    target: str = "predicted"
    response: str = "logit"
    versions: str = "{}"
    created: str = ""
    notes: Mapping[str, str | int | float] = field(default_factory=dict)

    def identity(self) -> dict[str, object]:
        """The fields in which two stores must agree to hold samples of one job, as values that `==` compares."""
        return {
            "fingerprint": self.fingerprint,
            "granularity": self.index.granularity,
            "sites": self.index.sites,
            "edges": np.asarray(self.edges).reshape(-1, 2).tolist(),
            "micro_batch": self.micro_batch,
            "threads": self.threads,
            "precision": self.precision,
            "target": self.target,
            "response": self.response,
            "input_shape": self.input_shape,
            "preprocessing": self.preprocessing,
            "classes": self.classes,
        }


@dataclass(frozen=True, eq=False)
class PathwayRows:
    """One pathway key for n samples.

    `parameters` is the whole parameter set of the selector. `columns` holds "mask" `(n, nbytes)` uint8 and, as far as
    they are known, "density", "response", "probability", "dropped_response", "seconds" `(n,)` float, "same_class"
    `(n,)` bool, "kept", "live" `(n, sites)` uint32, "missing" `(n,)` text (why a sample has no such pathway, else
    "") and "diagnostics/<name>" `(n, …)` of any fixed-length type.
    """

    selector: str
    parameters: Mapping[str, Any]
    sparsity: float | None
    columns: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Rows:
    """n samples that were computed together: one part file, or a whole small store.

    `samples` holds the columns of `SAMPLE_COLUMNS`, each `(n,)`; "prediction" and "label_rank" may be left out.
    `active` `(n, nbytes)` uint8 is the original activation pattern. `scores` maps a family to signed values `(n, N)`
    float16 or float32 and a scale `(n,)`; a score is their product. `thumbnails` `(n, h, w, 3)` uint8. `units`
    `(n, sites)`: the scalar units of each site that are a sample's own, where padding tokens are excluded. `maps` are
    attribution maps by key.
    """

    samples: Mapping[str, Any]
    active: npt.NDArray[np.uint8]
    pathways: Mapping[str, PathwayRows] = field(default_factory=dict)
    scores: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)
    thumbnails: npt.NDArray[np.uint8] | None = None
    units: npt.NDArray[np.integer[Any]] | None = None
    maps: Mapping[str, MapRows] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.active)


def pathway_columns(index: NeuronIndex) -> dict[str, Kind]:
    """The columns that a pathway may have besides diagnostics: dtype and shape of a sample's entry."""
    by_site = (len(index.sites),)
    return {
        "mask": ("|u1", (index.nbytes,)),
        "density": ("<f8", ()),
        "response": ("<f8", ()),
        "probability": ("<f8", ()),
        "dropped_response": ("<f8", ()),
        "seconds": ("<f8", ()),
        "same_class": ("|b1", ()),
        "missing": (TEXT, ()),
        "kept": ("<u4", by_site),
        "live": ("<u4", by_site),
    }


def chunk_shape(path: str, rows: int, tail: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """The chunks of a per-sample table: one row in even pieces of at most `CHUNK` bytes, or many short rows.

    >>> chunk_shape("active", 5, (1_694_464,), 1)
    (1, 242067)
    """
    row = math.prod(tail) * itemsize
    if tail and (row > CHUNK or _BY_SAMPLE.fullmatch(path)):
        pieces = -(-row // CHUNK)
        return (1, -(-tail[0] // max(pieces, 1)), *tail[1:])
    return (min(max(CHUNK // 8 // max(row, 1), 1), max(rows, 1)), *tail)


def moves_as_it_is(path: str) -> bool:
    """Whether a table has one sample to a chunk, so that a merge need not look into its chunks."""
    return _BY_SAMPLE.fullmatch(path) is not None


def parse_key(text: str) -> PathwayKey:
    """A pathway key or family as it is written in a store; raises `StoreError` where the text is not canonical."""
    try:
        key = PathwayKey.parse(text)
    except SparsityError as problem:
        raise StoreError(f"pathway key {text!r}: {problem}") from None
    if str(key) != text:
        raise StoreError(f"pathway key: expected the form {str(key)!r}, found {text!r}")
    return key


def open_file(source: Source, expected: str = SCHEMA) -> h5py.File:
    """Open a store's HDF5 file for reading and check schema and version; an open file is taken as it is."""
    file = open_hdf5(source)
    try:
        with reading(file, "the root attributes"):
            if not h5py.h5a.exists(file.id, b"schema"):
                raise StoreError(
                    f"{name_of(file)}: expected a store (root attribute schema = {expected!r}), found an HDF5 file "
                    "without it; give a file that `fxpath compute` wrote"
                )
            schema, version = attribute(file, "schema", str), attribute(file, "version", int)
            if schema != expected or version != VERSION:
                hint = "update fxpath" if schema == expected and version > VERSION else "compute it again"
                raise StoreError(
                    f"{name_of(file)}: expected schema {expected!r} version {VERSION}, found {schema!r} version "
                    f"{version}; {hint}"
                )
    except BaseException:
        if file is not source:
            file.close()
        raise
    return file


def read_header(file: h5py.File) -> Header:
    """Everything in a store that is not by sample; raises `StoreError` where it is damaged or contradicts itself."""
    texts = {
        name: attribute(file, name, str)
        for name in (
            "model",
            "fingerprint",
            "input_shape",
            "preprocessing",
            "precision",
            "target",
            "response",
            "versions",
            "created",
        )
    }
    with reading(file, "the root attributes"):
        notes = {name: attribute_or_none(file, name) for name in file.attrs if name not in HEADER_ATTRIBUTES}
    index, edges = _read_sites(file)
    classes: tuple[str, ...] = ()
    if holds(file, "classes"):
        classes = tuple(read_text(table(file, "classes", TEXT, (None,))).tolist())
    header = Header(
        **texts,
        index=index,
        edges=edges,
        classes=classes,
        micro_batch=attribute(file, "micro_batch", int),
        threads=attribute(file, "threads", int),
        notes={name: value for name, value in notes.items() if value is not None},
    )
    with reading(file, "the header"):
        check_header(header)
    return header


def _read_sites(file: h5py.File) -> tuple[NeuronIndex, npt.NDArray[np.int32]]:
    group = member(file, "sites", h5py.Group)
    count = table(group, "name", TEXT, (None,)).shape[0]
    tables = {name: table(group, name, dtype, (count,)) for name, dtype in _SITE_TABLES.items()}
    edges = read(table(group, "edges", "<i4", (None, 2)))
    texts = {name: read_text(tables[name]).tolist() for name in ("name", "op", "shape")}
    numbers = {name: read(tables[name]).tolist() for name in ("axis", "fold", "first_neuron", "first_byte", "neurons")}
    granularity = attribute(file, "granularity", str)
    with reading(file, "/sites"):
        shapes = [tuple(json.loads(text)) for text in texts["shape"]]
        if any(type(size) is not int or size < 0 for shape in shapes for size in shape):
            raise ValueError("a shape is not a JSON list of whole numbers")
        places = (numbers[name] for name in ("first_neuron", "first_byte", "neurons", "axis", "fold"))
        sites = [Site(*values) for values in zip(texts["name"], texts["op"], shapes, *places, strict=True)]
        return NeuronIndex(sites, cast("Granularity", granularity)), edges


def check_header(header: Header) -> None:
    """Raise `ValueError` where a header contradicts itself; readers and writers ask."""
    for name, text in (("input_shape", header.input_shape), ("versions", header.versions)):
        try:
            json.loads(text or "null")
        except ValueError as problem:
            raise ValueError(f"{name}: expected JSON, found {text[:80]!r} ({problem})") from None
    index, edges = header.index, np.asarray(header.edges)
    if index.granularity not in ("unit", "channel"):
        raise ValueError(f"granularity: expected unit or channel, found {index.granularity!r}")
    if len({site.name for site in index.sites}) != len(index.sites):
        raise ValueError("sites: expected each name once, found one twice")
    for site in index.sites:
        if not 0 <= site.axis < max(len(site.shape), 1):
            raise ValueError(f"site {site.name}: expected a channel axis within {site.shape}, found {site.axis}")
    if NeuronIndex.from_json(index.to_json()) != index:
        raise ValueError("sites: the numbers of neurons or their places do not follow from the shapes")
    if edges.size and not (edges.ndim == 2 and edges.shape[1] == 2 and -1 <= edges.min() <= edges.max() <= len(index)):
        raise ValueError(f"edges: expected pairs of sites −1 … {len(index)}, found shape {edges.shape}: {edges.max()}")


def active_table(file: h5py.File, index: NeuronIndex) -> h5py.Dataset:
    """The table /active, checked against the index; its length is the number of samples."""
    return table(file, "active", "|u1", (None, index.nbytes))


def sample_tables(file: h5py.File, count: int, sites: int) -> dict[str, h5py.Dataset]:
    """The tables of /samples by column name, "thumbnails" and "units" only where there are any."""
    group = member(file, "samples", h5py.Group)
    tables = {name: table(group, name, dtype, (count,)) for name, dtype in SAMPLE_COLUMNS.items()}
    if holds(group, "thumbnails"):
        tables["thumbnails"] = table(group, "thumbnails", "|u1", (count, None, None, 3))
    if holds(group, "units"):
        tables["units"] = table(group, "units", "<u4", (count, sites))
    return tables


def names_below(file: h5py.File, group: str) -> tuple[str, ...]:
    """The keys in /pathways or /scores in the order in which they were written, () where there is no such group."""
    if not holds(file, group):
        return ()
    with reading(file, f"/{group}"):
        names = tuple(member(file, group, h5py.Group))
        for name in names:
            try:
                key = parse_key(name)
            except StoreError as problem:
                raise StoreError(f"{name_of(file)}: /{group}: {problem}") from None
            if group == "scores" and key.sparsity is not None:
                raise StoreError(f"{name_of(file)}: /scores: expected a family, found {name!r} with a sparsity")
        return names


def pathway_group(file: h5py.File, key: str) -> h5py.Group:
    """The group of one pathway."""
    found: h5py.Group = member(member(file, "pathways", h5py.Group), key, h5py.Group)
    return found


def pathway_names(group: h5py.Group, index: NeuronIndex) -> tuple[str, ...]:
    """The columns that one pathway has, "mask" first, diagnostics as "diagnostics/<name>"; none is looked into."""
    known = pathway_columns(index)
    with reading(group, group.name):
        names: list[str] = []
        for name in dict.fromkeys(("mask", *group)):
            if name == "diagnostics":
                names += (f"diagnostics/{inner}" for inner in member(group, name, h5py.Group))
            elif name in known:
                names.append(name)
            else:
                raise StoreError(f"{name_of(group)}: {group.name}: {unknown('column', name, known)}")
        return tuple(names)


def pathway_table(group: h5py.Group, name: str, index: NeuronIndex, count: int) -> h5py.Dataset:
    """The table of one column of a pathway, checked."""
    below, _, inner = name.rpartition("/")
    if below:
        group = member(group, below, h5py.Group)
        rank = len(member(group, inner, h5py.Dataset).id.shape)
        return table(group, inner, None, (count, *[None] * (rank - 1)))
    dtype, tail = pathway_columns(index)[name]
    return table(group, name, dtype, (count, *tail))


def score_tables(file: h5py.File, family: str, index: NeuronIndex, count: int) -> dict[str, h5py.Dataset]:
    """The tables "signed" `(n, N)` and "scale" `(n,)` of one family's scores, checked."""
    group = member(member(file, "scores", h5py.Group), family, h5py.Group)
    signed = table(group, "signed", None, (count, index.size))
    with reading(file, f"/scores/{family}/signed"):
        if signed.dtype.str not in ("<f2", "<f4"):
            refuse(signed, "float16 or float32", signed.dtype.str)
    return {"signed": signed, "scale": table(group, "scale", "<f4", (count,))}


def pathway_attributes(group: h5py.Group) -> tuple[str, dict[str, Any], float | None]:
    """Selector, whole parameter set and sparsity of one pathway."""
    with reading(group, "a pathway's name"):
        parsed = parse_key(group.name.rpartition("/")[2])
    selector, sparsity = attribute(group, "selector", str), attribute(group, "sparsity", float)
    with reading(group, f"attribute 'parameters' of {group.name}"):
        parameters = json.loads(attribute(group, "parameters", str))
        if not isinstance(parameters, dict):
            raise ValueError(f"expected a JSON object, found {str(parameters)[:80]}")
    share = None if math.isnan(sparsity) else sparsity
    if (selector, share) != (parsed.selector, parsed.sparsity):
        raise StoreError(
            f"{name_of(group)}: {group.name}: expected selector {parsed.selector!r} and sparsity {parsed.sparsity}, "
            f"found {selector!r} and {share}; the file is damaged: compute it again"
        )
    return selector, parameters, share
