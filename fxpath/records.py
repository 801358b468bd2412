"""What the disk says of a job: its folder of parts, its record, and the record that a finished store carries."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import StoreError
from .store import Store, open_store

try:
    import fcntl
except ImportError:  # only POSIX has it; elsewhere nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]

_RECORD = "job.json"
_UNSAID: dict[str, Any] = {"diagnose": 0, "response_is": "", "padding": ""}  # what a record that does not name it has


def parts_folder(path: Path) -> Path:
    """Where a job that writes `path` keeps its finished micro-batches."""
    return path.with_name(f"{path.name}.parts")


def maps_folder(path: Path) -> Path:
    """Where a job that adds maps to the store at `path` keeps its finished micro-batches."""
    return path.with_name(f"{path.name}.maps")


def part_name(number: int) -> str:
    """The file of micro-batch `number`."""
    return f"part-{number:07d}.h5"


def parts_found(folder: Path) -> list[int]:
    """The numbers of the parts in a folder, whole or not, in order."""
    if not folder.is_dir():
        return []
    numbers = (path.stem.removeprefix("part-") for path in folder.glob("part-*.h5"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def read_record(folder: Path) -> dict[str, Any]:
    """What a folder of parts says of its job; raises `StoreError` where it says nothing."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or type(record["parts"]) is not int:
            raise ValueError("no job record")
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{folder}: expected the parts of a job with a {_RECORD}, found none") from None
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{folder}/{_RECORD} cannot be read ({error}); remove the folder to start again") from error
    return record


@contextmanager
def held(folder: Path, *, said: str = "compute") -> Iterator[None]:
    """A folder of parts, made if need be, for this process alone; at the end it is gone if it holds no part.

    `said` is the command, with which messages begin. Raises `StoreError` where the folder cannot be made, or another
    process is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = None if fcntl is None else os.open(folder, os.O_RDONLY)
    except (OSError, ValueError) as error:
        raise _unwritable(folder, error, said) from error
    try:
        try:
            if number is not None:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"{said}: another process is at work in {folder}; wait for it, or choose another output file"
            ) from None
        except OSError:
            pass  # not every file system has locks
        try:
            yield
        finally:
            remove_empty(folder)
    finally:
        if number is not None:
            os.close(number)


def write_record(folder: Path, record: dict[str, Any], *, said: str = "compute") -> None:
    """Write the record of a job that begins; raises `StoreError` where that fails."""
    fresh = folder / f".{_RECORD}.tmp"
    try:
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(folder / _RECORD)
    except OSError as error:
        raise _unwritable(folder, error, said) from error


def _unwritable(folder: Path, error: Exception, said: str) -> StoreError:
    reason = getattr(error, "strerror", None) or error
    return StoreError(
        f"{said}: {folder} cannot be written ({reason}); free disk space, or choose an output in a folder that you may "
        "write to"
    )


def remove_parts(folder: Path) -> None:
    """Remove what a job keeps in its folder of parts, the record last, and the folder if nothing else is in it."""
    with suppress(OSError):
        clear_parts(folder)
        remove_empty(folder)


def clear_parts(folder: Path) -> None:
    """Remove the parts that a job keeps, but neither its record nor the folder, which may be held."""
    for pattern in (".part-*.tmp", "part-*.h5"):
        for path in sorted(folder.glob(pattern)):
            path.unlink()


def remove_empty(folder: Path) -> None:
    """Remove a folder of parts that holds none, so that a job that could not begin leaves nothing behind."""
    with suppress(OSError):  # a stranger's file is in it, or it was never there
        if not parts_found(folder):
            for path in (*folder.glob(".part-*.tmp"), folder / f".{_RECORD}.tmp", folder / _RECORD):
                path.unlink(missing_ok=True)
            folder.rmdir()


def record_of(path: Path) -> dict[str, Any]:
    """The record of the job that wrote a finished store; raises `StoreError` where no single job did."""
    way_out = "choose another output file, or move this one away"
    try:
        store = open_store(path)
    except StoreError as problem:
        if not path.exists():  # a link to nowhere
            raise
        raise StoreError(f"{problem}. It is in the way of a new one: {way_out}") from problem
    with store:
        model = store.header.model
        if not store.complete:
            raise StoreError(f"compute: {path} is a part of a store (of {model}), not a finished one; {way_out}")
        try:
            record = json.loads(str(store.header.notes["record"]))
            if not isinstance(record, dict):
                raise ValueError("no job record")
        except (KeyError, ValueError):
            raise StoreError(f"compute: {path} holds a store of {model} that no single job wrote; {way_out}") from None
        return record


def require_same(
    ours: dict[str, Any], theirs: dict[str, Any], where: str, way_out: str, *, said: str = "compute"
) -> None:
    """Raise `StoreError` that names what differs between two jobs."""
    here, there = _UNSAID | ours, _UNSAID | theirs
    differing = [name for name in dict.fromkeys((*ours, *_UNSAID)) if name != "parts" and there.get(name) != here[name]]
    if differing:
        shown = "; ".join(
            "other samples, or in another order"
            if name == "ids"
            else "{}: there {}, here {}".format(name, *map(_brief, _apart(there.get(name), here[name])))
            for name in differing[:4]
        )
        raise StoreError(f"{said}: {where} holds the results of another job ({shown}); {way_out}")


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _apart(one: Any, other: Any) -> tuple[Any, Any]:
    """Two values, or where they are lists the first entries that differ."""
    if isinstance(one, list) and isinstance(other, list):
        pairs = [(a, b) for a, b in zip(one, other, strict=False) if a != b]
        return _apart(*pairs[0]) if pairs else (one[len(other) :], other[len(one) :])
    if isinstance(one, dict) and isinstance(other, dict):
        names = [name for name in (*one, *other) if one.get(name) != other.get(name)]
        return {name: one.get(name) for name in names}, {name: other.get(name) for name in names}
    return one, other


def require_readable(store: Store) -> None:
    """Read every table to its last byte; raises `StoreError` where one is damaged."""
    store.samples()
    store.active()
    for key in store.keys:
        for name in store.columns(key):
            store.column(key, name)
    for row in range(len(store)):
        store.thumbnail(row)
        for family in store.score_families:
            store.scores(family, row)
