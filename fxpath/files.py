"""Writing a file in a single step that happens or does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .errors import InputError

if TYPE_CHECKING:
    import pandas as pd


@contextmanager
def appearing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to that gets its name, over an older one, after it is whole and on the disk; else it is gone.

    Folders on the way are made. Raises `InputError` where the path cannot be written.
    """
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except BaseException as problem:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if isinstance(problem, OSError):
            raise InputError(
                f"cannot write {target}: {problem}; free disk space, or give a folder that you may write to"
            ) from problem
        raise


def save_table(table: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Write a table as CSV (UTF-8, no index, numbers in full) and return its path. Raises as `appearing`."""
    with appearing(path) as file:
        file.write(table.to_csv(index=False).encode())
    return Path(path)
