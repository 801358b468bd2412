"""Attribution maps of every sample of a store: as its pathways were computed, resumable, one new file at the end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from .attribution import Reduction
from .batch import compute
from .errors import InputError, RestrictionError, StoreError, unknown
from .given import checked_ids, checked_number, checked_path
from .items import Item, first_fit, read_fitting
from .keys import PathwayKey, checked_map_key
from .maprows import Known, MapRecipe, map_rows, parameters_of, picture_size, try_methods
from .maptables import MapRows
from .merging import add_maps, check_map_part, require_nothing_foreign
from .methods import Method, parse_method
from .network import Network
from .parted import Parted
from .parts import write_map_part
from .records import clear_parts, held, maps_folder, part_name, parts_found, read_record, remove_parts, require_same
from .responses import identity
from .store import Store, open_store
from .workers import Writer, read_ahead, settings

SAID = "attribute"
_MOST = {"micro_batch": 2**16, "threads": 2**12}  # that are taken from a store, which may be anyone's


@dataclass(frozen=True)
class MapReport:
    """What a job did: maps of `methods`, of which those `made` now and the others were there.

    Of so many `samples` those worked through now (`computed`) and those there before (`reused`). `missing` has for
    each method the samples without a map by id, with the reason.
    """

    path: Path
    samples: int
    methods: tuple[str, ...]
    made: tuple[str, ...]
    computed: int
    reused: int
    missing: dict[str, dict[str, str]]
    seconds: float


def attribute(
    network: Network,
    dataset: Any,
    path: str | os.PathLike[str],
    *,
    methods: Sequence[Method | str],
    reduction: Reduction = "max_abs",
    target: str | int | None = None,
    micro_batch: int | None = None,
    threads: int | None = None,
    thumbnails: int = 0,
    model: str = "",
    preprocessing: str = "",
    classes: Sequence[str] = (),
    progress: bool = True,
) -> MapReport:
    """Make attribution maps of every sample by `methods`, and keep them in the store at `path`, beside its pathways.

    The store is one that `fxpath.compute` made with this network of this data set; a pathway's gradient is that of the
    pathway in the store, and every map explains the class that the store's numbers are of. Where there is no file,
    it is computed first, with the pathways that the methods start from: `target` (default "predicted"),
    `micro_batch`, `threads`, `thumbnails`, `model`, `preprocessing` and `classes` are for that. Where there is a store,
    `target`, `micro_batch`, `threads` and `preprocessing`, if given, must be its own.

    Of the channels, `reduction` "signed_max" keeps the value of largest magnitude, signed, and "max_abs" the same, as
    its absolute value is the paper's score; "signed_sum" keeps their sum.

    Works in the store's micro-batches and threads, so that a sample's map does not depend on others. Finished
    micro-batches are part files in `<path>.maps`, and a job that was stopped goes on from them; the store gets its maps
    in a single step at the end. Maps that are there are not made again. Samples without a map are recorded with the
    reason. Raises `InputError` for a method that cannot work on this network and `StoreError` where the store is of
    another network, job or data set, or lacks a pathway.
    """
    started = time.perf_counter()
    if network._restriction is not None:
        raise RestrictionError("attribute: the network is restricted; leave the with block first")
    asked = checked_methods(methods)
    picture_size(network)
    kept = checked_reduction(reduction)
    place = checked_path(Path(path), said=SAID)
    place = place.resolve() if place.is_symlink() else place  # the new file takes the place of the store, not the link
    ids = checked_ids(dataset)
    folder = maps_folder(place)
    with held(folder, said=SAID):
        fresh = not os.path.lexists(place)
        if fresh:
            recipe = MapRecipe(asked, kept, 1)
            with settings(checked_number("threads", threads or torch.get_num_threads()), network.device):
                try_methods(network, recipe, first_fit(dataset, ids, network, said=SAID))
            compute(
                network, dataset, place, target="predicted" if target is None else target, micro_batch=micro_batch,
                threads=threads, thumbnails=thumbnails, model=model, preprocessing=preprocessing, classes=classes,
                progress=progress, **_needed(recipe),
            )  # fmt: skip
        before = _state(place)
        with open_store(place) as store:
            _require_network(store, network)
            options = {"preprocessing": preprocessing or None, "target": target, "micro_batch": micro_batch}
            _require_job(store, network, options | {"threads": threads})
            _require_samples(store, ids)
            left = {key: method for key, method in asked.items() if not _is_there(store, key, method, kept)}
            _forget_finished(folder, store)
            if not left:
                return _reported(store, place, asked, (), 0, started)
            recipe = MapRecipe(left, kept, _number(store, "micro_batch"))
            job = MapJob(network, dataset, place, store, recipe, ids)
            with settings(job.threads, network.device):
                job.found()
                if not fresh:
                    require_nothing_foreign(place)
                    try_methods(network, job.recipe, first_fit(dataset, ids, network, said=SAID))
                missing = job.prepare(progress=progress)
                computed = _make_parts(job, missing, progress=progress)
        if _state(place) != before:
            raise StoreError(
                f"attribute: {place} was changed while its maps were made, and is left as it is now; start again: the "
                f"maps are kept in {folder}"
            )
        _add(job, progress=progress)
        remove_parts(folder)
    with open_store(place) as store:
        return _reported(store, place, asked, tuple(left), computed, started)


class MapJob(Parted):
    """The maps of one store that are yet to be made."""

    said = SAID
    way_out = "start that one again to finish it, or remove that folder"

    def __init__(
        self, network: Network, dataset: Any, path: Path, store: Store, recipe: MapRecipe, ids: list[str]
    ) -> None:
        self.network, self.dataset, self.path, self.store = network, dataset, path, store
        self.recipe, self.ids, self.folder = recipe, ids, maps_folder(path)
        self.threads = _number(store, "threads")
        self.table = store.samples()
        for key, method in recipe.methods.items():
            if method.pathway is not None and method.pathway not in store.keys:
                raise StoreError(_lacking(store, key, method.pathway))

    @property
    def micro_batch(self) -> int:
        """Samples at a time."""
        return self.recipe.micro_batch

    @property
    def record(self) -> dict[str, Any]:
        """What makes two jobs the same, as JSON data."""
        header = self.store.header
        return {
            "schema": 1,
            "store": _identity(self.store),
            "fingerprint": header.fingerprint,
            "methods": [[key, parameters_of(method)] for key, method in self.recipe.methods.items()],
            "reduction": self.recipe.reduction,
            "micro_batch": self.micro_batch,
            "threads": self.threads,
            "device": self.network.device.type,
            "samples": len(self.ids),
            "parts": self.parts,
        }

    def look_at(self, part: Path, number: int) -> None:
        """Read the part of micro-batch `number` to its last byte; raises `StoreError` where it is not this job's."""
        check_map_part(part, self.digest, self.ids[self.rows(number)])

    def read(self, number: int) -> list[Item]:
        """The samples of micro-batch `number`."""
        rows = self.rows(number)
        return read_fitting(self.dataset, rows, self.ids[rows], self.network)


