"""A small network, real pictures and awkward data sets for jobs, and what a finished store holds, by sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxpath
from fxpath.images import ImageSamples, photos
from fxpath.zoo import LoadedModel, WholeFrame

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FRAME = WholeFrame(32, channels="RGB", mean=(127.0, 127.0, 127.0), std=(64.0, 64.0, 64.0))
SELECTORS = ("neuron_mct", "magnitude", "random:seed=3", "active")
SPARSITIES = (0.8, 0.95)
FEW = ("neuron_mct", "random:seed=3", "active")  # what most jobs select, at 0.9
METHODS = ("gradient", "neuron_mct@0.9", "masked_gradient:random:seed=3@0.9", "neuron_mct@0.9*")
KEYS = (*(f"{family}@{level}" for family in SELECTORS[:3] for level in SPARSITIES), "active")


class Small(nn.Module):
    """A residual network for 32 × 32 pictures with in-place activations and a site of 75 neurons, no multiple of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.skip = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 1, 2)
        self.deep = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.last, self.relu, self.pool = nn.Conv2d(8, 3, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(75, 24), nn.ReLU(), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.relu(self.stem(x)))
        h = self.deep(h)
        h += self.skip(self.pool(self.relu(self.stem(x))))
        return self.head(self.relu(self.last(self.relu(h))))


class Placed(nn.Module):
    """A network whose third and later places in a batch differ in their last bits, as in some matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 5, 3), nn.Linear(400, 10)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.cumsum(torch.ones_like(x[:, :1, :1, :1]), 0)
        h = torch.relu(self.conv(x) * (1 + 1e-6 * (place > 2)))
        return self.fc(h.flatten(1))


def module(kind: Callable[[], nn.Module] = Small, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network in evaluation mode, always with the same weights."""
    with torch.random.fork_rng([]):
        torch.manual_seed(11)
        model = kind().to(dtype).eval()
        for parameter in model.parameters():
            parameter.data *= 2  # PyTorch's own first weights let all pictures look alike
    return model


@cache
def small(dtype: torch.dtype = torch.float32, granularity: str = "unit") -> fxpath.Network:
    """The small network, traced; networks keep no state between calls, so tests may share it."""
    example = torch.zeros(2, 3, 32, 32, dtype=dtype)
    return fxpath.trace(module(dtype=dtype), example, granularity=granularity)


def build() -> LoadedModel:
    """The small network as the command line loads it: `small_jobs:build`."""
    return LoadedModel("small", module(), FRAME, FRAME.json(), (3, 32, 32), CIFAR)


@cache
def cifar() -> ImageSamples:
    """foolbox's 20 labelled CIFAR-10 pictures."""
    return photos(FRAME, "cifar10")


@cache
def inputs() -> Tensor:
    """Those pictures as one batch `(20, 3, 32, 32)`."""
    return torch.stack([cifar()[row][0] for row in range(20)])


class Chosen:
    """Some of the CIFAR pictures in some order under their own ids, with some of them replaced.

    What stands in `instead` takes the place of an item: an exception is raised, a function is applied to the input,
    anything else is given as it is.
    """

    def __init__(self, rows: Sequence[int] = tuple(range(20)), instead: Mapping[int, Any] | None = None) -> None:
        self.rows, self.instead = tuple(rows), dict(instead or {})
        self.ids = [cifar().ids[row] for row in self.rows]
        self.read: list[str] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        row = self.rows[place]
        self.read.append(self.ids[place])
        x, label = inputs()[row].clone(), cifar().labels[row]
        if row not in self.instead:
            return x, label
        other = self.instead[row]
        if isinstance(other, BaseException):
            raise other
        return (other(x), label) if callable(other) else other

    def thumbnail(self, place: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return cifar().thumbnail(self.rows[place], size)


def seven() -> Chosen:
    """Seven pictures: `small_jobs:seven`."""
    return Chosen(range(7))


class Slow(Chosen):
    """Pictures that take their time to be read."""

    def __init__(self, seconds: float) -> None:
        super().__init__(range(10))
        self.seconds = seconds

    def __getitem__(self, place: int) -> Any:
        time.sleep(self.seconds)
        return super().__getitem__(place)


def slow(seconds: float = 0.3) -> Slow:
    """Ten pictures: `small_jobs:slow`."""
    return Slow(seconds)


def run(data: Any, path: Path, network: fxpath.Network | None = None, **options: Any) -> Any:
    """A job of the small network, in micro-batches of four and one thread, without progress bars."""
    given: dict[str, Any] = {
        "selectors": FEW, "sparsities": [0.9], "micro_batch": 4, "threads": 1, "progress": False, "model": "small",
    } | options  # fmt: skip
    return fxpath.compute(network or small(), data, path, **given)


def add_maps(data: Any, path: Path, network: fxpath.Network | None = None, **options: Any) -> Any:
    """Maps of the small network's samples, without progress bars; a store that is not there yet is made as by `run`."""
    given: dict[str, Any] = {"methods": METHODS, "progress": False}
    if not path.exists():
        given |= {"micro_batch": 4, "threads": 1, "model": "small"}
    return fxpath.attribute(network or small(), data, path, **given | options)


def by_sample(path: Path) -> dict[str, dict[str, Any]]:
    """All that a store says of each sample but the seconds, as bytes, by id."""
    with fxpath.open_store(path) as store:
        table = store.samples()
        rows: dict[str, dict[str, Any]] = {}
        for row, name in enumerate(store.ids.tolist()):
            one = slice(row, row + 1)
            found = {column: str(table[column][row]) for column in table.columns}
            found["active"] = store.active(one).tobytes()
            for key in store.keys:
                found[f"{key} mask"] = store.packed(key, one).tobytes()
                outcome = store.outcomes(key).drop(columns="seconds").iloc[row]
                found |= {f"{key} {column}": str(outcome[column]) for column in outcome.index}
                for column in ("kept", "live"):
                    found[f"{key} {column}"] = store.column(key, column, one).tobytes()
            for family in store.score_families:
                found[f"{family} scores"] = store.scores(family, row).tobytes()
            for key in store.map_keys:
                found[f"{key} map"] = store.map(key, row).tobytes()
                found[f"{key} missing"] = str(store.map_missing(key, one)[0])
            picture = store.thumbnail(row)
            found["thumbnail"] = None if picture is None else picture.tobytes()
            rows[name] = found
    return rows


def agreement(one: Path, other: Path, key: str) -> list[float]:
    """Jaccard of a key's masks in two stores, for each sample that both have."""
    with fxpath.open_store(one) as first, fxpath.open_store(other) as second:
        both = [name for name in first.ids.tolist() if name in set(second.ids.tolist())]
        pairs = [(first.mask(key, name), second.mask(key, name)) for name in both]
    return [float((a & b).sum() / (a | b).sum()) for a, b in pairs]
