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


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], int | None, int | None]] = {
    # of a tensor (B, 3, 4, 5): where axis 1 and axis 3 are in the block afterwards; None: gone
    "moveaxis": (lambda h: h.moveaxis(1, -1), 2, 1),
    "moveaxis of several": (lambda h: torch.moveaxis(h, (1, 3), (3, 1)), 2, 0),
    "mH": (lambda h: h.mH, 0, 1),
    "adjoint": (torch.adjoint, 0, 1),
    "H": (lambda h: h.mean((1, 2)).H.H, None, 0),
    "T": (lambda h: h[:, :, 0].permute(2, 1, 0).T, 0, 1),
    "swapdims": (lambda h: torch.swapdims(h, 1, 3), 2, 0),
    "swapaxes by names": (lambda h: h.swapaxes(axis0=1, axis1=2), 1, 2),
    "diagonal": (lambda h: h.diagonal(dim1=1, dim2=2), 1, 0),
    "diagonal with the last": (lambda h: torch.diagonal(h, 1, 2, 3), 0, 1),
    "diagonal of linalg": (torch.linalg.diagonal, 0, 1),
    "diagonal of linalg, by axes": (lambda h: torch.linalg.diagonal(h, dim1=1, dim2=2), 1, 0),
    "rot90": (lambda h: torch.rot90(h, 1, [1, 2]), 1, 2),
    "rot90 thrice": (lambda h: torch.rot90(h, 3, (1, 3)), 2, 0),
    "rot90 twice": (lambda h: h.rot90(2, (1, 3)), 0, 2),
    "split": (lambda h: h.split(2, 1)[0], 0, 2),
    "chunk": (lambda h: h.chunk(2, 3)[1], 0, 2),
    "tensor_split": (lambda h: torch.tensor_split(h, 2, 2)[0], 0, 2),
    "unbind": (lambda h: h.unbind(2)[1], 0, 1),
    "unbind and stack": (lambda h: torch.stack(h.unbind(1), 3), None, 1),
    "roll": (lambda h: h.roll(1, 2), 0, 2),
    "flip": (lambda h: h.flip(1, 2), 0, 2),
    "narrow": (lambda h: h.narrow(2, 0, 2), 0, 2),
    "unfold": (lambda h: h.unfold(2, 2, 1), 0, 2),
    "unfold on the channels": (lambda h: h.unfold(3, 2, 2).flatten(3), 0, 2),
    "patches and back": (lambda h: F.fold(F.unfold(h, (4, 1)), (4, 5), (4, 1)), 0, None),
    "patches of four": (lambda h: F.unfold(h, 4), 0, None),
    "fft": (lambda h: torch.fft.fft2(h, dim=(1, 2)).abs(), 0, 2),
    "view_as_real": (lambda h: torch.view_as_real(torch.fft.rfft(h, dim=2)), 0, 2),
    "rearranged": (lambda h: h.reshape(-1, 3, 2, 2, 5).permute(0, 4, 2, 1, 3).flatten(3), 2, 0),
    "merged and parted": (lambda h: h.flatten(1, 2).mT.unflatten(2, (3, 4)), 1, 0),
    "mean by axis": (lambda h: h.mean(axis=2), 0, 1),
    "norm": (lambda h: h.norm(2, 1), None, 1),
    "norm of linalg": (lambda h: torch.linalg.vector_norm(h, 2, 2), 0, 1),
    "quantile": (lambda h: h.quantile(0.5, 2), 0, 1),
    "tiled": (lambda h: h.tile(1, 2, 1, 2), 0, 2),
    "number after all": (lambda h: h[..., 0, :], 0, 1),
    "number and new axis": (lambda h: h[:, None, 0], None, 2),
    "places in a list": (lambda h: h[:, 1, [0, 2]], None, 1),
    "new axes about": (lambda h: h[:, :, None, ..., None, 0, :], 0, 3),
}  # fmt: skip


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("name", MOVES)
def test_channels_that_are_moved(name: str, last: bool) -> None:
    """Where channels were made on axis 1 or on the last; values that differ along them alone say where they are."""
    moved, *expected = MOVES[name]
    shape = (4, 3, 4, 5)
    maker = nn.Linear(2, 5) if last else nn.Conv2d(2, 3, 1)
    model = Layout(maker, moved).eval()
    network = fxpath.trace(model, torch.randn(4, 3, 4, 2) if last else torch.randn(4, 2, 4, 5), granularity="channel")
    (site,) = network.sites
    axis = expected[last]
    assert site.axis == (0 if axis is None else axis)
    if axis is not None and name not in ("fft", "view_as_real", "patches and back"):  # these mix other axes
        numbers = torch.arange(1.0, shape[3] + 1) if last else torch.arange(1.0, shape[1] + 1)[:, None, None]
        found = moved(numbers.expand(shape))
        assert not torch.equal(found, found.roll(1, axis + 1))


def heads(h: Tensor) -> Tensor:
    """(B, 6 tokens, 8 channels) as two heads, (B, 2, 6, 4)."""
    return h.view(h.shape[0], 6, 2, 4).transpose(1, 2)


def merged(h: Tensor) -> Tensor:
    return h.transpose(1, 2).reshape(h.shape[0], 6, 8)


def softmax(h: Tensor) -> Tensor:
    return F.softmax(h / 2, dim=-1)


def maps(h: Tensor) -> Tensor:
    return h.view(h.shape[0], 8, -1)