def _make_parts(job: MapJob, missing: Sequence[int], *, progress: bool) -> int:
    """Make and write the maps of the micro-batches that are missing; returns the number of their samples."""
    digest, left = job.digest, sum(len(job.ids[job.rows(number)]) for number in missing)

    def write(number: int, maps: Mapping[str, MapRows]) -> None:
        write_map_part(job.folder / part_name(number), digest, job.ids[job.rows(number)], maps)

    bar = tqdm(total=len(job.ids), initial=len(job.ids) - left, desc=SAID, unit="sample", disable=not progress)
    with bar, Writer(write) as writer:
        for number, items in read_ahead(job.read, missing, job.threads, job.network.device):
            known = Known.of(job.store, job.table, job.rows(number), job.recipe.pathways)
            writer.put(number, map_rows(job.network, job.recipe, items, known))
            bar.update(len(items))
    return left


def _add(job: MapJob, *, progress: bool) -> None:
    parts = [job.folder / part_name(number) for number in range(job.parts)]
    with tqdm(desc="add maps", unit="sample", disable=not progress, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        add_maps(job.path, parts, progress=advance)


# ------------------------------------------------------------------------------------------- what is asked for


def checked_methods(methods: Sequence[Method | str]) -> dict[str, Method]:
    """Methods by key; raises `InputError` for none, one that is none, and one that is asked for twice."""
    asked: dict[str, Method] = {}
    for text in [methods] if isinstance(methods, str) else methods:
        method = parse_method(text)
        if not _is_method(method):
            raise InputError(f"attribute: expected a method or its name, found {text!r}; for example 'gradient'")
        try:
            key = checked_map_key(method.key)
        except StoreError as error:
            raise InputError(f"attribute: {error}") from None
        if key in asked:
            raise InputError(f"attribute: {key} is asked for twice; name each method once")
        parameters_of(method)
        asked[key] = method
    if not asked:
        raise InputError("attribute: expected at least one method, for example gradient or neuron_mct@0.9")
    return asked


def _is_method(given: Any) -> bool:
    return not isinstance(given, type) and is_dataclass(given) and isinstance(given, Method)


def checked_reduction(reduction: str) -> Reduction:
    """What is stored of a reduction: the sign is kept, from which the magnitude follows."""
    if reduction not in get_args(Reduction):
        raise InputError(f"attribute: {unknown('reduction', reduction, get_args(Reduction))}")
    return "signed_sum" if reduction == "signed_sum" else "signed_max"


def _needed(recipe: MapRecipe) -> dict[str, Any]:
    """Selectors and sparsities from which all pathways that the methods start from can be had."""
    keys = [PathwayKey.parse(key) for key in recipe.pathways]
    return {
        "selectors": list(dict.fromkeys(key.family for key in keys)),
        "sparsities": sorted({key.sparsity for key in keys if key.sparsity is not None}),
    }


# -------------------------------------------------------------------------------------------- what there is


def _number(store: Store, name: str) -> int:
    return checked_number(f"{store.path}: {name}", getattr(store.header, name), most=_MOST[name])


def _identity(store: Store) -> str:
    """What tells a store from one that was computed anew."""
    return f"{store.header.notes.get('job', '')} {store.header.created}"


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _require_network(store: Store, network: Network) -> None:
    header = store.header
    if not store.complete:
        raise StoreError(
            f"attribute: {store.path} is a part of a store, not a finished one; choose another output file"
        )
    if header.fingerprint != network.fingerprint:
        raise StoreError(
            f"attribute: {store.path} is of another network, {header.model!r} with {len(store.index)} sites and "
            f"{store.index.size} neurons: expected the fingerprint {header.fingerprint[:16]}…, found "
            f"{network.fingerprint[:16]}… with {len(network.index)} sites and {network.index.size} neurons; take the "
            "model, weights and sites that it was computed with, or choose another output file"
        )


def _require_job(store: Store, network: Network, options: Mapping[str, Any]) -> None:
    """Raise `StoreError` that names what a store was computed with otherwise than is asked for now."""
    header = store.header
    try:
        record = json.loads(str(header.notes.get("record", "{}")))
    except ValueError:
        record = {}
    theirs = {
        "response": header.response,
        "response_is": str(record.get("response_is", "")) if isinstance(record, dict) else "",
        "input_shape": json.loads(header.input_shape or "null"),
        **{name: getattr(header, name) for name in options},
    }
    ours: dict[str, Any] = {
        "response": network.response.name,
        "response_is": identity(network.response),
        "input_shape": [list(shape) for shape in network.input_shapes],
    }
    ours |= {name: str(value) if name == "target" else value for name, value in options.items() if value is not None}
    require_same(ours, theirs, store.path, "ask for the same, or choose another output file", said=SAID)


def _require_samples(store: Store, ids: Sequence[str]) -> None:
    """Raise `StoreError` where a data set's samples are not those of the store, one by one."""
    theirs = store.ids.tolist()
    if list(ids) == theirs:
        return
    place = next((n for n, pair in enumerate(zip(ids, theirs, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        said = f"expected {len(theirs)} samples, found {len(ids)}"
    else:
        said = f"number {place}: expected {theirs[place]!r}, found {ids[place]!r}"
    raise StoreError(
        f"attribute: {store.path} holds other samples than the data set, or in another order: {said}; give the data "
        "set that it was computed on (and the same limit), or choose another output file"
    )


def _is_there(store: Store, key: str, method: Method, reduction: str) -> bool:
    """Whether a store has these maps; raises `StoreError` where it has others by the same name."""
    if key not in store.map_keys:
        return False
    way_out = "leave the method out, or choose another output file"
    there = store.map_reduction(key)
    if there != reduction:
        raise StoreError(
            f"attribute: {store.path} has maps of {key} with the reduction {there}, and {reduction} is asked for; ask "
            f"for {there}, {way_out}"
        )
    if store.map_parameters(key) != parameters_of(method):
        raise StoreError(
            f"attribute: {store.path} has maps of {key} with the parameters {json.dumps(store.map_parameters(key))}, "
            f"and {json.dumps(parameters_of(method))} are asked for; {way_out}"
        )
    return True


def _lacking(store: Store, key: str, pathway: str) -> str:
    found = PathwayKey.parse(pathway)
    level = "" if found.sparsity is None else f" --sparsity {found.sparsity!r}"
    return (
        f"attribute: the method {key} starts from the pathway {pathway}, which {store.path} lacks; it has "
        f"{', '.join(store.keys) or 'none'}. Choose another output file, into which fxpath attribute puts it first, or "
        f"one that was made with fxpath compute … --selector {found.family}{level}"
    )


def _forget_finished(folder: Path, store: Store) -> None:
    """Remove the parts of a job that was killed after its maps had come into the store."""
    if not parts_found(folder):
        return
    record = read_record(folder)
    try:
        done = record["store"] == _identity(store) and {key for key, _ in record["methods"]} <= set(store.map_keys)
    except (KeyError, TypeError, ValueError):
        return
    if done:
        clear_parts(folder)


def _reported(
    store: Store, path: Path, asked: Mapping[str, Method], made: tuple[str, ...], computed: int, started: float
) -> MapReport:
    missing = {}
    for key in asked:
        reasons = store.map_missing(key).tolist()
        missing[key] = {name: why for name, why in zip(store.ids.tolist(), reasons, strict=True) if why}
    seconds = time.perf_counter() - started
    return MapReport(path, len(store), tuple(asked), made, computed, len(store) - computed, missing, seconds)
