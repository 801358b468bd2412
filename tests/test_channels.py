"""The channel axis in every layout, and channels from tracing to the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import fxpath


class Layout(nn.Module):
    """Makes channels, moves them about, and rectifies them there."""

    def __init__(self, maker: nn.Module, moved: Callable[[Tensor], Tensor], *more: nn.Module) -> None:
        super().__init__()
        self.maker, self.moved, self.more = maker, moved, nn.Sequential(*more)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.moved(self.more(self.maker(x)))).flatten(1)


def same(h: Tensor) -> Tensor:
    return h


class Parts(nn.Module):
    """A linear layer, a convolution and free weights; `body` puts them together."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], linear: int = 2, width: int = 5) -> None:
        super().__init__()
        self.lin, self.lin2, self.conv = nn.Linear(linear, width), nn.Linear(linear, width), nn.Conv2d(2, width, 1)
        self.gamma, self.weight = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width, 2))
        self.places, self.token = nn.Parameter(torch.rand(1, 6, width)), nn.Parameter(torch.rand(1, 1, width))
        self.norm, self.body = nn.LayerNorm([width, 3, 4]), body
        self.register_buffer("some", torch.tensor([[0, 1], [2, 3]]))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(self, x)).flatten(1)


C = 5
LAYOUTS: dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...], int]] = {
    # the network, its input, the site's block, the channel axis within it
    "vector": (Layout(nn.Linear(3, C), same), (3,), (C,), 0),
    "NCL": (Layout(nn.Conv1d(2, C, 3), same), (2, 6), (C, 4), 0),
    "NCHW": (Layout(nn.Conv2d(2, C, 3), same), (2, 6, 7), (C, 4, 5), 0),
    "NCDHW": (Layout(nn.Conv3d(2, C, 3), same), (2, 6, 7, 8), (C, 4, 5, 6), 0),
    "transposed": (Layout(nn.ConvTranspose2d(2, C, 2), same), (2, 3, 4), (C, 4, 5), 0),
    "NCHW after norm": (Layout(nn.Conv2d(2, C, 3), same, nn.BatchNorm2d(C), nn.MaxPool2d(2)), (2, 6, 7), (C, 2, 2), 0),
    "NHWC": (Layout(nn.Linear(2, C), same), (6, 7, 2), (6, 7, C), 2),
    "NHWC by permute": (Layout(nn.Conv2d(2, C, 3), lambda h: h.permute(0, 2, 3, 1)), (2, 6, 7), (4, 5, C), 2),
    "and back": (Layout(nn.Linear(2, C), lambda h: h.permute((0, 3, 1, 2))), (6, 7, 2), (C, 6, 7), 0),
    "by movedim": (Layout(nn.Conv2d(2, C, 3), lambda h: h.movedim(1, -1)), (2, 6, 7), (4, 5, C), 2),
    "by several": (Layout(nn.Linear(2, C), lambda h: h.movedim((1, 3), (3, 1))), (6, 7, 2), (C, 7, 6), 0),
    "tokens": (Layout(nn.Linear(2, C), same, nn.LayerNorm(C)), (6, 2), (6, C), 1),
    "patches": (Layout(nn.Conv2d(2, C, 2, 2), lambda h: h.flatten(2).transpose(1, 2)), (2, 6, 8), (12, C), 1),
    "patches back": (
        Layout(nn.Linear(2, C), lambda h: h.transpose(1, 2).reshape(-1, C, 3, 2)), (6, 2), (C, 3, 2), 0,
    ),
    "tokens by view": (Layout(nn.Conv2d(2, C, 3), lambda h: h.view(h.shape[0], C, -1)), (2, 6, 7), (C, 20), 0),
    "class token": (Layout(nn.Linear(2, C), lambda h: h[:, 0]), (6, 2), (C,), 0),
    "with a new axis": (Layout(nn.Linear(2, C), lambda h: h[:, None]), (6, 2), (1, 6, C), 2),
    "some tokens": (Layout(nn.Linear(2, C), lambda h: h[:, 1:3]), (6, 2), (2, C), 1),
    "mean over space": (Layout(nn.Conv2d(2, C, 3), lambda h: h.mean((2, 3))), (2, 6, 7), (C,), 0),
    "mean over tokens": (Layout(nn.Linear(2, C), lambda h: h.mean(dim=1)), (6, 2), (C,), 0),
    "heads": (Layout(nn.Linear(2, 6), lambda h: h.unflatten(2, (2, 3))), (6, 2), (6, 2, 3), 1),
    "flattened": (Layout(nn.Conv2d(2, C, 3), lambda h: h.flatten(1)), (2, 6, 7), (C * 20,), 0),
    "by matrix": (Layout(nn.Identity(), lambda h: h @ torch.ones(2, C)), (6, 2), (6, C), 1),
    "scaled": (Parts(lambda m, x: m.gamma * m.lin(x)), (6, 7, 2), (6, 7, C), 2),
    "root mean square": (
        Parts(lambda m, x: m.gamma * (m.lin(x) * m.lin(x).pow(2).mean(-1, keepdim=True).rsqrt())), (6, 2), (6, C), 1,
    ),
    "placed": (Parts(lambda m, x: m.places + m.lin(x)), (6, 2), (6, C), 1),
    "masked": (Parts(lambda m, x: torch.where(x.sum(-1, keepdim=True) > 9, m.lin(x), 0.5)), (6, 2), (6, C), 1),
    "times a mask": (Parts(lambda m, x: (x.sum(-1, keepdim=True) > 9).float() * m.lin(x)), (6, 2), (6, C), 1),
    "gate first": (Parts(lambda m, x: m.lin(x.mean((1, 2)))[:, None, None] * m.lin2(x)), (6, 7, 2), (6, 7, C), 2),
    "class token first": (
        Parts(lambda m, x: torch.cat([m.token.expand(x.shape[0], -1, -1), m.lin(x)], 1)), (6, 2), (7, C), 1,
    ),
    "norm over all": (Parts(lambda m, x: m.norm(m.conv(x))), (2, 3, 4), (C, 3, 4), 0),
    "weights first": (Parts(lambda m, x: m.weight @ x), (2, 6), (C, 6), 0),
    "unfolded": (
        Parts(lambda m, x: m.weight.repeat(1, 9) @ F.unfold(x, 3)), (2, 5, 6), (C, 12), 0,
    ),
    "einsum": (Parts(lambda m, x: torch.einsum("oc,bct->bot", m.weight, x)), (2, 6), (C, 6), 0),
    "einsum over maps": (Parts(lambda m, x: torch.einsum("bchw,oc->bohw", x, m.weight)), (2, 3, 4), (C, 3, 4), 0),
    "tensordot": (
        Parts(lambda m, x: torch.tensordot(x, m.weight, ([1], [1]))), (2, 3, 4), (3, 4, C), 2,
    ),
    "stacked": (Parts(lambda m, x: torch.stack([m.lin(x), 2 * m.lin(x)], 1)), (6, 2), (2, 6, C), 2),
    "pairs": (Parts(lambda m, x: m.lin(x)[:, None, :, :] + m.lin(x)[:, :, None, :]), (6, 2), (6, 6, C), 2),
    "repeated": (Parts(lambda m, x: m.lin(x)[:, :, None].repeat(1, 1, 2, 1)), (6, 2), (6, 2, C), 2),
    "picked": (Parts(lambda m, x: m.lin(x)[:, m.some]), (6, 2), (2, 2, C), 2),
    "spread": (Parts(lambda m, x: m.lin(x).unsqueeze(1).expand(-1, C, -1)), (2,), (C, C), 1),
    "T": (Layout(nn.Linear(2, C), lambda h: h.mT), (6, 2), (C, 6), 0),
    "spread in front": (Parts(lambda m, x: (m.weight.T[:, :1, None] * m.lin(x)).transpose(0, 1)), (2,), (2, C), 1),
    "copies in front": (Layout(nn.Linear(2, C), lambda h: h.expand(4, -1, -1).transpose(0, 1)), (2,), (4, C), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_channel_axis(name: str) -> None:
    model, shape, block, axis = LAYOUTS[name]
    network = fxpath.trace(model.eval(), torch.randn(2, *shape), granularity="channel")
    (site,) = network.sites
    assert (site.shape, site.axis, site.neurons) == (block, axis, block[axis])


def test_windows_folded_into_the_batch() -> None:
    """A sample's windows are rows of its block; its channels are still found, and the gates fit."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(3, C), nn.Linear(C, 4)

        def forward(self, x: Tensor) -> Tensor:
            batch, height, width, channels = x.shape
            windows = x.view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
            h = F.relu(self.fc(windows.reshape(-1, 4, channels)))
            return self.head(h.view(batch, -1, C).mean(1))

    torch.manual_seed(0)
    model, x = Windows().double().eval(), torch.randn(3, 4, 6, 3, dtype=torch.float64)
    for granularity, neurons in (("unit", 6 * 4 * C), ("channel", C)):
        network = fxpath.trace(model, x, granularity=granularity)
        (site,) = network.sites
        assert (site.shape, site.fold, site.axis, site.neurons) == ((6, 4, C), 6, 2, neurons)
        scores = fxpath.NeuronMCT().scores(network, x)
        order = [2, 0, 1]
        permuted = fxpath.NeuronMCT().scores(network, x[order])
        torch.testing.assert_close(permuted.signed, scores.signed[order])
        pathways = scores.pathways(0.5)
        with network.masked(pathways), torch.no_grad():
            expected = network(x)[order]
        with network.masked(permuted.pathways(0.5)), torch.no_grad():
            torch.testing.assert_close(network(x[order]), expected)


class Mixed(nn.Module):
    """1-D, 2-D, channels-last and token sites in one network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last, self.tokens, self.one = (
            nn.Conv2d(3, 5, 3),
            nn.Linear(5, 6),
            nn.Linear(6, 7),
            nn.Conv1d(7, 3, 1),
        )
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        h = F.relu(self.last(h.permute(0, 2, 3, 1)))
        h = F.relu(self.tokens(h.flatten(1, 2)))
        h = F.relu(self.one(h.transpose(1, 2)))
        return self.head(h.mean(2))


class Few(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(place)), place % 4


def test_channels_from_tracing_to_the_store(tmp_path: Path) -> None:
    """Scores, gates, outcome and the store agree with a hand-made mask over whole channels."""
    torch.manual_seed(0)
    model = Mixed().eval()
    data = Few()
    x = torch.stack([data[place][0] for place in range(5)])
    network = fxpath.trace(model, x[:2], granularity="channel")
    assert [site.neurons for site in network.sites] == [5, 6, 7, 3]
    unit = fxpath.trace(model, x[:2])
    selectors: list[Any] = ["neuron_mct", "neuron_intgrad", "dgr:iterations=5", "greedy_pruning", "magnitude", "random"]
    fxpath.compute(
        network, data, tmp_path / "run.h5", selectors=selectors, sparsities=[0.5], micro_batch=5, progress=False
    )
    scores, units = fxpath.NeuronMCT().scores(network, x), fxpath.NeuronMCT().scores(unit, x)
    with fxpath.open_store(tmp_path / "run.h5") as store:
        assert store.index == network.index
        for row in range(5):
            masks = [store.mask("neuron_mct@0.5", sample=row, site=site.name) for site in network.sites]
            assert [mask.shape for mask in masks] == [site.gate_shape for site in network.sites]
            mask = np.concatenate([each.ravel() for each in masks])
            assert np.array_equal(mask, scores.pathways(0.5).mask[row].numpy())
            kept = int((mask * network.index.weights).sum())
            assert 0 < kept <= network.index.kept(0.5), "whole channels, as many as fit"
    for site, other in zip(network.sites, unit.sites, strict=True):
        axes = [axis + 1 for axis in range(len(site.shape)) if axis != site.axis]
        summed = units.signed[:, other.slice].reshape(-1, *other.shape).sum(axes)
        torch.testing.assert_close(scores.signed[:, site.slice], summed)
