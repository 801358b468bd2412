"""Local linearity of the pathways of a store, measured on its photos: radii along rays, ties, deviation, stability."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .deviations import gradient_stability, verify_linearity
from .errors import InputError, StoreError
from .given import checked_ids
from .items import collate, misfit, read_item
from .keys import PathwayKey
from .linearity import ray_radius, tied_windows, uncovered
from .network import Network
from .pathways import Pathways
from .samples import Samples
from .store import Store

if TYPE_CHECKING:
    import pandas as pd

ORIGINAL = "original"
LENGTHS = (0.001, 0.01, 0.05)


@dataclass(frozen=True, eq=False)
class LinearStudy:
    """Tables with a row for each pathway key ("original": the unrestricted network) and sample, and more.

    `rays`: `radius` of each ray and `relative`, that over ‖x‖₂; `tied` on-path windows. `deviations`: those of
    `verify_linearity`. `stability`: those of `gradient_stability` at each `share` of ‖x‖₂. The first two are empty for
    networks that are not covered, which `uncovered` names.
    """

    rays: pd.DataFrame
    deviations: pd.DataFrame
    stability: pd.DataFrame
    uncovered: tuple[str, ...]


def linear_study(
    network: Network,
    dataset: Any,
    store: Store,
    keys: Sequence[str] | None = None,
    *,
    limit: int | None = None,
    rays: int = 8,
    directions: int = 2,
    lengths: Sequence[float] = LENGTHS,
    seed: int = 0,
    progress: bool = True,
) -> LinearStudy:
    """Measure local linearity for pathways of a store (`keys`, default all) of this network, on its data set.

    Raises `StoreError` where the store is of another network or of other samples.
    """
    import pandas as pd

    if store.header.fingerprint != network.fingerprint:
        raise StoreError(f"{store.path}: expected pathways of this network, found those of {store.header.model}")
    ids = checked_ids(dataset)
    chosen = list(store.keys if keys is None else keys)
    rows = [row for row in range(len(store) if limit is None else min(limit, len(store))) if store.ok[row]]
    names = store.ids
    missing = next((str(names[row]) for row in rows if str(names[row]) not in ids), None)
    if missing is not None:
        raise StoreError(f"{store.path}: sample {missing!r} is not in the data set, whose first is {ids[0]!r}")
    found: dict[str, list[pd.DataFrame]] = {"rays": [], "deviations": [], "stability": []}
    why = uncovered(network)
    with tqdm(total=len(rows) * (len(chosen) + 1), desc="linearity", unit="pathway", disable=not progress) as bar:
        for row in rows:
            sample = _sample(network, dataset, store, row, ids.index(str(names[row])))
            for key, pathways in _pathways(network, store, chosen, row):
                said = {"key": key, "sparsity": None if key == ORIGINAL else PathwayKey.parse(key).sparsity}
                tables = _measured(network, sample, pathways, key == ORIGINAL, not why, rays, directions, lengths, seed)
                for name, table in tables.items():
                    found[name].append(table.assign(**said))
                bar.update(1)
    joined = {
        name: pd.concat(tables, ignore_index=True) if tables else pd.DataFrame() for name, tables in found.items()
    }
    return LinearStudy(**joined, uncovered=why)


def _sample(network: Network, dataset: Any, store: Store, row: int, position: int) -> Samples:
    item = read_item(dataset, position, str(store.ids[row]))
    problem = item.problem or misfit(item, network)
    if problem:
        raise InputError(f"linearity: sample {item.name!r}: {problem}")
    given = collate([item], network)
    target = int(store.samples()["target"][row])
    return Samples(given.inputs, target if target >= 0 else None, given.ids)


def _pathways(network: Network, store: Store, keys: Sequence[str], row: int) -> Iterator[tuple[str, Pathways]]:
    """The original network as the pathway of all neurons, and those of the keys that the sample has."""
    everything = torch.ones((1, network.index.size), dtype=torch.bool, device=network.device)
    yield ORIGINAL, Pathways(everything, network.index)
    for key in keys:
        reason = str(store.column(key, "missing", slice(row, row + 1))[0]) if "missing" in store.columns(key) else ""
        if not reason:
            mask = torch.from_numpy(store.mask(key, row)).to(network.device)
            yield key, Pathways(mask[None], network.index)


def _measured(
    network: Network,
    sample: Samples,
    pathways: Pathways,
    original: bool,
    covered: bool,
    rays: int,
    directions: int,
    lengths: Sequence[float],
    seed: int,
) -> dict[str, pd.DataFrame]:
    import pandas as pd

    norm = math.sqrt(sum(float(leaf.square().sum()) for leaf in sample.tensors if leaf.is_floating_point()))
    stability = gradient_stability(
        network, sample, None if original else pathways, lengths=[share * norm for share in lengths],
        directions=directions, seed=seed,
    )  # fmt: skip
    tables = {"stability": stability.assign(share=[lengths[number] for number in stability["number"]])}
    if covered:
        radii = ray_radius(network, sample, pathways, rays, seed=seed)[:, 0]
        tied = int(tied_windows(network, sample, pathways, seed=seed)[0])
        tables["rays"] = pd.DataFrame(
            {"sample": sample.names[0], "ray": range(rays), "radius": radii.tolist(), "tied": tied}
        ).assign(relative=lambda table: table["radius"] / norm)
        tables["deviations"] = verify_linearity(
            network, sample, pathways, directions=directions, inside=(0.9,), outside=(2.0,), seed=seed
        )
    return tables
