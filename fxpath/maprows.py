"""One micro-batch of a store's samples → the rows of its maps. Always of one size, so that neighbours change no bit."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from .attribution import Reduction, pixel_scores
from .errors import BranchError, FxpathError, InputError, SampleError, StoreError
from .items import Item, collate
from .maptables import MapRows, scaled
from .methods import Method
from .microbatch import branching, padded, with_usable
from .network import Network
from .pathways import Pathways
from .samples import Samples
from .store import Store

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[Any]

_ALIKE = 0.9  # Jaccard index of two activation patterns of one sample; other devices and threads leave 0.999 and more


@dataclass(frozen=True, eq=False)
class Known:
    """What a store says of the m samples of one micro-batch.

    `status` and `target` of each, `active` `(m, nbytes)`; for each pathway key `packed` masks `(m, nbytes)` and why a
    sample has none, "" where it has.
    """

    names: list[str]
    status: list[str]
    target: list[int]
    active: npt.NDArray[np.uint8]
    packed: Mapping[str, npt.NDArray[np.uint8]]
    missing: Mapping[str, list[str]]

    @classmethod
    def of(cls, store: Store, table: pd.DataFrame, rows: slice, keys: Sequence[str]) -> Known:
        """Those of `rows`; `table` is the store's `samples()`."""
        some = table.iloc[rows]
        return cls(
            some["id"].tolist(),
            some["status"].tolist(),
            some["target"].tolist(),
            store.active(rows),
            {key: store.packed(key, rows) for key in keys},
            {
                key: store.column(key, "missing", rows).tolist()
                if "missing" in store.columns(key)
                else [""] * len(some)
                for key in keys
            },
        )


@dataclass(frozen=True)
class MapRecipe:
    """What is made of every sample: methods by key, and what becomes of channels; fixed for a whole job."""

    methods: Mapping[str, Method]
    reduction: Reduction
    micro_batch: int

    @property
    def pathways(self) -> tuple[str, ...]:
        """The keys of the stored pathways that the methods start from."""
        return tuple(dict.fromkeys(each.pathway for each in self.methods.values() if each.pathway is not None))


def picture_size(network: Network) -> tuple[int, int]:
    """H and W of a network's pictures; raises `InputError` for one that reads no pictures, or more than one."""
    tensors = network._layout.tensors
    pictures = [shape for shape, kind in tensors if kind.is_floating_point]
    if len(pictures) != 1 or len(pictures[0]) != 3:
        found = ", ".join(f"{('B', *shape)}".replace("'", "") for shape, _ in tensors)
        raise InputError(
            f"attribute: expected a network with one floating-point input (B, channels, H, W), found {found}; for "
            "others take fxpath.pathway_gradient"
        )
    return pictures[0][1], pictures[0][2]


def parameters_of(method: Method) -> dict[str, Any]:
    """The whole parameter set of a method as JSON data; a method within is its key."""
    found = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    plain = {name: value.key if isinstance(value, Method) else value for name, value in found.items()}
    try:
        data: dict[str, Any] = json.loads(json.dumps(plain))
    except (TypeError, ValueError) as error:
        raise InputError(f"method {method.key}: expected parameters that JSON can hold ({error})") from error
    return data


def try_methods(network: Network, recipe: MapRecipe, item: Item | None) -> None:
    """Run every method on one sample, its active neurons in the place of a pathway.

    Raises `InputError` that names a method which cannot work on this network. Without a sample nothing is said.
    """
    if item is None:
        return
    try:
        samples = collate([item], network)
        original = network.original(samples)
    except (SampleError, BranchError):  # of this sample alone
        return
    samples = replace(samples, target=original.target)
    for key in recipe.methods:
        try:
            _maps(network, recipe, key, samples, Pathways(original.active, network.index))
        except (SampleError, BranchError):
            continue


