"""Joining the parts of one job along their samples, chunk by chunk, after a look at every one of them."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from .columns import StoredPathway
from .errors import StoreError
from .hdf5 import TEXT, Array, attribute, read, read_text, reading, table
from .maptables import MAP_PART, StoredMap, map_attributes, map_names, map_tables
from .parts import appearing, create_table, move_rows, write_header, write_rows
from .schema import (
    HEADER_ATTRIBUTES,
    SCHEMA,
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

_MEMBERS = frozenset(("sites", "classes", "samples", "active", "pathways", "scores", "maps"))


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
    that names the part and the field where a part is damaged, of another model, job or layout, repeats an id, or has
    maps that another lacks.
    """
    if not parts:
        raise StoreError(f"{path}: joining needs at least one part, found none; give the part files of one job")
    surveys = []
    seen: dict[str, Path] = {}
    for part in map(Path, parts):
        surveys.append(_survey_store(part, seen))
        _compare_stores(surveys[0], surveys[-1])
    first = surveys[0]
    total = sum(survey.samples for survey in surveys)
    notes = {name: value for survey in reversed(surveys) for name, value in survey.header.notes.items()}
    with appearing(Path(path)) as file:
        write_header(file, replace(first.header, notes=notes), first.pathways, first.maps, complete)
        _join(file, surveys, lambda done: None if progress is None else progress(done, total))


