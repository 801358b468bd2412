"""A data set → a store: micro-batches, progress, resume, writing beside computing; masks reproducible to the bit."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from .errors import SampleError, StoreError
from .given import checked_path
from .items import Item, first_fit
from .job import Job
from .merging import merge_stores
from .microbatch import compute_rows, require_labels
from .network import Network
from .parts import deflated, write_store
from .records import (
    held,
    part_name,
    parts_folder,
    parts_found,
    read_record,
    record_of,
    remove_parts,
    require_same,
)
from .schema import PathwayRows, Rows
from .selectors import Selector
from .store import open_store
from .workers import Writer, read_ahead, settings

DEFAULT_SELECTORS = ("neuron_mct",)
DEFAULT_SPARSITIES = (0.8, 0.9, 0.99)
_TABLE = 600  # bytes that HDF5 itself takes for a table


@dataclass(frozen=True)
class Plan:
    """What a job will do, before it is done: `bytes` and `hours` are measured on its first micro-batch.

    `samples` in all and `left` to compute in `hours`; `neurons` N at so many `sites`; `keys` of a sample's pathways;
    `bytes` of the finished file.
    """

    samples: int
    left: int
    neurons: int
    sites: int
    keys: tuple[str, ...]
    micro_batch: int
    threads: int
    bytes: int
    hours: float


@dataclass(frozen=True)
class Report:
    """What a job did: of so many `samples`, those worked through now (`computed`) and those there before (`reused`).

    `failed` maps the id of each sample that could not be used to the reason; such samples are counted as well.
    """

    path: Path
    samples: int
    computed: int
    reused: int
    failed: dict[str, str]
    seconds: float


def compute(
    network: Network,
    dataset: Any,
    path: str | os.PathLike[str],
    *,
    selectors: Sequence[Selector | str] = DEFAULT_SELECTORS,
    sparsities: Sequence[float] = DEFAULT_SPARSITIES,
    target: str | int = "predicted",
    micro_batch: int | None = None,
    threads: int | None = None,
    scores: str | None = None,
    strict: bool = False,
    diagnose: int = 0,
    thumbnails: int = 0,
    model: str = "",
    preprocessing: str = "",
    classes: Sequence[str] = (),
    progress: bool = True,
) -> Report:
    """Compute the pathways of every sample of a data set and keep them in one HDF5 file.

    `dataset` is map-style: `dataset[i]` is an input (tensor, tuple or dict of tensors without a batch axis) or
    `(input, label)`; `dataset.ids`, if there, names the samples. Without selectors the store holds the samples, what
    the network answers, and which neurons are active. `target`: "predicted", "labels" or a class number.
    `scores` "float16" or "float32" keeps all scores too, so that any sparsity can be cut later (`Store.cut`).
    `diagnose` > 0 ablates so many active neurons of every site and sample, each exactly, and keeps for every selector
    with scores Spearman's correlation of |score| with |Φ(x) − Φ(x; a_j ← 0)| over them: the diagnostics
    "ablation_correlation" `(n,)`, network-wide, and "ablation_correlation_by_site" `(n, sites)`.

    Finished micro-batches are part files in `<path>.parts`; a job that was stopped, by whatever means, goes on from
    them when it is started again, and every mask and number has the same bytes. `micro_batch` (default: 8, or the
    largest below in which a sample's place changes no bit, which is tried) and `threads` (default: torch's) belong to
    the job and are taken over from what is there when it goes on. Warns with `PlacementWarning` where the micro-batch
    asked for makes last bits depend on the order of the samples. Other numbers of either change last bits of the
    activations, and hardly a neuron of a pathway (Jaccard ≥ 0.9999); but where that carries one neuron over the kink
    of its rectifier, the gradients of all before it jump (EfficientNet-Lite0, 1 against 2 threads: 5 of 20 photos,
    Jaccard ≥ 0.994). A model in float64 leaves no such difference.

    A sample that cannot be read, or has NaN or infinite values, is recorded with the reason; `strict` stops instead.
    Raises `InputError` for parameters that do not fit and `StoreError` where `path` holds another job's results.
    """
    job = Job(network, dataset, Path(path), selectors, sparsities, target, micro_batch, threads, scores, strict,
              diagnose, thumbnails, model, preprocessing, classes)  # fmt: skip
    return _run(job, progress=progress)


def plan(network: Network, dataset: Any, path: str | os.PathLike[str], **options: Any) -> Plan:
    """What `compute` with the same arguments will take; computes the first micro-batch and writes nothing."""
    options.pop("progress", None)
    given: dict[str, Any] = {
        "selectors": DEFAULT_SELECTORS, "sparsities": DEFAULT_SPARSITIES, "target": "predicted", "micro_batch": None,
        "threads": None, "scores": None, "strict": False, "diagnose": 0, "thumbnails": 0, "model": "",
        "preprocessing": "", "classes": (),
    } | options  # fmt: skip
    return _plan(Job(network, dataset, Path(path), **given))


def merge(path: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Join the parts of a job whose micro-batches are all there, without the network (`fxpath merge`)."""
    target = checked_path(Path(path))
    folder = parts_folder(target)
    if os.path.lexists(target):
        theirs = record_of(target)
        if parts_found(folder):
            ours = read_record(folder)
            require_same(ours, theirs, str(target), "move it away, so that the parts can be joined under its name")
            remove_parts(folder)
        return target
    record = read_record(folder)
    names = [part_name(number) for number in range(record["parts"])]
    lacking = [name for name in names if not (folder / name).exists()]
    if lacking:
        raise StoreError(
            f"merge: {folder} lacks {len(lacking)} of {len(names)} parts ({lacking[0]} …); start the same "
            "`fxpath compute` again to compute them"
        )
    with held(folder):
        _join(folder, names, target, progress=progress)
    return target


