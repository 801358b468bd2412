"""One job and what of it is on the disk: its identity, its folder of parts, and what is missing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .errors import InputError, StoreError
from .keys import exact_sparsity
from .microbatch import Recipe
from .network import Network
from .schema import Header
from .selectors import Selector, parse
from .selectors.registry import parameters
from .store import open_store


def parts_folder(path: Path) -> Path:
    """Where a job that writes `path` keeps its finished micro-batches."""
    return path.with_name(f"{path.name}.parts")


def part_name(number: int) -> str:
    """The file of micro-batch `number`."""
    return f"part-{number:07d}.h5"


def read_record(folder: Path) -> dict[str, Any]:
    """What a folder of parts says of its job; raises `StoreError` where it says nothing."""
    try:
        record = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not isinstance(record["parts"], int):
            raise ValueError("no job record")
    except FileNotFoundError:
        raise StoreError(f"{folder}: expected the parts of a job with a job.json, found none") from None
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{folder}/job.json cannot be read ({error}); remove the folder to start again") from error
    return record


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
        record = read_record(self.folder) if (self.folder / "job.json").exists() else None
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
            read_record(self.folder), str(self.folder), "remove that folder, or choose another output file"
        )
        return [number for number in range(self.parts) if not self.is_whole(number)]

    def is_whole(self, number: int) -> bool:
        """Whether a part is there, can be read and holds the right samples."""
        part = self.folder / part_name(number)
        if not part.exists():
            return False
        try:
            with open_store(part) as store:
                return list(store.ids) == self.ids[self.rows(number)]
        except StoreError as error:
            tqdm.write(f"compute: {error}; this part is computed again")
            return False

    def rows(self, number: int) -> slice:
        """The samples of micro-batch `number`."""
        return slice(number * self.recipe.micro_batch, min((number + 1) * self.recipe.micro_batch, len(self.ids)))

    def part_header(self) -> Header:
        """The header of each part, and so of the store: it carries the job's record."""
        return replace(
            self.header,
            notes={**self.header.notes, "job": self.digest, "record": json.dumps(self.record)},
        )


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
    keys = [key for key, _, _ in recipe.columns()]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise InputError(
            f"compute: {', '.join(sorted(twice))} is asked for twice; name each selector and sparsity once"
        )
    if recipe.scores not in (None, "float16", "float32"):
        raise InputError(f"scores: expected 'float16' or 'float32', found {recipe.scores!r}")
