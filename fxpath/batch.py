"""A data set → a store: micro-batches, progress, resume, and writing beside computing (DESIGN: reproducible to the byte)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import queue
import shutil
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .errors import InputError, SampleError, StoreError
from .keys import exact_sparsity
from .merging import merge_stores
from .microbatch import Item, Recipe, compute_rows, misfit, read_item, require_labels
from .network import Network
from .parts import write_store
from .schema import Header, Rows
from .selectors import Selector, parse
from .selectors.registry import parameters
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
    return job.run(progress=progress)


def plan(network: Network, dataset: Any, path: str | os.PathLike[str], **options: Any) -> Plan:
    """What `compute` with the same arguments will take; computes the first micro-batch and writes nothing."""
    options.pop("progress", None)
    given: dict[str, Any] = {
        "selectors": DEFAULT_SELECTORS, "sparsities": DEFAULT_SPARSITIES, "target": "predicted", "micro_batch": None,
        "threads": None, "scores": None, "strict": False, "thumbnails": 0, "model": "", "preprocessing": "", "classes": (),
    } | options  # fmt: skip
    return Job(network, dataset, Path(path), **given).plan()


def merge(path: str | os.PathLike[str]) -> Path:
    """Join the parts of a job whose micro-batches are all there, without the network (`fxpath merge`)."""
    target = Path(path)
    folder = parts_folder(target)
    record = _read_record(folder)
    names = [_part_name(number) for number in range(record["parts"])]
    lacking = [name for name in names if not (folder / name).exists()]
    if lacking:
        raise StoreError(
            f"merge: {folder} lacks {len(lacking)} of {len(names)} parts ({lacking[0]} …); start the same "
            "`fxpath compute` again to compute them"
        )
    _join(folder, names, target, progress=True)
    return target


def parts_folder(path: Path) -> Path:
    """Where a job that writes `path` keeps its finished micro-batches."""
    return path.with_name(f"{path.name}.parts")


def _part_name(number: int) -> str:
    return f"part-{number:07d}.h5"


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not isinstance(record["parts"], int):
            raise ValueError("no job record")
    except FileNotFoundError:
        raise StoreError(f"{folder}: expected the parts of a job with a job.json, found none") from None
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{folder}/job.json cannot be read ({error}); remove the folder to start again") from error
    return record


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


def software_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("fxpath", "torch", "torchvision", "numpy", "h5py"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class Job:
    """One data set, one network, one file: everything that `compute` and `--dry-run` share."""

    def __init__(
        self,
        network: Network,
        dataset: Any,
        path: Path,
        selectors: Sequence[Selector | str],
        sparsities: Sequence[float],
        target: str | int,
        micro_batch: int | None,
        threads: int | None,
        scores: str | None,
        strict: bool,
        thumbnails: int,
        model: str,
        preprocessing: str,
        classes: Sequence[str],
    ) -> None:
        self.network, self.dataset, self.path, self.thumbnails = network, dataset, path, thumbnails
        self.folder = parts_folder(path)
        self.ids = _ids_of(dataset)
        record = _read_record(self.folder) if (self.folder / "job.json").exists() else None
        self.threads = _chosen("threads", threads, record, torch.get_num_threads())
        self.recipe = Recipe(
            tuple(parse(selector) for selector in selectors),
            tuple(float(exact_sparsity(sparsity)) for sparsity in sparsities),
            _checked_target(target),
            _chosen("micro_batch", micro_batch, record, 8),
            scores,
            strict,
        )
        _check_recipe(self.recipe)
        self.header = Header(
            model=model or network.traced.graph_module.__class__.__name__,
            fingerprint=network.fingerprint,
            index=network.index,
            edges=np.array(network.edges, dtype=np.int32).reshape(-1, 2),
            classes=tuple(classes),
            input_shape=json.dumps([list(shape) for shape in network.input_shapes]),
            preprocessing=preprocessing,
            micro_batch=self.recipe.micro_batch,
            threads=self.threads,
            precision=str(network._layout[0][1]).removeprefix("torch."),
            target=self.recipe.target,
            response=network.response.name,
            versions=json.dumps(software_versions()),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            notes={"device": network.device.type, "job": ""},
        )
        self.record = self._record()

    def _record(self) -> dict[str, Any]:
        """What makes two jobs the same; kept as job.json and, as a digest, in the store."""
        header, recipe = self.header, self.recipe
        return {
            "schema": 1,
            "model": header.model,
            "fingerprint": header.fingerprint,
            "selectors": [[selector.key, parameters(selector)] for selector in recipe.selectors],
            "sparsities": list(recipe.sparsities),
            "target": recipe.target,
            "response": header.response,
            "micro_batch": recipe.micro_batch,
            "threads": self.threads,
            "precision": header.precision,
            "device": self.network.device.type,
            "scores": recipe.scores,
            "thumbnails": self.thumbnails,
            "preprocessing": header.preprocessing,
            "samples": len(self.ids),
            "ids": hashlib.sha256("\0".join(self.ids).encode()).hexdigest(),
            "parts": self.parts,
        }

    @property
    def parts(self) -> int:
        """Number of micro-batches."""
        return math.ceil(len(self.ids) / self.recipe.micro_batch)

    @property
    def digest(self) -> str:
        """SHA-256 of the record."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()

    # --- what is there already ---

    def finished(self) -> bool:
        """Whether the store is there and is this job's; raises `StoreError` where it is another's."""
        if not self.path.exists():
            return False
        if self.path.is_dir():
            raise StoreError(f"compute: {self.path} is a folder; give a file name such as {self.path}/run.h5")
        with open_store(self.path) as store:
            theirs = json.loads(str(store.header.notes.get("record", "{}")))
        self._require_same(theirs, str(self.path), "choose another output file, or move this one away")
        return True

    def _require_same(self, theirs: dict[str, Any], where: str, way_out: str) -> None:
        differing = [name for name in self.record if theirs.get(name) != self.record[name]]
        if differing:
            shown = "; ".join(
                f"{name}: there {_brief(theirs.get(name))}, here {_brief(self.record[name])}" for name in differing[:4]
            )
            raise StoreError(f"compute: {where} holds the results of another job ({shown}); {way_out}")

    def prepare(self) -> list[int]:
        """Make the folder of parts, or look at the one there is; returns the numbers of the parts that are missing."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "job.json").exists():
                fresh = self.folder / ".job.json.tmp"
                with fresh.open("w", encoding="utf-8") as file:
                    json.dump(self.record, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                fresh.replace(self.folder / "job.json")
        except OSError as error:
            raise StoreError(
                f"compute: {self.folder} cannot be written ({error.strerror or error}); choose an output in a folder "
                "that you may write to"
            ) from error
        self._require_same(
            _read_record(self.folder), str(self.folder), "remove that folder, or choose another output file"
        )
        return [number for number in range(self.parts) if not self._is_whole(number)]

    def _is_whole(self, number: int) -> bool:
        part = self.folder / _part_name(number)
        if not part.exists():
            return False
        try:
            with open_store(part) as store:
                return list(store.ids) == self.ids[self._rows(number)]
        except StoreError as error:
            tqdm.write(f"compute: {error}; this part is computed again")
            return False

    def _rows(self, number: int) -> slice:
        return slice(number * self.recipe.micro_batch, min((number + 1) * self.recipe.micro_batch, len(self.ids)))

    # --- doing it ---

    def _read(self, number: int) -> list[Item]:
        rows = self._rows(number)
        names = self.ids[rows]
        items = [
            read_item(self.dataset, position, name, thumbnails=self.thumbnails)
            for position, name in zip(range(rows.start, rows.stop), names, strict=True)
        ]
        reasons = [item.problem or misfit(item, self.network) for item in items]
        return [
            item if reason is None else Item(item.name, None, item.label, reason, item.thumbnail)
            for item, reason in zip(items, reasons, strict=True)
        ]

    def _first_fit(self) -> None:
        """Raise at once where the whole data set has the wrong shape, not sample by sample."""
        item = read_item(self.dataset, 0, self.ids[0])
        reason = None if item.problem else misfit(item, self.network)
        if reason:
            raise InputError(
                f"compute: sample {item.name!r} does not fit the network: {reason}. Check the preprocessing, or trace "
                "the network with an example of this size"
            )

    def run(self, *, progress: bool = True) -> Report:
        """Compute what is missing, then join the parts."""
        started = time.perf_counter()
        if self.finished():
            shutil.rmtree(self.folder, ignore_errors=True)  # a kill after the merge leaves it
            return Report(self.path, len(self.ids), 0, len(self.ids), self._failures(), 0.0)
        self._first_fit()
        missing = self.prepare()
        reused = len(self.ids) - sum(len(self.ids[self._rows(number)]) for number in missing)
        bar = tqdm(total=len(self.ids), initial=reused, desc="compute", unit="sample", disable=not progress)
        with bar, _thread_count(self.threads), _Writer(self.folder, self._part_header()) as writer:
            for number, items in self._reading(missing):
                require_labels(self.recipe, items, len(self.header.classes) or 2**62)
                writer.put(_part_name(number), compute_rows(self.network, self.recipe, items))
                bar.update(len(items))
        _join(self.folder, [_part_name(number) for number in range(self.parts)], self.path, progress=progress)
        seconds = time.perf_counter() - started
        return Report(self.path, len(self.ids), len(self.ids) - reused, reused, self._failures(), seconds)

    def _part_header(self) -> Header:
        return replace(
            self.header,
            notes={**self.header.notes, "job": self.digest, "record": json.dumps(self.record)},
        )

    def _reading(self, numbers: Sequence[int]) -> Iterator[tuple[int, list[Item]]]:
        """Items of each micro-batch; the next one is read while this one is computed."""
        with ThreadPoolExecutor(1, thread_name_prefix="fxpath-read") as pool:
            ahead: Future[list[Item]] | None = pool.submit(self._read, numbers[0]) if numbers else None
            for place, number in enumerate(numbers):
                assert ahead is not None
                items = ahead.result()
                ahead = pool.submit(self._read, numbers[place + 1]) if place + 1 < len(numbers) else None
                yield number, items

    def _failures(self) -> dict[str, str]:
        with open_store(self.path) as store:
            table = store.samples()
        bad = table[table["status"] != "ok"]
        return dict(zip(bad["id"], bad["status"], strict=True))

    def plan(self) -> Plan:
        """Time and size, from the first micro-batch, computed twice: the first run pays for warming up."""
        self._first_fit()
        done = 0
        if (self.folder / "job.json").exists():
            done = sum((self.folder / _part_name(number)).exists() for number in range(self.parts))
        items = self._read(0)
        with _thread_count(self.threads):
            compute_rows(self.network, self.recipe, items)
            started = time.perf_counter()
            rows = compute_rows(self.network, self.recipe, items)
            seconds = time.perf_counter() - started
        share = len(self.ids) / len(items)
        return Plan(
            len(self.ids), max(len(self.ids) - done * self.recipe.micro_batch, 0), self.network.index.size,
            len(self.network.index), tuple(rows.pathways), self.recipe.micro_batch, self.threads,
            int(_compressed_size(rows) * share), seconds * (self.parts - done) / 3600,
        )  # fmt: skip


def _compressed_size(rows: Rows) -> int:
    blocks = [rows.active, *(table.columns["mask"] for table in rows.pathways.values())]
    blocks += [values for values, _ in rows.scores.values()]
    return sum(len(zlib.compress(np.ascontiguousarray(block).tobytes(), 1)) for block in blocks)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _ids_of(dataset: Any) -> list[str]:
    try:
        count = len(dataset)
    except TypeError:
        raise InputError(
            f"compute: expected a map-style data set with a length, found {type(dataset).__name__}; wrap a stream in a "
            "list or a torch.utils.data.Dataset with __len__ and __getitem__"
        ) from None
    if count == 0:
        raise InputError("compute: the data set is empty")
    ids = [str(name) for name in getattr(dataset, "ids", range(count))]
    if len(ids) != count:
        raise InputError(f"compute: the data set has {count} samples and {len(ids)} ids; give one id a sample")
    if len(set(ids)) != count:
        twice = next(name for name in ids if ids.count(name) > 1)
        raise InputError(f"compute: ids name samples and must differ; {twice!r} appears twice")
    return ids


def _chosen(name: str, given: int | None, record: dict[str, Any] | None, default: int) -> int:
    value = given if given is not None else (record[name] if record and name in record else default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}: expected a whole number of at least 1, found {value!r}")
    return value


def _checked_target(target: str | int) -> str:
    text = str(target)
    if text not in ("labels", "predicted") and not text.isdecimal():
        raise InputError(f"target: expected 'labels', 'predicted' or a class number, found {target!r}")
    return text


def _check_recipe(recipe: Recipe) -> None:
    if not recipe.selectors:
        raise InputError("compute: expected at least one selector, found none")
    if not recipe.sparsities and not all(selector.single for selector in recipe.selectors):
        raise InputError("compute: expected at least one sparsity, for example 0.9")
    keys = [key for key, _, _ in recipe.keys()]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise InputError(f"compute: {', '.join(sorted(twice))} is asked for twice; name each selector and sparsity once")
    if recipe.scores not in (None, "float16", "float32"):
        raise InputError(f"scores: expected 'float16' or 'float32', found {recipe.scores!r}")


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


__all__ = ["Job", "Plan", "Report", "SampleError", "compute", "merge", "parts_folder", "plan", "software_versions"]
