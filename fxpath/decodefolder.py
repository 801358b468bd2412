"""A data set → a folder of decodings: pictures, figures, response curves; photo by photo, so that a job can go on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .climbing import Decoding, require_pictures
from .decodefiles import DONE, FEATURES, PhotoFiles, file_name, responses, write_json
from .decodephoto import Task, decode_photo
from .digests import bytes_of
from .errors import BranchError, InputError, RestrictionError, SampleError, StoreError
from .files import save_table
from .given import checked_ids, checked_target
from .inputspace import InputSpace
from .items import collate, misfit, read_item, reason_of
from .keys import checked_sparsities
from .network import Network
from .progress import no_bars
from .records import require_same
from .responses import identity
from .selectors import Selector, parse
from .selectors.registry import parameters

SELECTORS = ("neuron_mct", "neuron_intgrad", "random")
SPARSITY = 0.98  # the paper's, of Fig. 3
_JOB, _TABLE = "decode.json", "responses.csv"


@dataclass(frozen=True)
class DecodeReport:
    """What a job did: of so many `photos`, those decoded now and those that were there; `failed` says why by id."""

    folder: Path
    photos: int
    decoded: int
    reused: int
    failed: dict[str, str]
    seconds: float

    @property
    def table(self) -> Path:
        """The file with a row for each row of all photos."""
        return self.folder / _TABLE


def decode_photos(
    network: Network,
    dataset: Any,
    folder: str | os.PathLike[str],
    *,
    selectors: Sequence[Selector | str] = SELECTORS,
    sparsity: float = SPARSITY,
    target: str | int = "predicted",
    decoding: Decoding | None = None,
    sites: Sequence[str] = (),
    space: InputSpace | None = None,
    max_batch: int | None = 1,
    model: str = "",
    classes: Sequence[str] = (),
    progress: bool = True,
) -> DecodeReport:
    """Decode every photo of a data set into a folder of its own: Fig. 3a, and with `sites` Fig. 3b.

    Of each photo: `decoded.png` (the photo and all rows), a PNG a row, `curves.csv` and `curves.png` (response over
    steps), `decoded.json` (all numbers), and a `features_<site>.png`. Channels are in `features/`, each once for all
    photos. `responses.csv` is the table of all rows of all photos, `decode.json` says what the job is.

    A job that was stopped goes on: a photo is done when its `decoded.json` is there, which is written last. Raises
    `StoreError` where the folder holds another job's results. A pathway that a selector does not reach is missing, with
    the reason. `space` as in `decode`; without it the range is that of the first photo that can be used. `max_batch`:
    one row at a time does not depend on the others, and on a CPU takes no longer.
    """
    if network._restriction is not None:
        raise RestrictionError("decode: the network is restricted; leave the with block first")
    require_pictures("decode", network)
    started = time.perf_counter()
    ids, path = checked_ids(dataset), Path(folder)
    (level,) = checked_sparsities((sparsity,))
    if space is None:
        space = _known_space(path) or _space_of_photos(network, dataset, ids)
    task = Task(
        network, tuple(map(parse, [selectors] if isinstance(selectors, str) else selectors)), float(level),
        checked_target(target, dataset), decoding or Decoding(), space,
        tuple(network.index.site(name).name for name in sites), max_batch,
    )  # fmt: skip
    record = _record(task, model)
    _begin(path, record)
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    files = PhotoFiles(task, path, digest, tuple(classes))
    failed: dict[str, str] = {}
    done: list[Path] = []
    reused = 0
    with nullcontext() if progress else no_bars():
        for position in tqdm(range(len(ids)), desc="photos", unit="photo", disable=not progress, leave=False):
            own = path / file_name(ids[position])
            try:
                reused += _photo(files, dataset, position, ids[position], own)
            except (SampleError, BranchError) as error:
                failed[ids[position]] = reason_of(error)
            else:
                done.append(own)
                save_table(responses(done), path / _TABLE)
    return DecodeReport(path, len(ids), len(done) - reused, reused, failed, time.perf_counter() - started)


def done_photos(folder: Path) -> int:
    """How many photos of a folder are finished."""
    return len(list(folder.glob(f"*/{DONE}")))


def _photo(files: PhotoFiles, dataset: Any, position: int, name: str, folder: Path) -> bool:
    """Decode one photo, or find that it has been: True. Raises `SampleError` where it cannot be used."""
    task = files.task
    item = read_item(dataset, position, name)
    problem = item.problem or misfit(item, task.network)
    if problem is None and task.target == "labels" and item.label < 0:
        problem = "no label, and labels are to be explained"
    if problem is not None:
        raise SampleError(problem, [0], [problem])
    tensors = collate([item], task.network).tensors
    content = hashlib.sha256(b"".join(map(bytes_of, tensors))).hexdigest()
    if files.finished(folder, content):
        return True
    files.write(folder, item, content, decode_photo(task, item))
    return False


def _record(task: Task, model: str) -> dict[str, Any]:
    """What makes two jobs the same, as JSON data."""
    keys = task.keys  # raises for one that is asked for twice
    return json.loads(json.dumps({  # type: ignore[no-any-return]
        "schema": 1, "model": model, "fingerprint": task.network.fingerprint,
        "selectors": {key: parameters(selector) for key, selector in keys.items()}, "sparsity": task.sparsity,
        "target": task.target, "response": task.network.response.name, "response_is": identity(task.network.response),
        "decoding": asdict(task.decoding), "space": task.space.json(), "sites": task.sites,
        "max_batch": task.max_batch,
    }))  # fmt: skip


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        said = json.loads((folder / _JOB).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"decode: {folder / _JOB} cannot be read ({error}); choose another folder") from error
    if not isinstance(said, dict):
        raise StoreError(f"decode: {folder / _JOB} says of no job; choose another folder")
    return said


def _begin(folder: Path, record: dict[str, Any]) -> None:
    """Say in the folder what is made there; raises `StoreError` where something else is."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"decode: expected a folder, found the file {folder}; choose another")
    there = _read_record(folder)
    if there is None:
        write_json(record, folder / _JOB)
    elif there != record and not done_photos(folder) and not (folder / FEATURES).exists():
        write_json(record, folder / _JOB)  # that job never got anywhere
    elif there != record:
        ours = dict.fromkeys(there) | record  # what that one alone says differs, too
        require_same(ours, there, str(folder), "choose another folder, or remove this one", said="decode")


def _known_space(folder: Path) -> InputSpace | None:
    """The space that an earlier start of the job settled on."""
    try:
        said = (_read_record(folder) or {})["space"]
        return InputSpace(tuple(map(tuple, said["matrix"])), tuple(said["offset"]), said["source"])
    except (KeyError, TypeError, InputError):
        return None


def _space_of_photos(network: Network, dataset: Any, ids: Sequence[str]) -> InputSpace:
    for position, name in enumerate(ids):
        item = read_item(dataset, position, name)
        if item.problem is None and misfit(item, network) is None:
            return InputSpace.of_samples(collate([item], network).tensors[0])
    raise InputError(
        f"decode: none of {len(ids)} photos can be used; the first: {item.problem or misfit(item, network)}"
    )
