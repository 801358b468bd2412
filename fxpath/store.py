"""Reading a store: pathways, outcomes and scores of many samples, out of one HDF5 file, without torch or the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt

from .errors import StoreError, unknown
from .hdf5 import Array, Source, attribute, name_of, read, read_text, reading
from .keys import PathwayKey
from .maptables import MapRows, map_attributes, map_names, map_tables
from .merging import merge_stores
from .neurons import NeuronIndex, Site, select_largest
from .parts import write_store
from .schema import (
    SAMPLE_COLUMNS,
    SCHEMA,
    VERSION,
    Header,
    PathwayRows,
    Rows,
    active_table,
    names_below,
    open_file,
    pathway_attributes,
    pathway_group,
    pathway_names,
    pathway_table,
    read_header,
    sample_tables,
    score_tables,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "SCHEMA",
    "VERSION",
    "Header",
    "MapRows",
    "PathwayRows",
    "Rows",
    "Store",
    "merge_stores",
    "open_store",
    "write_store",
]

_FEW = 20_000  # ids among which the nearest are looked for one by one


def open_store(source: Source) -> Store:
    """Open a store given by path, binary file or `h5py.File`; only attributes and the index are read.

    Raises `StoreError` where it is no store of this version, damaged, or claims more than the file can hold. Use it
    as a context manager; an `h5py.File` that was given stays open.
    """
    file = open_file(source)
    try:
        with reading(file, "the store"):
            return Store(file, owned=file is not source)
    except BaseException:
        if file is not source:
            file.close()
        raise


class Store:
    """One store, read lazily: n samples, their active neurons, and for each pathway key a mask and an outcome.

    `keys` are the pathways in the order of the file, `families` those keys without their sparsities, `index` the
    neurons, `map_keys` the attribution methods that have maps. Everything comes as NumPy arrays or pandas tables; a
    sample is named by its row or its id. Any method raises `StoreError` for an unknown name and where the file turns
    out to be damaged, `SiteError` for a site.
    """

    def __init__(self, file: h5py.File, *, owned: bool) -> None:
        self._file = file
        self._owned = owned
        self.path = name_of(file)
        self.header: Header = read_header(file)
        self.index: NeuronIndex = self.header.index
        self.complete = bool(attribute(file, "complete", int))
        self._active = active_table(file, self.index)
        self._count: int = self._active.shape[0]
        self.keys: tuple[str, ...] = names_below(file, "pathways")
        self.score_families: tuple[str, ...] = names_below(file, "scores")
        self.map_keys: tuple[str, ...] = map_names(file)
        self._columns: dict[str, tuple[str, ...]] = {}
        self._pathways: dict[tuple[str, str], h5py.Dataset] = {}
        self._scores: dict[str, dict[str, h5py.Dataset]] = {}
        self._maps: dict[str, dict[str, h5py.Dataset]] = {}

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, unless it was given open."""
        if self._owned:
            self._file.close()

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"Store({self.path!r}: {self._count} samples, {len(self.keys)} pathways each, {self.index!r})"

    @property
    def families(self) -> tuple[str, ...]:
        """The keys without their sparsities, each once."""
        return tuple(dict.fromkeys(PathwayKey.parse(key).family for key in self.keys))

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number, () where the store has none."""
        return self.header.classes

    # ------------------------------------------------------------------------------------------------ samples

    @cached_property
    def _samples(self) -> dict[str, h5py.Dataset]:
        return sample_tables(self._opened(), self._count, len(self.index))

    @cached_property
    def ids(self) -> npt.NDArray[np.str_]:
        """`(n,)` the names of the samples."""
        names: npt.NDArray[np.str_] = self._column(self._samples["id"], slice(None))
        return names

    @cached_property
    def ok(self) -> npt.NDArray[np.bool_]:
        """`(n,)` which samples were computed; the others have zero masks and NaN numbers."""
        return np.asarray(self._column(self._samples["status"], slice(None)) == "ok")

    def samples(self) -> pd.DataFrame:
        """One row a sample: id, label, target, prediction, label_rank, response, probability, status."""
        import pandas as pd

        return pd.DataFrame({name: self._column(self._samples[name], slice(None)) for name in SAMPLE_COLUMNS})

    @cached_property
    def _rows(self) -> dict[str, int]:
        rows = {name: row for row, name in enumerate(self.ids.tolist())}
        if len(rows) != self._count:
            raise StoreError(f"{self.path}: /samples/id: expected each id once, found one twice; compute it again")
        return rows

    def row(self, sample: int | str) -> int:
        """The row of a sample given by its id or its row (negative: from the end)."""
        if isinstance(sample, str):
            if sample not in self._rows:
                near: list[str] = sorted(self._rows)
                if len(near) > _FEW:
                    place = int(np.searchsorted(near, sample))
                    near = near[max(0, place - 10) : place + 10]
                raise StoreError(f"{self.path}: {unknown('sample', sample, near)}")
            return self._rows[sample]
        if not isinstance(sample, int | np.integer) or not -self._count <= sample < self._count:
            raise StoreError(f"{self.path}: sample: expected an id or a row 0 … {self._count - 1}, found {sample!r}")
        return int(sample) % self._count

    def thumbnail(self, sample: int | str) -> npt.NDArray[np.uint8] | None:
        """A small picture of the sample `(h, w, 3)`, None where the store has none."""
        row = self.row(sample)
        pictures = self._samples.get("thumbnails")
        return None if pictures is None else self._column(pictures, slice(row, row + 1))[0]

    def units(self, rows: slice | None = None) -> npt.NDArray[np.int64]:
        """Scalar units of each site that are a sample's own, `(m, sites)`: all, unless padding tokens are excluded."""
        wanted = self._slice(rows)
        if "units" in self._samples:
            found: npt.NDArray[np.int64] = self._column(self._samples["units"], wanted).astype(np.int64)
            return found
        return np.tile([site.units for site in self.index.sites], (wanted.stop - wanted.start, 1))

    def neurons(self, rows: slice | None = None) -> npt.NDArray[np.int64]:
        """Neurons of each site that are a sample's own, `(m, sites)`; every channel is."""
        units = self.units(rows)
        if self.index.granularity == "unit":
            return units
        return np.tile([site.neurons for site in self.index.sites], (len(units), 1))

    # ----------------------------------------------------------------------------------------------- pathways

    def packed(
        self, key: str, rows: slice | None = None, site: str | int | Site | None = None
    ) -> npt.NDArray[np.uint8]:
        """Packed masks `(m, nbytes)` of a key, or only the bytes of one site."""
        return self._bits(self._table(key, "mask"), rows, site)

    def active(self, rows: slice | None = None, site: str | int | Site | None = None) -> npt.NDArray[np.uint8]:
        """Packed activation patterns `(m, nbytes)` of the original network, or only the bytes of one site."""
        return self._bits(self._active, rows, site)

    def mask(self, key: str, sample: int | str, site: str | int | Site | None = None) -> npt.NDArray[np.bool_]:
        """A sample's pathway `(N,)` bool, or its part at one site in the site's shape (channels: its gates' shape).

        All False where the sample was not computed (see `ok`) or the sparsity not reached (see the column "missing").
        """
        row = self.row(sample)
        packed = self.packed(key, slice(row, row + 1), site)[0]
        if site is None:
            return self.index.unpack(packed)
        found = self.index.site(site)
        return self.index.unpack_site(found, packed).reshape(found.gate_shape)

    def column(self, key: str, name: str, rows: slice | None = None) -> Array:
        """A column of a pathway by name: "density" `(m,)`, "kept" `(m, sites)`, "diagnostics/<name>" `(m, …)`."""
        names = self.columns(key)
        if name not in names:
            raise StoreError(f"{self.path}: {key}: {unknown('column', name, names)}")
        values: Array = self._column(self._table(key, name), self._slice(rows))
        return values

    def columns(self, key: str) -> tuple[str, ...]:
        """The names that `column` takes for this pathway."""
        if self._known(key) not in self._columns:
            self._columns[key] = pathway_names(pathway_group(self._opened(), key), self.index)
        return self._columns[key]

    def outcomes(self, key: str) -> pd.DataFrame:
        """One row a sample: every column of the pathway that holds one value a sample, diagnostics included."""
        import pandas as pd

        tables = {name: self._table(key, name) for name in self.columns(key)}
        return pd.DataFrame(
            {name: self._column(table, slice(None)) for name, table in tables.items() if len(table.shape) == 1}
        )

    def parameters(self, key: str) -> dict[str, Any]:
        """The whole parameter set of a pathway's selector."""
        return pathway_attributes(pathway_group(self._opened(), self._known(key)))[1]

    def sparsity(self, key: str) -> float | None:
        """The sparsity of a pathway, None where it has none."""
        return pathway_attributes(pathway_group(self._opened(), self._known(key)))[2]

    def selector(self, key: str) -> str:
        """The selector of a pathway."""
        return pathway_attributes(pathway_group(self._opened(), self._known(key)))[0]

    def blocks(self, nbytes: int = 64 * 2**20) -> Iterator[slice]:
        """Slices that cover all samples, each with at most `nbytes` of packed masks (but at least one sample)."""
        step = max(1, nbytes // max(1, self.index.nbytes))
        for start in range(0, self._count, step):
            yield slice(start, min(start + step, self._count))

    # ------------------------------------------------------------------------------------------------- scores

    def scores(self, family: str, sample: int | str, site: str | int | Site | None = None) -> npt.NDArray[np.float32]:
        """A sample's signed scores `(N,)` float32, or those of one site in its shape."""
        if family not in self.score_families:
            raise StoreError(f"{self.path}: {unknown('family with scores', family, self.score_families)}")
        if family not in self._scores:
            self._scores[family] = score_tables(self._opened(), family, self.index, self._count)
        tables, row = self._scores[family], self.row(sample)
        found = None if site is None else self.index.site(site)
        signed = self._column(tables["signed"], slice(row, row + 1), found.slice if found else slice(None))[0]
        scaled: npt.NDArray[np.float32] = signed.astype(np.float32)
        scaled *= self._column(tables["scale"], slice(row, row + 1))[0]
        return scaled.reshape(found.gate_shape) if found else scaled

    def cut(self, family: str, sparsity: float | str, sample: int | str) -> npt.NDArray[np.bool_]:
        """The pathway `(N,)` of any sparsity out of stored scores: the ⌊(1 − κ)·N⌋ largest |score|, none that is 0.

        N counts the sample's own neurons, as `units` does. Scores stored as float16 round near-ties together, which
        then go to the smaller index. A sample without scores (NaN) has an empty pathway. Raises `SparsityError` outside
        [0, 1).
        """
        row = self.row(sample)
        units = self.units(slice(row, row + 1))[0]
        kept = self.index.kept(sparsity, int(units.sum()))
        signed = self.scores(family, sample)
        by_sign = PathwayKey.parse(family).parameters.get("rank") == "signed"
        size = np.nan_to_num(np.maximum(signed, 0) if by_sign else np.abs(signed), copy=False)
        weights = None
        if self.index.granularity == "channel":
            counts = np.array([site.neurons for site in self.index.sites])
            weights = np.repeat(units // np.maximum(counts, 1), counts)
        masks: npt.NDArray[np.bool_] = select_largest(size, [kept], weights)
        return masks.reshape(-1)

    # --------------------------------------------------------------------------------------------------- maps

    def map(self, key: str, sample: int | str) -> npt.NDArray[np.float32]:
        """A sample's attribution map `(H, W)` float32, signed; NaN where it has none (see `map_missing`)."""
        row = self.row(sample)
        found: npt.NDArray[np.float32] = self.maps(key, slice(row, row + 1))[0]
        return found

    def maps(self, key: str, rows: slice | None = None) -> npt.NDArray[np.float32]:
        """Signed attribution maps `(m, H, W)` float32 of a method; NaN for samples that have none."""
        wanted, tables = self._slice(rows), self._map_tables(key)
        scaled: npt.NDArray[np.float32] = self._column(tables["signed"], wanted).astype(np.float32)
        scaled *= self._column(tables["scale"], wanted)[:, None, None]
        return scaled

    def map_missing(self, key: str, rows: slice | None = None) -> npt.NDArray[np.str_]:
        """Why samples have no map of a method `(m,)`, "" for those that have one."""
        reasons: npt.NDArray[np.str_] = self._column(self._map_tables(key)["missing"], self._slice(rows))
        return reasons

    def map_seconds(self, key: str, rows: slice | None = None) -> npt.NDArray[np.float64]:
        """How long the maps of a method took `(m,)`, in seconds a sample; NaN for those that have none."""
        seconds: npt.NDArray[np.float64] = self._column(self._map_tables(key)["seconds"], self._slice(rows))
        return seconds

    def map_parameters(self, key: str) -> dict[str, Any]:
        """The whole parameter set of an attribution method."""
        self._map_tables(key)
        parameters: dict[str, Any] = json.loads(map_attributes(self._opened(), key).parameters)
        return parameters

    def map_reduction(self, key: str) -> str:
        """What became of channels: "signed_max" (the value of largest magnitude, signed) or "signed_sum"."""
        self._map_tables(key)
        return map_attributes(self._opened(), key).reduction

    # ------------------------------------------------------------------------------------------------ private

    def _map_tables(self, key: str) -> dict[str, h5py.Dataset]:
        if key not in self.map_keys:
            raise StoreError(f"{self.path}: {unknown('map', key, self.map_keys)}")
        if key not in self._maps:
            with reading(self._opened(), f"/maps/{key}"):
                self._maps[key] = map_tables(self._file, key, self._count)
        return self._maps[key]

    def _opened(self) -> h5py.File:
        if not self._file:
            raise StoreError(f"{self.path}: cannot read a store that is closed; read within `with open_store(…)`")
        return self._file

    def _known(self, key: str) -> str:
        if key not in self.keys:
            raise StoreError(f"{self.path}: {unknown('pathway', key, self.keys)}")
        return key

    def _table(self, key: str, name: str) -> h5py.Dataset:
        if (self._known(key), name) not in self._pathways:
            with reading(self._opened(), f"/pathways/{key}"):
                self._pathways[key, name] = pathway_table(pathway_group(self._file, key), name, self.index, self._count)
        return self._pathways[key, name]

    def _slice(self, rows: slice | None) -> slice:
        wanted = range(*rows.indices(self._count)) if isinstance(rows, slice) else range(self._count)
        if wanted.step != 1 or not isinstance(rows, slice | None):
            raise StoreError(f"{self.path}: rows: expected a slice with a step of 1, found {rows!r}; thin the result")
        return slice(wanted.start, max(wanted.start, wanted.stop))

    def _column(self, table: h5py.Dataset, *wanted: slice) -> Any:
        self._opened()
        with reading(self._file, table.name):
            return (read_text if table.dtype.kind == "S" else read)(table, *wanted)

    def _bits(self, table: h5py.Dataset, rows: slice | None, site: str | int | Site | None) -> npt.NDArray[np.uint8]:
        bits: npt.NDArray[np.uint8] = self._column(
            table, self._slice(rows), slice(None) if site is None else self.index.site(site).bytes
        )
        return bits
