"""Made-up stores whose masks obey the invariants of real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fxpath.keys import PathwayKey
from fxpath.neurons import NeuronIndex, select_largest
from fxpath.store import Header, MapRows, PathwayRows, Rows, Store, write_store

KEYS = ("neuron_mct@0.9", "neuron_mct@0.99", "greedy_pruning@0.9", "random:seed=3@0.9", "active")
UNRELATED = ("random", "greedy_pruning")  # selectors whose pathways may hold dead neurons


def synthetic_index(granularity: str = "unit") -> NeuronIndex:
    """A small network's index with sizes that are no multiples of 8 and a folded site."""
    blocks = [
        ("stem.relu", "relu", (4, 7, 7)),
        ("block.relu", "relu", (8, 5, 5)),
        ("block.relu_1", "relu", (3, 11)),
        ("head.relu", "gelu", (37,)),
    ]
    return NeuronIndex.build(blocks, axes=[0, 0, 1, 0], folds=[1, 1, 3, 1], granularity=granularity)  # type: ignore[arg-type]


def synthetic_header(index: NeuronIndex, **changes: Any) -> Header:
    """A header for an index: a chain of its sites with one skip, ten classes."""
    count = len(index.sites)
    edges = [(number - 1, number) for number in range(count + 1)] + ([(0, 2)] if count > 2 else [])
    fields: dict[str, Any] = {
        "model": "zoo:synthetic",
        "fingerprint": "5e" * 32,
        "index": index,
        "edges": np.array(edges, dtype=np.int32),
        "classes": tuple(f"class {number} – é" for number in range(10)),
        "input_shape": "[3, 15, 15]",
        "preprocessing": json.dumps({"mean": [0.5], "std": [0.25]}),
        "micro_batch": 4,
        "threads": 1,
        "versions": json.dumps({"torch": "2.14.1"}),
        "created": "2025-01-01T00:00:00+00:00",
        "notes": {"job": "abc", "seconds": 1.5, "samples_asked": 7},
    }
    return Header(**(fields | changes))


def synthetic_rows(
    index: NeuronIndex,
    n: int,
    keys: Sequence[str] = KEYS,
    seed: int = 0,
    densities: Mapping[str, float] | None = None,
    *,
    alive: float = 0.4,
    failed: Sequence[int] = (),
    scores: Mapping[str, Any] | None = None,
    thumbnails: bool = False,
    first: int = 0,
    maps: Sequence[str] = (),
) -> Rows:
    """n samples numbered from `first`; a sample's numbers depend on `seed` and its own number alone.

    `alive` is the share of active neurons. A key's density is `densities[key]`, else 1 − its sparsity; "active" is the
    activation pattern; the selectors in `UNRELATED` may take dead neurons, all others take the largest scores among
    active ones, so their pathways are nested. `scores` maps families to float16 or float32. Rows in `failed` are NaN.
    """
    parsed = {key: PathwayKey.parse(key) for key in keys}
    families = sorted({key.family for key in parsed.values() if key.selector != "active"} | set(scores or {}))
    count, sites = index.size, len(index.sites)
    active = np.zeros((n, count), dtype=np.bool_)
    masks = {key: np.zeros((n, count), dtype=np.bool_) for key in keys}
    signed = {family: np.zeros((n, count), dtype=np.float32) for family in families}
    live = {key: np.zeros((n, count), dtype=np.bool_) for key in keys}
    numbers = np.zeros((n, 6 + 5 * len(keys)))
    bad = np.zeros(n, dtype=np.bool_)
    bad[list(failed)] = True
    for row in np.flatnonzero(~bad):
        rng = np.random.default_rng([seed, first + int(row)])
        active[row] = rng.random(count) < alive
        for family in families:
            signed[family][row] = rng.standard_normal(count) ** 3
            if PathwayKey.parse(family).selector not in UNRELATED:
                signed[family][row] *= active[row]
        for key, parts in parsed.items():
            if parts.selector == "active":
                masks[key][row] = active[row]
                continue
            density = (densities or {}).get(key)
            kept = index.kept(parts.sparsity or 0.0) if density is None else int(density * index.units)
            weights = index.weights if index.granularity == "channel" else None
            masks[key][row] = select_largest(np.abs(signed[parts.family][row]), [kept], weights)[0]
            live[key][row] = masks[key][row] & ~active[row] & (rng.random(count) < 0.5)
        numbers[row] = rng.random(numbers.shape[1])
    labels = (numbers[:, 0] * 10).astype(np.int64)
    targets = np.where(numbers[:, 1] < 0.8, labels, (labels + 1) % 10)
    samples = {
        "id": [f"photo-{first + row:04d}.jpg" for row in range(n)],
        "label": np.where(bad, -1, labels),
        "target": np.where(bad, -1, targets),
        "prediction": np.where(bad, -1, targets),
        "label_rank": np.where(bad, -1, np.where(targets == labels, 0, 1 + (numbers[:, 2] * 8).astype(np.int64))),
        "response": np.where(bad, np.nan, 10 * numbers[:, 3]).astype(np.float32),
        "probability": np.where(bad, np.nan, numbers[:, 4]).astype(np.float32),
        "status": ["not an image" if wrong else "ok" for wrong in bad],
    }
    pathways = {}
    for place, (key, parts) in enumerate(parsed.items()):
        own = numbers[:, 6 + 5 * place : 11 + 5 * place]
        packed = index.pack(masks[key])
        columns: dict[str, Any] = {
            "mask": packed,
            "density": np.where(bad, np.nan, masks[key] @ index.weights / index.units),
            "response": np.where(bad, np.nan, 10 * own[:, 0]),
            "probability": np.where(bad, np.nan, own[:, 1]),
            "same_class": ~bad & (own[:, 2] < 0.7),
            "dropped_response": np.where(bad, np.nan, own[:, 3]),
            "seconds": np.where(bad, np.nan, own[:, 4]),
            "kept": index.count_by_site(packed).astype(np.uint32),
            "live": index.count_by_site(index.pack(live[key])).astype(np.uint32),
            "missing": ["not an image" if wrong else "" for wrong in bad],
            "diagnostics/completeness": np.where(bad[:, None], np.nan, own[:, :1] * np.ones(sites)),
            "diagnostics/stopped": ["failed" if wrong else "reached" for wrong in bad],
        }
        parameters = {"steps": 50, **parts.parameters}
        pathways[key] = PathwayRows(parts.selector, parameters, parts.sparsity, columns)
    stored = {}
    for family, dtype in (scores or {}).items():
        scale = np.maximum(np.abs(signed[family]).max(axis=1), np.float32(1e-30))
        stored[family] = ((signed[family] / scale[:, None]).astype(dtype), scale)
    pictures = None
    if thumbnails:
        pictures = np.random.default_rng([seed, first, 99]).integers(0, 256, (n, 6, 5, 3), dtype=np.uint8)
    made = {key: synthetic_maps(key, n, seed, first=first, failed=failed) for key in maps}
    return Rows(samples, index.pack(active), pathways, stored, pictures, maps=made)


