"""Joining the parts of one job along their samples, chunk by chunk, after a look at every one of them."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from .columns import StoredPathway
from .errors import StoreError
from .hdf5 import Array, attribute, read, read_text, reading
from .parts import appearing, create_table, move_rows, write_header, write_rows
from .schema import (
    Header,
    active_table,
    moves_as_it_is,
    names_below,
    open_file,
    pathway_attributes,
    pathway_group,
    pathway_names,
    pathway_table,
    read_header,
    sample_tables,
    score_tables,
)


def merge_stores(
    parts: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    complete: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Join stores of one job along their samples, in the order given, into one file at `path`.

    Compressed chunks move as they are and memory does not grow with the samples. `path` may be one of the parts.
    Root notes are united, the first part's wins. `progress(done, total)` is told of samples. Raises `StoreError`
    that names the part and the field where a part is damaged, of another model, job or layout, or repeats an id.
    """
    if not parts:
        raise StoreError(f"{path}: joining needs at least one part, found none; give the part files of one job")
    surveys = []
    seen: dict[str, Path] = {}
    for part in map(Path, parts):
        surveys.append(_survey(part, seen))
        _compare(surveys[0], surveys[-1])
    first = surveys[0]
    total = sum(survey.samples for survey in surveys)
    notes = {name: value for survey in reversed(surveys) for name, value in survey.header.notes.items()}
    with appearing(Path(path)) as file:
        write_header(file, replace(first.header, notes=notes), first.pathways, complete)
        writers = {}
        for name, (dtype, tail) in first.tables.items():
            width = max(survey.tables[name][0].itemsize for survey in surveys) if dtype.kind == "S" else dtype.itemsize
            merged = np.dtype(f"S{width}") if dtype.kind == "S" else dtype
            writers[name] = _Joined(create_table(file, name, (total, *tail), merged))
        done = 0
        for survey in surveys:
            with open_file(survey.path) as source:
                for name, writer in writers.items():
                    with reading(source, name):
                        rows = h5py.Dataset(h5py.h5d.open(source.id, name.encode()))
                    writer.append(rows)
            done += survey.samples
            if progress is not None:
                progress(done, total)
        for writer in writers.values():
            writer.flush()


class _Joined:
    """One table of a merged file: takes the parts' tables one after the other, with at most a few chunks in memory."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self.dataset = dataset
        self.position = 0
        self.waiting: list[Array] = []
        self.chunks = dataset.chunks
        self.by_sample = moves_as_it_is(dataset.name.lstrip("/"))

    def append(self, source: h5py.Dataset) -> None:
        """Add all rows of a checked table; raises `StoreError` where it is damaged."""
        if self.by_sample and source.chunks == self.chunks and source.compression == "gzip":
            move_rows(self.dataset, self.position, source)
            self.position += source.shape[0]
            return
        rows, *tail = source.id.shape
        step = max(1, 2**24 // max(1, math.prod(tail) * source.id.dtype.itemsize))
        for start in range(0, rows, step):
            block = read(source, slice(start, start + step))
            self.waiting.append(block.astype(f"S{self.dataset.dtype.itemsize}") if block.dtype.kind == "S" else block)
            self.flush(self.chunks[0])

    def flush(self, multiple: int = 1) -> None:
        """Write what waits, in whole multiples of so many rows."""
        count = sum(map(len, self.waiting)) // multiple * multiple
        if count:
            block = np.concatenate(self.waiting)
            write_rows(self.dataset, self.position, block[:count])
            self.position += count
            self.waiting = [block[count:]]


@dataclass(frozen=True)
class _Survey:
    path: Path
    header: Header
    pathways: dict[str, StoredPathway]
    tables: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
    samples: int


def _survey(path: Path, seen: dict[str, Path]) -> _Survey:
    """Open a part and look at all its tables; its ids are added to `seen`."""
    with open_file(path) as file:
        header = read_header(file)
        attribute(file, "complete", int)
        tables = {"active": active_table(file, header.index)}
        count = tables["active"].shape[0]
        tables |= {f"samples/{name}": table for name, table in sample_tables(file, count, len(header.index)).items()}
        for name in read_text(tables["samples/id"]).tolist():
            if name in seen:
                raise StoreError(
                    f"{path}: expected samples that no other part has, found id {name!r}, which is in {seen[name]} "
                    "too; give each part once, and each sample one id"
                )
            seen[name] = path
        pathways = {}
        for key in names_below(file, "pathways"):
            group = pathway_group(file, key)
            selector, parameters, sparsity = pathway_attributes(group)
            pathways[key] = StoredPathway(selector, json.dumps(parameters, sort_keys=True), sparsity)
            for name in pathway_names(group, header.index):
                tables[f"pathways/{key}/{name}"] = pathway_table(group, name, header.index, count)
        for family in names_below(file, "scores"):
            found = score_tables(file, family, header.index, count)
            tables |= {f"scores/{family}/{name}": table for name, table in found.items()}
        kinds = {name: (table.id.dtype, table.id.shape[1:]) for name, table in tables.items()}
        return _Survey(path, header, pathways, kinds, count)


def _compare(first: _Survey, other: _Survey) -> None:
    """Raise `StoreError` where two parts are not of one job, naming the part and the field."""
    ours, theirs = first.header.identity(), other.header.identity()
    for name in ours:
        if ours[name] != theirs[name]:
            _differ(first, other, name, *_where(ours[name], theirs[name]))
    if first.pathways.keys() != other.pathways.keys():
        _differ(first, other, "pathway keys", ", ".join(first.pathways), ", ".join(other.pathways))
    for key, pathway in first.pathways.items():
        if pathway != other.pathways[key]:
            _differ(first, other, f"parameters of {key}", pathway.parameters, other.pathways[key].parameters)
    if first.tables.keys() != other.tables.keys():
        ours_only, theirs_only = first.tables.keys() - other.tables.keys(), other.tables.keys() - first.tables.keys()
        _differ(first, other, "tables", ", ".join(sorted(ours_only)) or "no others", ", ".join(sorted(theirs_only)))
    for name, (dtype, tail) in first.tables.items():
        found, shape = other.tables[name]
        if tail != shape or (dtype != found and not dtype.kind == found.kind == "S"):
            _differ(first, other, f"type of {name}", f"{dtype} {tail}", f"{found} {shape}")


def _where(ours: object, theirs: object) -> tuple[object, object]:
    """The first place where two sequences differ, else the values themselves."""
    if isinstance(ours, tuple | list) and isinstance(theirs, tuple | list):
        for number, (one, two) in enumerate(itertools.zip_longest(ours, theirs)):
            if one != two:
                return f"number {number}: {one}", two
    return ours, theirs


def _differ(first: _Survey, other: _Survey, name: str, ours: object, theirs: object) -> None:
    raise StoreError(
        f"{other.path} (of {other.header.model}): cannot be joined with {first.path} (of {first.header.model}): its "
        f"{name} differs: expected {str(ours)[:400]}, found {str(theirs)[:400] or 'none'}; only parts of one job make "
        "one store"
    )
