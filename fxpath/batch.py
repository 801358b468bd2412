"""A data set → a store: micro-batches, progress, resume, writing beside computing; reproducible to the byte."""

from __future__ import annotations

import os
import queue
import shutil
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .errors import InputError, StoreError
from .job import Job, part_name, parts_folder, read_record
from .merging import merge_stores
from .microbatch import Item, compute_rows, misfit, read_item, require_labels
from .network import Network
from .parts import write_store
from .schema import Header, Rows
from .selectors import Selector
from .store import open_store

DEFAULT_SELECTORS = ("neuron_mct",)
DEFAULT_SPARSITIES = (0.8, 0.9, 0.99)


@dataclass(frozen=True)
class Plan:
    """What a job will do, before it is done: `bytes` and `hours` are measured on its first micro-batch.

    `samples` in all and `left` to compute; `neurons` N; `pathways` keys a sample.
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
    """What a job did. `failed` maps the id of each sample that could not be used to the reason."""

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
    thumbnails: int = 0,
    model: str = "",
    preprocessing: str = "",
    classes: Sequence[str] = (),
    progress: bool = True,
) -> Report:
    """Compute the pathways of every sample of a data set and keep them in one HDF5 file.

    `dataset` is map-style: `dataset[i]` is an input (tensor, tuple or dict of tensors without a batch axis) or
    `(input, label)`; `dataset.ids`, if there, names the samples. `target`: "predicted", "labels" or a class number.
    `scores` "float16" or "float32" keeps all scores too, so that any sparsity can be cut later (`Store.cut`).

    Finished micro-batches are part files in `<path>.parts`; a job that was stopped, by whatever means, goes on from
    them when it is started again, and the result has the same bytes. `micro_batch` (default 8) and `threads` (default:
    torch's) belong to the job and are taken over from the parts when it goes on.

    A sample that cannot be read, or has NaN or infinite values, is recorded with the reason; `strict` stops instead.
    Raises `InputError` for parameters that do not fit and `StoreError` where `path` holds another job's results.
    """
    job = Job(network, dataset, Path(path), selectors, sparsities, target, micro_batch, threads, scores, strict,
              thumbnails, model, preprocessing, classes)  # fmt: skip
    return _run(job, progress=progress)


def plan(network: Network, dataset: Any, path: str | os.PathLike[str], **options: Any) -> Plan:
    """What `compute` with the same arguments will take; computes the first micro-batch and writes nothing."""
    options.pop("progress", None)
    given: dict[str, Any] = {
        "selectors": DEFAULT_SELECTORS, "sparsities": DEFAULT_SPARSITIES, "target": "predicted", "micro_batch": None,
        "threads": None, "scores": None, "strict": False, "thumbnails": 0, "model": "", "preprocessing": "",
        "classes": (),
    } | options  # fmt: skip
    return _plan(Job(network, dataset, Path(path), **given))


def merge(path: str | os.PathLike[str]) -> Path:
    """Join the parts of a job whose micro-batches are all there, without the network (`fxpath merge`)."""
    target = Path(path)
    folder = parts_folder(target)
    record = read_record(folder)
    names = [part_name(number) for number in range(record["parts"])]
    lacking = [name for name in names if not (folder / name).exists()]
    if lacking:
        raise StoreError(
            f"merge: {folder} lacks {len(lacking)} of {len(names)} parts ({lacking[0]} …); start the same "
            "`fxpath compute` again to compute them"
        )
    _join(folder, names, target, progress=True)
    return target


def _join(folder: Path, names: Sequence[str], target: Path, *, progress: bool) -> None:
    with tqdm(desc="merge", unit="sample", disable=not progress, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        merge_stores([folder / name for name in names], target, progress=advance)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _thread_count(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read(job: Job, number: int) -> list[Item]:
    rows = job.rows(number)
    names = job.ids[rows]
    items = [
        read_item(job.dataset, position, name, thumbnails=job.thumbnails)
        for position, name in zip(range(rows.start, rows.stop), names, strict=True)
    ]
    reasons = [item.problem or misfit(item, job.network) for item in items]
    return [
        item if reason is None else Item(item.name, None, item.label, reason, item.thumbnail)
        for item, reason in zip(items, reasons, strict=True)
    ]


def _first_fit(job: Job) -> None:
    """Raise at once where the whole data set has the wrong shape, not sample by sample."""
    item = read_item(job.dataset, 0, job.ids[0])
    reason = None if item.problem else misfit(item, job.network)
    if reason:
        raise InputError(
            f"compute: sample {item.name!r} does not fit the network: {reason}. Check the preprocessing, or trace "
            "the network with an example of this size"
        )


def _run(job: Job, *, progress: bool = True) -> Report:
    """Compute what is missing, then join the parts."""
    started = time.perf_counter()
    if job.finished():
        shutil.rmtree(job.folder, ignore_errors=True)  # a kill after the merge leaves it
        return Report(job.path, len(job.ids), 0, len(job.ids), _failures(job), 0.0)
    _first_fit(job)
    missing = job.prepare()
    reused = len(job.ids) - sum(len(job.ids[job.rows(number)]) for number in missing)
    bar = tqdm(total=len(job.ids), initial=reused, desc="compute", unit="sample", disable=not progress)
    with bar, _thread_count(job.threads), _Writer(job.folder, job.part_header()) as writer:
        for number, items in _reading(job, missing):
            require_labels(items, len(job.header.classes) or 2**62)
            writer.put(part_name(number), compute_rows(job.network, job.recipe, items))
            bar.update(len(items))
    _join(job.folder, [part_name(number) for number in range(job.parts)], job.path, progress=progress)
    seconds = time.perf_counter() - started
    return Report(job.path, len(job.ids), len(job.ids) - reused, reused, _failures(job), seconds)


def _reading(job: Job, numbers: Sequence[int]) -> Iterator[tuple[int, list[Item]]]:
    """Items of each micro-batch; the next one is read while this one is computed."""
    with ThreadPoolExecutor(1, thread_name_prefix="fxpath-read") as pool:
        ahead: Future[list[Item]] | None = pool.submit(_read, job, numbers[0]) if numbers else None
        for place, number in enumerate(numbers):
            assert ahead is not None
            items = ahead.result()
            ahead = pool.submit(_read, job, numbers[place + 1]) if place + 1 < len(numbers) else None
            yield number, items


def _failures(job: Job) -> dict[str, str]:
    with open_store(job.path) as store:
        table = store.samples()
    bad = table[table["status"] != "ok"]
    return dict(zip(bad["id"], bad["status"], strict=True))


def _plan(job: Job) -> Plan:
    """Time and size, from the first micro-batch, computed twice: the first run pays for warming up."""
    _first_fit(job)
    done = 0
    if (job.folder / "job.json").exists():
        done = sum((job.folder / part_name(number)).exists() for number in range(job.parts))
    items = _read(job, 0)
    with _thread_count(job.threads):
        compute_rows(job.network, job.recipe, items)
        started = time.perf_counter()
        rows = compute_rows(job.network, job.recipe, items)
        seconds = time.perf_counter() - started
    share = len(job.ids) / len(items)
    return Plan(
        len(job.ids), max(len(job.ids) - done * job.recipe.micro_batch, 0), job.network.index.size,
        len(job.network.index), tuple(rows.pathways), job.recipe.micro_batch, job.threads,
        int(_compressed_size(rows) * share), seconds * (job.parts - done) / 3600,
    )  # fmt: skip


def _compressed_size(rows: Rows) -> int:
    blocks = [rows.active, *(table.columns["mask"] for table in rows.pathways.values())]
    blocks += [values for values, _ in rows.scores.values()]
    return sum(len(zlib.compress(np.ascontiguousarray(block).tobytes(), 1)) for block in blocks)


class _Writer:
    """Writes finished micro-batches in a thread of its own, so that computing never waits for compression."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder, self.header = folder, header
        self.waiting: queue.Queue[tuple[str, Rows] | None] = queue.Queue(maxsize=2)
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="fxpath-write", daemon=True)

    def __enter__(self) -> _Writer:
        self.thread.start()
        return self

    def put(self, name: str, rows: Rows) -> None:
        """Hand over a micro-batch; raises here what went wrong with an earlier one."""
        if self.failure is not None:
            raise self.failure
        self.waiting.put((name, rows))

    def _work(self) -> None:
        while (item := self.waiting.get()) is not None:
            if self.failure is None:
                try:
                    write_store(self.folder / item[0], self.header, item[1], complete=False)
                except BaseException as error:  # raised again in the thread that computes
                    self.failure = error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.waiting.put(None)
        self.thread.join()  # what is computed is kept, also when the job is stopped
        if kind is None and self.failure is not None:
            raise self.failure