def _join(folder: Path, names: Sequence[str], target: Path, *, progress: bool) -> None:
    with tqdm(desc="merge", unit="sample", disable=not progress, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        merge_stores([folder / name for name in names], target, progress=advance)
    remove_parts(folder)


def _run(job: Job, *, progress: bool = True) -> Report:
    """Compute what is missing, then join the parts."""
    started = time.perf_counter()
    if job.finished():
        remove_parts(job.folder)  # a kill after the merge leaves them
        return _reported(job, 0, started)
    job.found()
    with held(job.folder), settings(job.threads, job.network.device):
        job.settle(first_fit(job.dataset, job.ids, job.network))
        missing = job.prepare(progress=progress)
        left = sum(len(job.ids[job.rows(number)]) for number in missing)
        _compute_parts(job, missing, len(job.ids) - left, progress=progress)
        _join(job.folder, [part_name(number) for number in range(job.parts)], job.path, progress=progress)
    return _reported(job, left, started)


def _compute_parts(job: Job, missing: Sequence[int], done: int, *, progress: bool) -> None:
    """Compute and write parts. Those of which no sample can be used come last: they take their columns from another."""
    header = job.header

    def write(number: int, rows: Rows) -> None:
        write_store(job.folder / part_name(number), header, rows, complete=False)

    empty: dict[int, list[Item]] = {}
    bar = tqdm(total=len(job.ids), initial=done, desc="compute", unit="sample", disable=not progress)
    with bar, Writer(write) as writer:
        for number, items in read_ahead(job.read, missing, job.threads, job.network.device):
            require_labels(items, job.outputs or len(job.classes) or 2**63)
            rows = compute_rows(job.network, job.recipe, items)
            if "ok" in rows.samples["status"]:
                writer.put(number, rows)
            else:
                reasons = zip(items, rows.samples["status"], strict=True)
                empty[number] = [replace(item, inputs=None, problem=reason) for item, reason in reasons]
            bar.update(len(items))
    pattern = next((job.folder / part_name(n) for n in range(job.parts) if n not in empty), None)
    with Writer(write) as writer:
        for number, items in empty.items():
            rows = compute_rows(job.network, job.recipe, items)
            writer.put(number, rows if pattern is None else _with_diagnostics(rows, pattern))


def _with_diagnostics(rows: Rows, pattern: Path) -> Rows:
    """Rows of which nothing could be computed, with the diagnostics' columns of another part, all missing."""
    pathways: dict[str, PathwayRows] = {}
    with open_store(pattern) as store:
        for key, pathway in rows.pathways.items():
            names = [name for name in store.columns(key) if name.startswith("diagnostics/")]
            missing = {name: _missing_like(store.column(key, name, slice(0, 1)), len(rows)) for name in names}
            pathways[key] = replace(pathway, columns={**pathway.columns, **missing})
    return replace(rows, pathways=pathways)


def _missing_like(one: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    empty = np.full_like(one, np.nan) if one.dtype.kind == "f" else np.zeros_like(one)
    return np.repeat(empty, count, axis=0)


def _reported(job: Job, computed: int, started: float) -> Report:
    with open_store(job.path) as store:
        table = store.samples()
    bad = table[table["status"] != "ok"]
    failed = dict(zip(bad["id"], bad["status"], strict=True))
    if failed and job.recipe.strict:  # of an earlier start that was not strict
        name, reason = next(iter(failed.items()))
        raise SampleError(
            f"compute: {job.path} is complete, but sample {name!r} could not be used: {reason}. Mend or remove it and "
            "compute into another file, or leave out --strict",
            [job.ids.index(name)],
            [reason],
        )
    return Report(job.path, len(job.ids), computed, len(job.ids) - computed, failed, time.perf_counter() - started)


def _plan(job: Job) -> Plan:
    """Time and size, from the first micro-batch, computed twice: the first run pays for warming up."""
    finished = job.finished()
    found = [] if finished else job.found()
    with settings(job.threads, job.network.device):
        job.settle(first_fit(job.dataset, job.ids, job.network))
        items = job.read(0)
        compute_rows(job.network, job.recipe, items)
        started = time.perf_counter()
        rows = compute_rows(job.network, job.recipe, items)
        seconds = time.perf_counter() - started
    missing = [] if finished else sorted(set(range(job.parts)) - set(found))
    size = _stored_size(rows)
    tables = 10 + sum(1 + len(table.columns) for table in rows.pathways.values()) + 2 * len(rows.scores)
    return Plan(
        samples=len(job.ids),
        left=sum(len(job.ids[job.rows(number)]) for number in missing),
        neurons=job.network.index.size,
        sites=len(job.network.index),
        keys=tuple(rows.pathways),
        micro_batch=job.recipe.micro_batch,
        threads=job.threads,
        bytes=int(size * len(job.ids) / len(items)) + _TABLE * tables,
        hours=seconds * len(missing) / 3600,
    )


def _stored_size(rows: Rows) -> int:
    """Bytes that the large tables of these rows take when they are deflated."""
    tables = [rows.active, *(table.columns["mask"] for table in rows.pathways.values())]
    tables += [values for values, _ in rows.scores.values()]
    tables += [] if rows.thumbnails is None else [rows.thumbnails]
    return sum(len(deflated(row)) for table in tables for row in table)
