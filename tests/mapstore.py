"""A store of attribution maps that is held in memory: what figures and statistics of maps read, from arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd


@dataclass
class MapsInMemory:
    """n samples, of which those in `failed` are not ok, with the maps `(n, H, W)` of each key; NaN where missing."""

    arrays: dict[str, npt.NDArray[np.float32]]
    failed: tuple[int, ...] = ()
    reason: str = "sparsity 0.9 was not reached"
    thumbnails: npt.NDArray[np.uint8] | None = None
    names: tuple[str, ...] | None = None
    classes: tuple[str, ...] = ("bull mastiff", "folding chair", "beaker")
    changes: dict[str, list[Any]] = field(default_factory=dict)
    model: str = "zoo:squeezenet1_1"
    path: str = "run.h5"
    read: list[int] = field(default_factory=list)  # how many samples were read at once

    def __post_init__(self) -> None:
        count = len(next(iter(self.arrays.values())))
        self.map_keys = tuple(self.arrays)
        self.ids = np.array(self.names or [f"photo-{row}.jpg" for row in range(count)])
        self.ok = ~np.isin(np.arange(count), self.failed)
        self.header = SimpleNamespace(model=self.model)
        for maps in self.arrays.values():
            maps[~self.ok] = np.nan

    def __enter__(self) -> MapsInMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def samples(self) -> pd.DataFrame:
        rows = np.arange(len(self.ids))
        columns: dict[str, Any] = {"id": self.ids, "label": rows % 3, "target": rows % 3, "prediction": rows % 3}
        return pd.DataFrame(columns | {"probability": 0.5 + rows / 100} | self.changes)

    def row(self, sample: int | str) -> int:
        return self.ids.tolist().index(sample) if isinstance(sample, str) else int(sample)

    def thumbnail(self, sample: int | str) -> npt.NDArray[np.uint8] | None:
        return None if self.thumbnails is None else self.thumbnails[self.row(sample)]

    def maps(self, key: str, rows: slice | None = None) -> npt.NDArray[np.float32]:
        found = self.arrays[key][rows or slice(None)]
        self.read.append(len(found))
        return found.copy()

    def map_missing(self, key: str) -> npt.NDArray[np.str_]:
        gone = np.isnan(self.arrays[key]).all(axis=(1, 2))
        return np.where(~self.ok, "not an image", np.where(gone, self.reason, ""))


def sparse_maps(count: int, height: int, width: int, share: float, seed: int = 0) -> npt.NDArray[np.float32]:
    """Signed maps of which about this share of pixels is 0."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((count, height, width)) ** 3
    return np.where(rng.random(values.shape) < share, 0.0, values).astype(np.float32)
