"""One micro-batch of a data set → the rows of a store. Always of one size, so that neighbours change no bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .ablation import Diagnosis
from .answers import Original
from .errors import BranchError, InputError, SampleError
from .items import Item, collate, reason_of
from .keys import PathwayKey
from .network import Network
from .pathways import Pathways
from .samples import Samples
from .schema import PathwayRows, Rows
from .selectors import Selector
from .selectors.registry import family, parameters

Array = npt.NDArray[Any]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Recipe:
    """What is computed of every sample; fixed for a whole job."""

    selectors: tuple[Selector, ...]
    sparsities: tuple[float, ...]
    target: str = "predicted"  # labels | predicted | a class number
    micro_batch: int = 8
    scores: str | None = None  # float16 | float32
    strict: bool = False
    diagnose: int = 0  # active neurons of every site and sample that are ablated

    def columns(self) -> list[tuple[str, Selector, float | None]]:
        """Every pathway key with its selector and sparsity, in the order of the store."""
        found: list[tuple[str, Selector, float | None]] = []
        for selector in self.selectors:
            own = family(selector)
            levels: Sequence[float | None] = [None] if selector.single else self.sparsities
            found += [(str(PathwayKey(own.selector, own.parameters, level)), selector, level) for level in levels]
        return found


_NO_PATHWAY: dict[str, float] = {
    "mask": 0, "kept": 0, "live": 0, "same_class": 0, "density": np.nan, "response": np.nan, "probability": np.nan,
    "dropped_response": np.nan,
}  # fmt: skip


class _Table:
    """The columns of one pathway key while they fill."""

    def __init__(self, network: Network, rows: int) -> None:
        sites = len(network.index)
        self.columns: dict[str, Array] = {
            "mask": np.zeros((rows, network.index.nbytes), dtype=np.uint8),
            **{
                name: np.full(rows, np.nan)
                for name in ("density", "response", "probability", "dropped_response", "seconds")
            },
            "same_class": np.zeros(rows, dtype=np.bool_),
            "kept": np.zeros((rows, sites), dtype=np.uint32),
            "live": np.zeros((rows, sites), dtype=np.uint32),
            "missing": np.full(rows, "", dtype=object),
        }


def _key(own: str, sparsity: float | None) -> str:
    return own if sparsity is None else f"{own}@{float(sparsity)!r}"


def _host(value: Tensor | None, count: int, missing: float = np.nan) -> Array:
    if value is None:
        return np.full(count, missing)
    value = value.detach()[:count].cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # NumPy has no bfloat16


def compute_rows(network: Network, recipe: Recipe, items: Sequence[Item]) -> Rows:
    """Everything that a store keeps of these items, at most `recipe.micro_batch` of them.

    Short batches are filled by repeating a sample, so the network always sees the same shape. Samples that cannot be
    used get their reason as status; with `recipe.strict` the first one raises `SampleError`.
    """
    status = [item.problem or "ok" for item in items]
    if recipe.target == "labels":
        status = [
            "no label, and the job explains labels" if state == "ok" and item.label < 0 else state
            for state, item in zip(status, items, strict=True)
        ]

    def filled(good: Sequence[int]) -> _Filling:
        _refuse(recipe, items, status)
        rows = _Filling(network, recipe, items)
        if good:
            rows.fill(good)
        return rows

    return with_usable(status, filled, lambda good: branching(network, items, good, recipe.micro_batch)).done(status)


def with_usable(
    status: list[str], work: Callable[[Sequence[int]], _T], alone: Callable[[Sequence[int]], dict[int, str]]
) -> _T:
    """`work` on the rows whose `status` is "ok", again without those that turn out to be unusable, until it goes well.

    Those get their reason as status: of a `SampleError`, or of what `alone` gives after a `BranchError`, which does
    not say whose branch it is.
    """
    while True:
        good = [position for position, state in enumerate(status) if state == "ok"]
        try:
            return work(good)
        except SampleError as error:
            for row, reason in zip(error.positions, error.reasons, strict=True):
                if row < len(good):
                    status[good[row]] = reason
            if all(status[position] == "ok" for position in good):
                raise
        except BranchError:
            reasons = alone(good)
            if not reasons:  # each alone takes the graph's
                raise
            for position, reason in reasons.items():
                status[position] = reason


def branching(network: Network, items: Sequence[Item], good: Sequence[int], micro_batch: int) -> dict[int, str]:
    """Those of the items `good` that take another branch of the model than the graph holds, with the reason."""
    found: dict[int, str] = {}
    for position in good:
        samples = collate([items[position]] * micro_batch, network)
        try:
            network._require_branches(samples)
        except BranchError as error:
            found[position] = reason_of(error)
    return found


def padded(good: Sequence[int], micro_batch: int) -> list[int]:
    """Row numbers filled up to a micro-batch by repeating the first."""
    return [*good, *[good[0]] * (micro_batch - len(good))]


def _refuse(recipe: Recipe, items: Sequence[Item], status: Sequence[str]) -> None:
    for row, (item, state) in enumerate(zip(items, status, strict=True)):
        if recipe.strict and state != "ok":
            raise SampleError(
                f"compute: sample {item.name!r} cannot be used: {state}. Mend or remove it, or leave out --strict to "
                "go on without it",
                [row],
                [state],
            )


class _Filling:
    """The rows of a micro-batch under way: zero masks and NaN, until they are filled."""

    def __init__(self, network: Network, recipe: Recipe, items: Sequence[Item]) -> None:
        self.network, self.recipe, self.items = network, recipe, items
        count = len(self.items)
        self.columns: dict[str, Array] = {
            name: np.full(count, -1, dtype=np.int64) for name in ("target", "prediction", "label_rank")
        } | {name: np.full(count, np.nan, dtype=np.float32) for name in ("response", "probability")}
        self.active = np.zeros((count, self.network.index.nbytes), dtype=np.uint8)
        self.units = None if network.padding is None else np.zeros((count, len(network.index)), dtype=np.uint32)
        self.tables = {key: _Table(self.network, count) for key, _, _ in self.recipe.columns()}
        self.scores: dict[str, tuple[Array, Array]] = {}
        if self.recipe.scores is not None:
            shape = (count, self.network.index.size)
            self.scores = {
                str(family(selector)): (np.zeros(shape, dtype=self.recipe.scores), np.ones(count, dtype=np.float32))
                for selector in self.recipe.selectors
                if getattr(selector, "keeps_scores", False)
            }

    def fill(self, good: Sequence[int]) -> None:
        """Compute the rows `good`; raises `SampleError` with positions within `good`."""
        recipe, network = self.recipe, self.network
        items = [self.items[position] for position in padded(good, recipe.micro_batch)]
        samples = replace(collate(items, network), target=self._target(items)).require_finite()
        original = network.original(samples)
        samples = replace(samples, target=original.target)
        count, real = len(good), network.real(samples)
        if real is not None and self.units is not None:
            self.units[list(good)] = real.units[:count].cpu().numpy()
        self._note_original(original, good)
        diagnosis: Diagnosis | None = None
        for selector in recipe.selectors:
            started = time.perf_counter()
            selection = selector.select(network, samples, recipe.sparsities)
            seconds = (time.perf_counter() - started) / count
            own = str(family(selector))
            diagnostics = selection.diagnostics
            if recipe.diagnose and selection.scores is not None:
                diagnosis = diagnosis or self._diagnosis(samples, original, count)
                names = ("ablation_correlation", "ablation_correlation_by_site")
                diagnostics = diagnostics | dict(zip(names, diagnosis.correlations(selection.scores), strict=True))
            for sparsity in dict.fromkeys((*selection.pathways, *selection.missing)):
                columns = self.tables[_key(own, sparsity)].columns
                if sparsity in selection.pathways:
                    pathways = selection.pathways[sparsity].within(real)
                    self._note_pathways(columns, samples, original, pathways, good, seconds)
                for name, values in {**diagnostics, **selection.by_sparsity.get(sparsity, {})}.items():
                    self._diagnostic(columns, name, values[:count].cpu().numpy(), good)
                self._note_missing(columns, selection.reasons(sparsity, samples.batch), good)
            if own in self.scores and selection.scores is not None:
                self._note_scores(own, selection.scores.signed[:count], good)

    def _target(self, items: Sequence[Item]) -> list[int] | int | None:
        if self.recipe.target == "labels":
            return [item.label for item in items]
        return None if self.recipe.target == "predicted" else int(self.recipe.target)

    def _diagnosis(self, samples: Samples, original: Original, count: int) -> Diagnosis:
        recipe, real = self.recipe, samples.take(range(count))  # not what fills a short batch
        active = original.active[:count]
        return Diagnosis.sampled(self.network, real, active, recipe.diagnose, max_batch=recipe.micro_batch)

    def _note_original(self, original: Original, good: Sequence[int]) -> None:
        rows, count = list(good), len(good)
        self.columns["response"][rows] = _host(original.response, count)
        self.columns["probability"][rows] = _host(original.probability, count)
        self.columns["target"][rows] = _host(original.target, count, -1)
        self.columns["prediction"][rows] = _host(original.prediction, count, -1)
        self.active[rows] = original.packed[:count].cpu().numpy()
        if original.logits is not None:
            labels = [self.items[position].label for position in good]
            for row, label, logits in zip(rows, labels, original.logits[:count], strict=True):
                if 0 <= label < logits.numel():
                    self.columns["label_rank"][row] = int((logits > logits[label]).sum())

    def _note_pathways(
        self,
        columns: dict[str, Array],
        samples: Samples,
        original: Original,
        pathways: Pathways,
        good: Sequence[int],
        seconds: float,
    ) -> None:
        rows, count = list(good), len(good)
        outcome = self.network.outcome(samples, pathways, original=original)
        packed = pathways.packed()[:count].cpu().numpy()
        columns["mask"][rows] = packed
        columns["kept"][rows] = self.network.index.count_by_site(packed)
        columns["density"][rows] = _host(pathways.density, count)
        columns["response"][rows] = _host(outcome.response, count)
        columns["probability"][rows] = _host(outcome.probability, count)
        columns["dropped_response"][rows] = _host(outcome.dropped_response, count)
        columns["same_class"][rows] = _host(outcome.same_class, count, 0)
        columns["live"][rows] = outcome.live[:count].cpu().numpy()
        columns["seconds"][rows] = seconds

    def _note_missing(self, columns: dict[str, Array], reasons: Sequence[str], good: Sequence[int]) -> None:
        """The reasons of samples without this pathway; of these only the diagnostics and the seconds are kept."""
        for position, reason in zip(good, reasons, strict=False):  # what fills a short batch has reasons, too
            if reason:
                columns["missing"][position] = reason
                for name, empty in _NO_PATHWAY.items():
                    columns[name][position] = empty

    def _diagnostic(self, columns: dict[str, Array], name: str, values: Array, good: Sequence[int]) -> None:
        path = f"diagnostics/{name}"
        if path not in columns:
            empty = np.nan if values.dtype.kind == "f" else 0
            columns[path] = np.full((len(self.items), *values.shape[1:]), empty, dtype=values.dtype)
        columns[path][list(good)] = values

    def _note_scores(self, own: str, signed: Tensor, good: Sequence[int]) -> None:
        values, scale = self.scores[own]
        values[list(good)], scale[list(good)] = quantised(signed, values.dtype)

    def done(self, status: Sequence[str]) -> Rows:
        """The finished rows; those that could not be computed are zero masks and NaN."""
        samples: dict[str, Any] = {
            "id": [item.name for item in self.items],
            "label": np.array([item.label for item in self.items], dtype=np.int64),
            **self.columns,
            "status": list(status),
        }
        pathways = {
            key: PathwayRows(selector.key, parameters(selector), sparsity, self.tables[key].columns)
            for key, selector, sparsity in self.recipe.columns()
        }
        small = [item.thumbnail for item in self.items]
        shape = next((t.shape for t in small if t is not None), None)
        thumbnails = None
        if shape is not None:
            thumbnails = np.stack([np.zeros(shape, dtype=np.uint8) if t is None else t for t in small])
        return Rows(samples, self.active, pathways, self.scores, thumbnails, self.units)


def quantised(signed: Tensor, kind: np.dtype[Any]) -> tuple[Array, Array]:
    """Scores `(n, N)` in `kind` and a scale `(n,)`, so that scores ≈ values · scale.

    For float16 a sample's largest |score| becomes the largest float16, a range of 12 decades below it; what is smaller
    still becomes the smallest number of its sign rather than 0, since a score of 0 is never selected.
    """
    if kind == np.float32:
        return signed.float().cpu().numpy(), np.ones(signed.shape[0], dtype=np.float32)
    limits = torch.finfo(torch.float16)
    largest = signed.abs().amax(dim=1).float()
    scale = torch.where(largest > 0, largest / limits.max, torch.ones_like(largest))
    scale = torch.clamp(scale, min=torch.finfo(torch.float32).tiny)
    small = (signed / scale.unsqueeze(1)).to(torch.float16)
    lost = (small == 0) & (signed != 0)
    small = torch.where(lost, torch.sign(signed).to(torch.float16) * limits.smallest_normal / 1024, small)
    return small.cpu().numpy(), scale.cpu().numpy()


def require_labels(items: Sequence[Item], classes: int) -> None:
    """Raise `InputError` for a label that is no class of the network."""
    for item in items:
        if item.problem is None and item.label >= classes:
            raise InputError(
                f"compute: sample {item.name!r} has the label {item.label}; the classes are 0 … {classes - 1}. "
                "Look at the label file or the data set"
            )