def synthetic_maps(key: str, n: int, seed: int = 0, *, first: int = 0, failed: Sequence[int] = ()) -> MapRows:
    """Maps of n samples, 15 × 13, a third of their pixels exactly 0; none for rows in `failed`."""
    signed = np.zeros((n, 15, 13), dtype=np.float16)
    scale = np.full(n, np.nan, dtype=np.float32)
    for row in sorted(set(range(n)) - set(failed)):
        rng = np.random.default_rng([seed, first + row, *key.encode()])
        signed[row] = rng.standard_normal((15, 13)) * 2**12 * (rng.random((15, 13)) < 2 / 3)
        scale[row] = 2.0 ** rng.integers(-40, 4)
    columns = {
        "signed": signed,
        "scale": scale,
        "missing": ["not an image" if row in failed else "" for row in range(n)],
        "seconds": np.where(np.isnan(scale), np.nan, 0.125 * np.arange(first, first + n)),
    }
    return MapRows({"size": 3, "of": key}, "signed_max", columns)


def synthetic_store(path: Path, n: int = 6, keys: Sequence[str] = KEYS, seed: int = 0, **changes: Any) -> Path:
    """Write such a store; `index` and `header` may be given, all else goes to `synthetic_rows`."""
    index = changes.pop("index", None) or synthetic_index()
    header = changes.pop("header", None) or synthetic_header(index)
    complete = changes.pop("complete", True)
    write_store(path, header, synthetic_rows(index, n, keys, seed, **changes), complete=complete)
    return path


def contents(store: Store) -> dict[str, Any]:
    """Everything that can be read from a store, by name."""
    header = store.header
    found: dict[str, Any] = {name: getattr(header, name) for name in ("model", "versions", "created", "edges")}
    found |= {"identity": header.identity(), "notes": dict(header.notes), "complete": store.complete}
    found |= {f"samples/{name}": values.to_numpy() for name, values in store.samples().items()}
    found |= {"ids": store.ids, "ok": store.ok, "active": store.active(), "keys": store.keys}
    found |= {f"thumbnail {row}": store.thumbnail(row) for row in range(len(store))}
    for key in store.keys:
        found[f"{key} attributes"] = (store.selector(key), store.parameters(key), store.sparsity(key))
        found[f"{key} mask"] = store.packed(key)
        found |= {f"{key} {name}": values.to_numpy() for name, values in store.outcomes(key).items()}
        for name in ("kept", "live", "diagnostics/completeness"):
            found[f"{key} {name}"] = store.column(key, name)
    for family in store.score_families:
        found |= {f"{family} scores {row}": store.scores(family, row) for row in range(len(store))}
    found["map keys"] = store.map_keys
    for key in store.map_keys:
        found[f"{key} attributes of maps"] = (store.map_parameters(key), store.map_reduction(key))
        found[f"{key} maps"] = store.maps(key)
        found |= {f"{key} missing": store.map_missing(key), f"{key} seconds": store.map_seconds(key)}
    return found


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two `contents` are equal, NaN being equal to itself."""
    return one.keys() == other.keys() and all(
        np.array_equal(value, other[name], equal_nan=value.dtype.kind == "f")
        if isinstance(value, np.ndarray)
        else value == other[name]
        for name, value in one.items()
    )
