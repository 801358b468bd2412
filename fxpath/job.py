"""One job: its identity, the micro-batch it settles on, and what of it is on the disk."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import EmptyPathwaysWarning, RestrictionError, StoreError
from .given import (
    checked_ids,
    checked_number,
    checked_path,
    checked_recipe,
    checked_target,
    checked_thumbnails,
    reachable,
)
from .items import Item, collate, read_fitting
from .keys import checked_sparsities, exact_sparsity
from .microbatch import Recipe
from .network import Network
from .parted import Parted
from .placement import SIZES, PlacementWarning, settled, tried
from .records import (
    part_name,
    parts_folder,
    parts_found,
    read_record,
    record_of,
    require_readable,
    require_same,
)
from .responses import identity
from .schema import Header
from .selectors import Selector, parse
from .selectors.registry import parameters
from .store import open_store

__all__ = ["Job", "part_name", "parts_folder", "read_record", "software_versions"]

SAME, DIFFERENT, NOT_TRIED = "every place gives the same bits", "places differ in last bits", "not tried"


def software_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("fxpath", "torch", "torchvision", "numpy", "h5py"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class Job(Parted):
    """One data set, one network, one file: everything that `compute` and `--dry-run` share.

    Micro-batch and threads that are not given are those of the parts or the store that is there; where nothing is
    there, `settle` chooses the micro-batch.
    """

    said = "compute"
    way_out = "remove that folder, or choose another output file"

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
        diagnose: int,
        thumbnails: int,
        model: str,
        preprocessing: str,
        classes: Sequence[str],
    ) -> None:
        if network._restriction is not None:
            raise RestrictionError("compute: the network is restricted; leave the with block first")
        self.network, self.dataset, self.path = network, dataset, checked_path(path)
        self.folder = parts_folder(path)
        self.ids = checked_ids(dataset)
        self.thumbnails = checked_thumbnails(thumbnails, dataset)
        self.model = model or network.traced.graph_module.__class__.__name__
        self.preprocessing, self.classes = preprocessing, tuple(classes)
        self.fingerprint = network.fingerprint
        self.created = datetime.now(UTC).isoformat(timespec="seconds")
        self.before = self._before()
        known = self.before or {"micro_batch": SIZES[0], "threads": torch.get_num_threads()}
        self.asked = None if micro_batch is None else checked_number("micro_batch", micro_batch)
        self.threads = checked_number("threads", known.get("threads") if threads is None else threads)
        self.place: str = known.get("place", NOT_TRIED)
        self.outputs: int | None = known.get("outputs")
        self.recipe = checked_recipe(
            Recipe(
                tuple(parse(selector) for selector in ([selectors] if isinstance(selectors, str) else selectors)),
                tuple(float(exact_sparsity(sparsity)) for sparsity in checked_sparsities(sparsities)),
                checked_target(target, dataset),
                self.asked or checked_number("micro_batch", known.get("micro_batch")),
                scores,
                strict,
                checked_number("diagnose", diagnose, 0),
            )
        )
        self._warn_of_empty()

    def _warn_of_empty(self) -> None:
        index = self.network.index
        digits = len(str(index.units))
        highest = (index.units - 1) * 10**digits // index.units / 10**digits
        for sparsity in self.recipe.sparsities:
            if index.kept(sparsity) == 0 and not all(selector.single for selector in self.recipe.selectors):
                warnings.warn(
                    f"compute: the sparsity {sparsity!r} keeps none of {index.units} neurons; leave it out, or take "
                    f"one of at most {highest!r}",
                    EmptyPathwaysWarning,
                    stacklevel=4,
                )

    def _before(self) -> dict[str, Any] | None:
        """The record of the job whose store or parts are there."""
        with reachable(self.path):
            if os.path.lexists(self.path):
                return record_of(self.path)
            return read_record(self.folder) if parts_found(self.folder) else None

    def settle(self, item: Item | None) -> None:
        """Choose the micro-batch of a job that begins, by a trial with a sample that can be used (None: there is none).

        What was there before has settled it for a job that goes on.
        Warns with `PlacementWarning` where the one that was asked for lets a sample's place in it change bits.
        """
        if self.before is not None or item is None:
            return
        target = int(self.recipe.target) if self.recipe.target.isdecimal() else None
        sample = replace(collate([item], self.network), target=target)
        size, trial = settled(self.network, sample, self.asked)
        self.recipe = replace(self.recipe, micro_batch=size)
        self.place, self.outputs = SAME if trial.equal else DIFFERENT, trial.classes
        if not trial.equal:
            better = next(other for other in SIZES if other < size and tried(self.network, sample, other).equal)
            warnings.warn(
                f"compute: in a micro-batch of {size} with {self.threads} threads a sample's place changes its last "
                "bits (matrix products), so that another order of the samples may change a few bits of the masks; a "
                f"micro-batch of {better} does not",
                PlacementWarning,
                stacklevel=2,
            )

    # --- identity ---

    @property
    def header(self) -> Header:
        """What the store and each of its parts say of network and job."""
        network = self.network
        types = (str(tensor.dtype) for tensor in network.tensors.values() if tensor.is_floating_point())
        return Header(
            model=self.model,
            fingerprint=self.fingerprint,
            index=network.index,
            edges=np.array(network.edges, dtype=np.int32).reshape(-1, 2),
            classes=self.classes,
            input_shape=json.dumps([list(shape) for shape in network.input_shapes]),
            preprocessing=self.preprocessing,
            micro_batch=self.recipe.micro_batch,
            threads=self.threads,
            precision=next(types, "torch.float32").removeprefix("torch."),
            target=self.recipe.target,
            response=network.response.name,
            versions=json.dumps(software_versions()),
            created=self.created,
            notes={
                "device": network.device.type,
                "place": self.place,
                "job": self.digest,
                "record": json.dumps(self.record),
            },
        )

    @property
    def record(self) -> dict[str, Any]:
        """What makes two jobs the same, as JSON data; kept as job.json and in the store."""
        recipe = self.recipe
        record = {
            "schema": 1,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "selectors": [[selector.key, parameters(selector)] for selector in recipe.selectors],
            "sparsities": list(recipe.sparsities),
            "target": recipe.target,
            "response": self.network.response.name,
            "micro_batch": recipe.micro_batch,
            "threads": self.threads,
            "device": self.network.device.type,
            "scores": recipe.scores,
            "thumbnails": self.thumbnails,
            "preprocessing": self.preprocessing,
            "samples": len(self.ids),
            "ids": hashlib.sha256("\0".join(self.ids).encode()).hexdigest(),
            "parts": self.parts,
            "place": self.place,
            "outputs": self.outputs,
        }
        padding = "" if self.network.padding is None else repr(self.network.padding.given)
        more = {"diagnose": recipe.diagnose, "response_is": identity(self.network.response), "padding": padding}
        record |= {name: value for name, value in more.items() if value}
        data: dict[str, Any] = json.loads(json.dumps(record))  # a tuple becomes a list, as it will when read back
        return data

    @property
    def micro_batch(self) -> int:
        """Samples at a time."""
        return self.recipe.micro_batch

    def read(self, number: int) -> list[Item]:
        """The samples of micro-batch `number`."""
        rows = self.rows(number)
        return read_fitting(self.dataset, rows, self.ids[rows], self.network, thumbnails=self.thumbnails)

    # --- what is there already ---

    def finished(self) -> bool:
        """Whether the store is there and is this job's; raises `StoreError` where it is another's."""
        if not os.path.lexists(self.path):
            return False
        way_out = "choose another output file, or move this one away"
        require_same(self.record, self.before or {}, str(self.path), way_out)
        return True

    def look_at(self, part: Path, number: int) -> None:
        """Read the part of micro-batch `number` to its last byte; raises `StoreError` where it is not this job's."""
        with open_store(part) as store:
            if store.header.notes.get("job") != self.digest or list(store.ids) != self.ids[self.rows(number)]:
                raise StoreError(f"{part}: expected samples of this job, found others")
            require_readable(store)
