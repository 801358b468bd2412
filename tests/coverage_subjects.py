"""Networks for the coverage run, each with a fate of its own; read as `coverage_subjects:NAME`."""

from __future__ import annotations

import time

import torch
from PIL import Image
from torch import Tensor, nn

from fxpath.zoo import LoadedModel


def _small(image: Image.Image) -> Tensor:
    return torch.tensor(list(image.convert("L").resize((4, 4)).tobytes())).view(1, 4, 4) / 255


def _loaded(*layers: nn.Module) -> LoadedModel:
    return LoadedModel("", nn.Sequential(nn.Flatten(), *layers), _small, "", (1, 4, 4))


def plain() -> LoadedModel:
    return _loaded(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3))


def linear() -> LoadedModel:
    return _loaded(nn.Linear(16, 3))


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no good")


def failing() -> LoadedModel:
    return _loaded(nn.Linear(16, 8), nn.ReLU(), Fails())


def asleep() -> LoadedModel:
    time.sleep(600)
    return plain()


def large() -> LoadedModel:
    """6 GiB of weights."""
    return _loaded(nn.Linear(16, 40_000), nn.ReLU(), nn.Linear(40_000, 40_000), nn.ReLU(), nn.Linear(40_000, 3))


class Constant(nn.Module):
    """An activation that the output does not depend on, in value."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * 0 + 1


def silent() -> LoadedModel:
    return _loaded(nn.Linear(16, 3), Constant())