def map_rows(network: Network, recipe: MapRecipe, items: Sequence[Item], known: Known) -> dict[str, MapRows]:
    """The maps of these items, at most `recipe.micro_batch` of them, by method.

    Short batches are filled by repeating a sample. Samples that cannot be used, have no such pathway, or whose map is
    NaN or infinite get the reason in the column "missing". Raises `StoreError` for samples that are not those which
    the store knows, and `InputError`, which names the method, where one cannot work.
    """
    status = [
        (item.problem or "ok") if state == "ok" else state for item, state in zip(items, known.status, strict=True)
    ]

    def alone(good: Sequence[int]) -> dict[int, str]:
        return branching(network, items, good, recipe.micro_batch)

    def batch_of(rows: Sequence[int]) -> Samples:
        target = [known.target[row] for row in rows]
        samples = collate([items[row] for row in rows], network)
        return replace(samples, target=None if min(target) < 0 else target)  # −1: the response knows no classes

    def same(good: Sequence[int]) -> None:
        if good:
            active = network.original(batch_of(padded(good, recipe.micro_batch))).packed[: len(good)].cpu().numpy()
            _require_alike(active, known, good)

    with_usable(status, same, alone)
    made: dict[str, MapRows] = {}
    for key, method in recipe.methods.items():
        needs = method.pathway
        own = list(status)
        if needs is not None:
            own = [
                why or state if state == "ok" else state for state, why in zip(own, known.missing[needs], strict=True)
            ]

        def work(good: Sequence[int], key: str = key, needs: str | None = needs) -> tuple[Array, float] | None:
            if not good:
                return None
            rows = padded(good, recipe.micro_batch)
            pathways = None
            if needs is not None:
                packed = torch.from_numpy(known.packed[needs][rows]).to(network.device)
                pathways = Pathways.from_packed(packed, network.index)
            samples = batch_of(rows)
            started = time.perf_counter()
            maps = _maps(network, recipe, key, samples, pathways)[: len(good)]
            return maps, (time.perf_counter() - started) / len(good)

        made[key] = _rows(method, recipe, picture_size(network), own, with_usable(own, work, alone))
    return made


def _require_alike(active: npt.NDArray[np.uint8], known: Known, good: Sequence[int]) -> None:
    """Raise `StoreError` where samples activate other neurons than those of the store by the same name."""
    for position, now in zip(good, active, strict=True):
        then = known.active[position]
        both, either = (int(np.bitwise_count(each).sum()) for each in (now & then, now | then))
        if both < _ALIKE * either:
            raise StoreError(
                f"attribute: sample {known.names[position]!r} is not the one that the store knows by this name: of "
                f"{either} neurons that are active here or there {both} are active in both; give the data set and the "
                "preprocessing that the store was computed with, or choose another output file"
            )


def _maps(network: Network, recipe: MapRecipe, key: str, samples: Samples, pathways: Pathways | None) -> Array:
    """The signed maps `(B, H, W)` of one method, float64; NaN for samples with a value that is not finite."""
    method, size = recipe.methods[key], picture_size(network)
    given = pathways if method.pathway is not None else None
    try:
        found = method.attribute(network, samples, samples.target, given)
        if found.ndim != 4 or found.shape[0] != samples.batch or tuple(found.shape[2:]) != size:
            wanted = f"({samples.batch}, channels, {size[0]}, {size[1]})"
            raise InputError(f"expected maps {wanted}, found {tuple(found.shape)}")
        finite = torch.isfinite(found).flatten(1).all(dim=1)
        scores = pixel_scores(found.detach()[finite], recipe.reduction) if bool(finite.any()) else None
    except (SampleError, BranchError):
        raise
    except FxpathError as error:
        raise InputError(f"attribute: method {key} cannot work on this network: {error}; leave it out") from error
    maps = np.full((samples.batch, *size), np.nan)
    if scores is not None:
        maps[finite.cpu().numpy()] = scores.cpu().double().numpy()
    return maps


def _rows(
    method: Method, recipe: MapRecipe, size: tuple[int, int], status: list[str], found: tuple[Array, float] | None
) -> MapRows:
    count = len(status)
    signed, scale = np.zeros((count, *size), dtype=np.float16), np.full(count, np.nan, dtype=np.float32)
    seconds, missing = np.full(count, np.nan), ["" if state == "ok" else state for state in status]
    if found is not None:
        maps, each = found
        good = np.array([row for row, state in enumerate(status) if state == "ok"])
        finite = np.abs(maps).max(axis=(1, 2)) <= np.finfo(np.float32).max  # NaN is not
        for row in good[~finite]:
            missing[row] = "the map is NaN or infinite"
        if finite.any():
            signed[good[finite]], scale[good[finite]] = scaled(maps[finite])
            seconds[good[finite]] = each
    columns = {"signed": signed, "scale": scale, "seconds": seconds, "missing": missing}
    return MapRows(parameters_of(method), recipe.reduction, columns)