def add_maps(
    path: str | os.PathLike[str],
    parts: Sequence[str | os.PathLike[str]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Add to the store at `path` the maps of all its samples, from parts that `write_map_part` wrote, in order.

    The store with its maps is a new file that takes the old one's name: all that was there moves as it is. Raises
    `StoreError` where a part is damaged, of other samples or methods, or has maps that are there already, and where
    the store holds what would be lost.
    """
    old = _survey_store(Path(path), {})
    require_nothing_foreign(old.path)
    surveys = [_survey_maps(Path(part)) for part in parts]
    for survey in surveys:
        _compare(surveys[0], survey)
    ids = [name for survey in surveys for name in survey.ids]
    if not surveys or ids != old.ids:
        raise StoreError(f"{path}: expected maps of its {old.samples} samples in order, found {len(ids)} of others")
    again = surveys[0].maps.keys() & old.maps.keys()
    if again:
        raise StoreError(f"{path}: expected maps that it does not have yet, found {', '.join(sorted(again))}")

    def told(done: int) -> None:
        if progress is not None:
            progress(done, 2 * old.samples)

    with appearing(old.path) as file:
        shutil.copymode(old.path, file.filename)
        write_header(file, old.header, old.pathways, old.maps | surveys[0].maps, old.complete)
        _join(file, [old], told)
        _join(file, surveys, lambda done: told(old.samples + done))


def check_map_part(path: str | os.PathLike[str], job: str, ids: Sequence[str]) -> None:
    """Read a part of maps to its last byte; raises `StoreError` where it is damaged, or another job's or samples'."""
    with open_file(path, MAP_PART) as file:
        names = read_text(table(file, "id", TEXT, (None,))).tolist()
        if attribute(file, "job", str) != job or names != list(ids):
            raise StoreError(f"{path}: expected samples of this job, found others")
        for found in _maps_of(file, len(names))[1].values():
            read(found)


def require_nothing_foreign(path: str | os.PathLike[str]) -> None:
    """Raise `StoreError` where a store cannot be written anew: damaged, or with what fxpath would lose."""
    with open_file(path) as file, reading(file, "/"):
        known = {*HEADER_ATTRIBUTES, *read_header(file).notes}
        foreign = [f"/{name}" for name in file if name not in _MEMBERS]
        foreign += [f"attribute {name!r}" for name in file.attrs if name not in known]
    if foreign:
        raise StoreError(
            f"{path}: it holds {', '.join(foreign[:5])}, which this version of fxpath does not know and would lose; "
            "keep that in a file of its own (an attribute: as fixed-length text), or update fxpath"
        )
    _survey_store(Path(path), {})  # also of what is not asked for: all of it moves


def _join(file: h5py.File, surveys: Sequence[_Survey], told: Callable[[int], None]) -> None:
    """Write the tables of the files looked at along their samples; `told` is told of samples."""
    total = sum(survey.samples for survey in surveys)
    writers = {}
    for name, (dtype, tail) in surveys[0].tables.items():
        width = max(survey.tables[name][0].itemsize for survey in surveys) if dtype.kind == "S" else dtype.itemsize
        merged = np.dtype(f"S{width}") if dtype.kind == "S" else dtype
        writers[name] = _Joined(create_table(file, name, (total, *tail), merged))
    done = 0
    for survey in surveys:
        with open_file(survey.path, survey.schema) as source:
            for name, writer in writers.items():
                with reading(source, name):
                    rows = h5py.Dataset(h5py.h5d.open(source.id, name.encode()))
                writer.append(rows)
        done += survey.samples
        told(done)
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
        whole = self.by_sample or source.id.shape == self.dataset.id.shape
        if whole and source.chunks == self.chunks and source.compression == "gzip":
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
    """What a file of some samples holds, and what a message calls it."""

    path: Path
    schema: str
    said: str
    ids: list[str]
    maps: dict[str, StoredMap]
    tables: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]

    @property
    def samples(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _StoreSurvey(_Survey):
    header: Header
    pathways: dict[str, StoredPathway]
    complete: bool


def _survey_store(path: Path, seen: dict[str, Path]) -> _StoreSurvey:
    """Open a store, or a part of one, and look at all its tables; its ids are added to `seen`."""
    with open_file(path) as file:
        header = read_header(file)
        complete = bool(attribute(file, "complete", int))
        tables = {"active": active_table(file, header.index)}
        count = tables["active"].shape[0]
        tables |= {f"samples/{name}": table for name, table in sample_tables(file, count, len(header.index)).items()}
        ids = read_text(tables["samples/id"]).tolist()
        for name in ids:
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
        maps, more = _maps_of(file, count)
        said = f"{path} (of {header.model})"
        return _StoreSurvey(path, SCHEMA, said, ids, maps, _kinds(tables | more), header, pathways, complete)


def _survey_maps(path: Path) -> _Survey:
    """Open a part that holds maps alone, and look at all its tables."""
    with open_file(path, MAP_PART) as file:
        names = table(file, "id", TEXT, (None,))
        maps, tables = _maps_of(file, names.shape[0])
        return _Survey(path, MAP_PART, str(path), read_text(names).tolist(), maps, _kinds(tables))


def _maps_of(file: h5py.File, count: int) -> tuple[dict[str, StoredMap], dict[str, h5py.Dataset]]:
    tables: dict[str, h5py.Dataset] = {}
    for key in map_names(file):
        tables |= {f"maps/{key}/{name}": found for name, found in map_tables(file, key, count).items()}
    return {key: map_attributes(file, key) for key in map_names(file)}, tables


def _kinds(tables: dict[str, h5py.Dataset]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    return {name: (table.id.dtype, table.id.shape[1:]) for name, table in tables.items()}


def _compare_stores(first: _StoreSurvey, other: _StoreSurvey) -> None:
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
    _compare(first, other)


def _compare(first: _Survey, other: _Survey) -> None:
    """Raise `StoreError` where two files have other maps or tables of another kind."""
    if first.maps.keys() != other.maps.keys():
        _differ(first, other, "map keys", ", ".join(first.maps) or "none", ", ".join(other.maps))
    for key, made in first.maps.items():
        if made != other.maps[key]:
            _differ(first, other, f"parameters of the maps {key}", made, other.maps[key])
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
        f"{other.said}: cannot be joined with {first.said}: its {name} differs: expected {str(ours)[:400]}, found "
        f"{str(theirs)[:400] or 'none'}; only parts of one job make one store"
    )
