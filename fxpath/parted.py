"""A job that can be stopped at any moment: its finished micro-batches are part files in a folder of their own."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .errors import StoreError
from .given import reachable
from .records import part_name, parts_found, read_record, require_same, write_record


class Parted(ABC):
    """A job on samples `ids` that keeps its finished micro-batches as parts in `folder`, beside its record.

    `said` is the command, with which messages begin; `way_out` is what can be done about another job's parts.
    """

    said: str
    way_out: str
    folder: Path
    ids: list[str]

    @property
    @abstractmethod
    def micro_batch(self) -> int:
        """Samples at a time."""

    @property
    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What makes two jobs the same, as JSON data."""

    @abstractmethod
    def look_at(self, part: Path, number: int) -> None:
        """Read the part of micro-batch `number` to its last byte; raises `StoreError` where it is not this job's."""

    @property
    def digest(self) -> str:
        """SHA-256 of the record."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()

    @property
    def parts(self) -> int:
        """Number of micro-batches."""
        return math.ceil(len(self.ids) / self.micro_batch)

    def rows(self, number: int) -> slice:
        """The samples of micro-batch `number`."""
        return slice(number * self.micro_batch, min((number + 1) * self.micro_batch, len(self.ids)))

    def found(self) -> list[int]:
        """The numbers of the parts that are there, whole or not; raises `StoreError` where they are another job's."""
        with reachable(self.folder, said=self.said):
            found = parts_found(self.folder)
        if found:
            require_same(self.record, read_record(self.folder), str(self.folder), self.way_out, said=self.said)
        return found

    def prepare(self, *, progress: bool = False) -> list[int]:
        """Write the record, or look at the parts there are; returns the numbers of the parts that are missing."""
        found = self.found()
        if not found:
            write_record(self.folder, self.record, said=self.said)
        shown = tqdm(found, desc="look at parts", unit="part", disable=not progress, leave=False)
        whole = {number for number in shown if number < self.parts and self.is_whole(number)}
        return [number for number in range(self.parts) if number not in whole]

    def is_whole(self, number: int) -> bool:
        """Whether a part is this job's and can be read to its last byte; says so where it is not."""
        try:
            self.look_at(self.folder / part_name(number), number)
        except StoreError as error:
            tqdm.write(f"{self.said}: {error}; this part is computed again", file=sys.stderr)
            return False
        return True