class Attending(nn.Module):
    """Queries, keys and values of tokens and of images, and what a body makes of them."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.qkv = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 24)
        self.slots, self.image, self.f = nn.Linear(3, 2), nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.value, self.gamma, self.scale = (
            nn.Conv2d(3, 8, 1),
            nn.Parameter(torch.ones(1)),
            nn.Parameter(torch.ones(8)),
        )
        self.body = body

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return F.relu(self.body(self, x)).flatten(1)


class AttendingBound(Attending):
    """The same without `*more`, which symbolic_trace can bind."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def parts(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of two heads, from one linear layer."""
    q, k, v = m.qkv(x).reshape(x.shape[0], 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def over_maps(m: Any, x: Tensor) -> Tensor:
    """The attention of SAGAN."""
    attention = torch.softmax(torch.bmm(maps(m.image(x)).permute(0, 2, 1), maps(m.f(x))), dim=-1)
    found = torch.bmm(maps(m.value(x)), attention.permute(0, 2, 1))
    return m.gamma * found.view(x.shape[0], 8, 4, 5) + m.image(x)


TOKENS, IMAGE = (6, 3), (3, 4, 5)
PRODUCTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...], tuple[int, ...], int]] = {
    # what is computed, of which input, the site's block, the channel axis within it
    "attention": (lambda m, x: softmax(m.q(x) @ m.k(x).mT) @ m.v(x), TOKENS, (6, 8), 1),
    "attention itself": (lambda m, x: softmax(m.q(x) @ m.k(x).mT), TOKENS, (6, 6), 0),
    "in heads": (
        lambda m, x: merged(softmax(heads(m.q(x)) @ heads(m.k(x)).mT) @ heads(m.v(x))), TOKENS, (6, 8), 1,
    ),
    "in heads, not merged": (
        lambda m, x: softmax(heads(m.q(x)) @ heads(m.k(x)).mT) @ heads(m.v(x)), TOKENS, (2, 6, 4), 0,
    ),
    "in heads, itself": (lambda m, x: softmax(heads(m.q(x)) @ heads(m.k(x)).mT), TOKENS, (2, 6, 6), 0),
    "of one layer": (
        lambda m, x: (lambda q, k, v: merged(softmax(q @ k.mT) @ v))(*parts(m, x)), TOKENS, (6, 8), 1,
    ),
    "of one layer, heads folded": (
        lambda m, x: (lambda q, k, v: merged(
            torch.bmm(softmax(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT)), v.flatten(0, 1)).unflatten(0, (-1, 2))
        ))(*parts(m, x)), TOKENS, (6, 8), 1,
    ),
    "by einsum": (
        lambda m, x: torch.einsum(
            "bhqk,bhkd->bqhd", softmax(heads(m.q(x)) @ heads(m.k(x)).mT), heads(m.v(x))
        ).flatten(2), TOKENS, (6, 8), 1,
    ),
    "by einsum with dots": (
        lambda m, x: torch.einsum("...qk,...kd", softmax(m.q(x) @ m.k(x).mT), m.v(x)), TOKENS, (8, 6), 0,
    ),
    "scaled_dot_product_attention": (
        lambda m, x: merged(F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))),
        TOKENS, (6, 8), 1,
    ),
    "linear attention": (lambda m, x: m.q(x) @ (m.k(x).mT @ m.v(x)), TOKENS, (6, 8), 1),
    "slots": (lambda m, x: m.slots(x).softmax(1).mT @ m.v(x), TOKENS, (2, 8), 1),
    "by names": (lambda m, x: torch.matmul(input=softmax(m.q(x) @ m.k(x).mT), other=m.v(x)), TOKENS, (6, 8), 1),
    "baddbmm": (
        lambda m, x: torch.baddbmm(m.v(x), softmax(m.q(x) @ m.k(x).mT), m.v(x), beta=0.5), TOKENS, (6, 8), 1,
    ),
    "distances": (lambda m, x: torch.cdist(m.q(x).mT, m.k(x).mT[:, :3]), TOKENS, (8, 3), 0),
    "by a vector": (lambda m, x: maps(m.image(x)) @ torch.ones(20), IMAGE, (8,), 0),
    "over maps": (over_maps, IMAGE, (8, 4, 5), 0),
    "over channels": (
        lambda m, x: softmax(maps(m.image(x)) @ maps(m.f(x)).mT) @ maps(m.value(x)), IMAGE, (8, 20), 0,
    ),
    "scaled by einsum": (lambda m, x: torch.einsum("bchw,c->bchw", m.image(x), m.scale), IMAGE, (8, 4, 5), 0),
    "maps by maps": (lambda m, x: m.image(x) @ m.f(x).mT, IMAGE, (8, 4, 4), 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", [AttendingBound, Attending], ids=["symbolic_trace", "torch.export"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_data_make_no_channels(name: str, kind: type[Attending]) -> None:
    """The axes that are not summed over stay channels: those of the values, not those of the attention."""
    body, shape, block, axis = PRODUCTS[name]
    network = fxpath.trace(kind(body).eval(), torch.randn(2, *shape), granularity="channel", sites=["relu"])
    (site,) = network.sites
    assert (site.shape, site.axis) == (block, axis)
    assert network.traced.tracer == ("torch.export" if kind is Attending else "symbolic_trace")


def test_long_chains_of_products() -> None:
    """Each product reads the one before twice."""

    def body(m: Any, x: Tensor) -> Tensor:
        h = m.image(x)[..., :4]
        for _ in range(60):
            h = h @ h / 8
        return h

    (site,) = fxpath.trace(AttendingBound(body).eval(), torch.randn(2, 3, 4, 5), granularity="channel").sites
    assert (site.shape, site.axis) == ((8, 4, 4), 0)


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
