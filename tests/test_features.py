"""Channels and what they answer to most: a dead one comes alive, the optimum is known, top neurons are a pathway's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from footprint import Record, Watched, unchanged
from small_jobs import inputs, small
from torch import Tensor, nn

import fxpath
from fxpath.climbing import ConstantResponseWarning, Decoding
from fxpath.errors import InputError, RestrictionError, SiteError, SmoothSitesWarning
from fxpath.features import TopNeuron, top_neurons, visualise
from fxpath.inputspace import InputSpace

UNIT = InputSpace.normalised((0.0,) * 3, (1.0,) * 3)  # inputs are the colours themselves
DECODING = Decoding(steps=200, learning_rate=0.1, jitter=0, scale=0.0, rotation=0.0, decorrelated=False)


class Colours(nn.Module):
    """Channel k of the first site is relu(wₖ·colour + bₖ); there is a second site behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.then, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3), nn.Linear(5, 2)
        weight = torch.tensor([[1.0, -2.0, 3.0], [1.0, 1.0, 1.0], [-1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
        self.conv.weight.data = weight.view(4, 3, 1, 1)
        self.conv.bias.data = torch.tensor([0.5, -2.0, 2.0, -1.0])  # a grey picture leaves channel 1 dead, 3 always is

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.then(torch.relu(self.conv(x)))).mean((2, 3)))


def colours() -> tuple[Colours, fxpath.Network, Tensor]:
    torch.manual_seed(0)
    model = Colours().double().eval()
    x = torch.rand(1, 3, 6, 7, dtype=torch.float64)
    return model, fxpath.trace(model, x), x


# --- pictures of channels ---


def test_a_channel_is_climbed_to_its_optimum() -> None:
    model, network, x = colours()
    with unchanged(model, network._module):
        found = visualise(network, x, "relu", [0, 1, 2], decoding=DECODING, space=UNIT)
    assert found.labels == ("channel 0", "channel 1", "channel 2")
    best = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
    optimum = torch.tensor([4.5, 1.0, 2.0], dtype=torch.float64)
    wrong = (found.pictures - best.view(3, 3, 1, 1)).abs()
    assert wrong.max() < 0.02
    assert (optimum - found.response).max() < 0.05
    assert (found.response <= optimum).all()
    assert found.climbed.tolist() == [True] * 3
    assert found.target is None
    torch.testing.assert_close(found.original, found.response)
    a = F.relu(model.conv(x)).mean((2, 3))[0].detach()
    torch.testing.assert_close(found.photo, a[:3])


def test_a_dead_channel_comes_alive_by_its_pre_activation() -> None:
    _, network, x = colours()
    found = visualise(network, x, 0, {"dead": 1}, decoding=DECODING, space=UNIT)
    assert found.labels == ("dead",)
    assert float(found.responses[0, 0]) == 0  # what is noted is the activation's mean
    assert float(found.response[0]) > 0.75


def test_a_channel_that_nothing_moves_is_named() -> None:
    _, network, x = colours()
    with pytest.warns(
        ConstantResponseWarning, match="visualise: the response of 'channel 3' has no gradient, whatever"
    ):
        found = visualise(network, x, "relu", [3, 0], decoding=DECODING, space=UNIT)
    assert found.climbed.tolist() == [False, True]
    assert found.responses[0].tolist() == [0.0] * len(found.noted)


def test_only_what_leads_to_the_site_is_run() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 4, 3), Watched(), Watched()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.second(self.first(self.conv(x)) - 0.1).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Two().eval(), torch.rand(1, 3, 8, 8)
    with pytest.warns(SmoothSitesWarning):
        network = fxpath.trace(model, x, leaves=Watched, sites=Watched)
    record: Record = model.second.record
    record.start()
    model.first.record.start()
    visualise(network, x, "first", [0, 2], decoding=Decoding(steps=5), space=UNIT)
    assert record.calls == 1  # at the photo, to see that it can be used
    assert model.first.record.calls > 5
    assert (record.alive(), model.first.record.alive()) == (0, 0)
    model.first.record.start(fails_at=4)
    with unchanged(model, network._module), pytest.raises(RuntimeError, match="this activation fails"):
        visualise(network, x, "first", [0, 2], decoding=Decoding(steps=5), space=UNIT)
    assert model.first.record.alive(collect=True) == 0


def test_rows_of_channels_are_strangers() -> None:
    network, x = small(torch.float64), inputs()[:1].double()
    options: dict[str, Any] = {"decoding": Decoding(steps=10), "space": UNIT}
    together = visualise(network, x, "relu_1", [4, 0, 2], **options)
    singly = visualise(network, x, "relu_1", [4, 0, 2], max_batch=1, **options)
    for row, channel in enumerate((4, 0, 2)):
        alone = visualise(network, x, "relu_1", [channel], **options)
        assert torch.equal(alone.pictures[0], singly.pictures[row])
        torch.testing.assert_close(alone.pictures[0], together.pictures[row], rtol=0, atol=1e-9)
    # the photo gives no more than its form, the range of colours said
    other = visualise(network, inputs()[7:8].double(), "relu_1", [4], **options)
    assert torch.equal(other.pictures[0], singly.pictures[0])


def test_channels_of_tokens_and_of_windows() -> None:
    """Where channels come last, or a sample's block is folded into the batch, the mean is of the channel alike."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.permute(0, 2, 3, 1).flatten(0, 1)  # the rows of a picture, folded into the batch
            return self.out(torch.relu(self.fc(rows)).unflatten(0, (x.shape[0], -1)).mean((1, 2)))

    torch.manual_seed(0)
    model = Last().double().eval()
    x = torch.rand(1, 3, 4, 6, dtype=torch.float64)
    network = fxpath.trace(model, torch.rand(2, 3, 4, 6, dtype=torch.float64))
    site = network.sites[0]
    assert (site.shape, site.fold, site.axis) == ((4, 6, 5), 4, 2)
    found = visualise(network, x, site, [1, 2], decoding=Decoding(steps=20, learning_rate=0.1), space=UNIT)
    expected = torch.relu(model.fc(x.permute(0, 2, 3, 1))).mean((0, 1, 2)).detach()
    torch.testing.assert_close(found.photo, expected[[1, 2]])
    assert (found.response > found.responses[:, 0]).all()
    many = torch.rand(6, 3, 4, 6, dtype=torch.float64)
    scores = fxpath.NeuronMCT().scores(network, many)
    tops = top_neurons(network, many, scores.pathways(0.5), site, scores=scores)
    assert [top and top.channel for top in tops] == [int(row.argmax()) % 5 for row in scores.values]
    assert any(top is not None and top.coordinates[0] != top.channel for top in tops)


def test_channels_that_are_refused() -> None:
    _, network, x = colours()
    options: dict[str, Any] = {"decoding": Decoding(steps=2), "space": UNIT}
    with pytest.raises(SiteError, match=r"there is no site 'rel'; nearest: relu"):
        visualise(network, x, "rel", [0], **options)
    with pytest.raises(InputError, match=r"expected a channel in 0 … 3, found 4"):
        visualise(network, x, "relu", [0, 4], **options)
    with pytest.raises(InputError, match="visualise: expected at least one channel, found none"):
        visualise(network, x, "relu", [], **options)
    with pytest.raises(InputError, match="visualise: expected one photo, found 2"):
        visualise(network, x.repeat(2, 1, 1, 1), "relu", [0], **options)
    everything = fxpath.Pathways(torch.ones(1, network.index.size, dtype=torch.bool), network.index)
    with network.masked(everything), pytest.raises(RestrictionError, match="visualise: the network is restricted"):
        visualise(network, x, "relu", [0], **options)
    vectors = torch.rand(2, 4)
    other = fxpath.trace(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval(), vectors)
    with pytest.raises(
        InputError, match=r"visualise: expected a network whose one input is .*, found float32 \(B, 4\)"
    ):
        visualise(other, vectors[:1], 0, [0], **options)


# --- top neurons ---


def test_the_top_neuron_by_score() -> None:
    network, x = small(torch.float64), inputs()[:3].double()
    scores = fxpath.NeuronMCT().scores(network, x)
    pathways = scores.pathways(0.8)
    site = network.index.site("relu_1")
    found = top_neurons(network, x, pathways, "relu_1", scores=scores)
    block = scores.signed[:, site.slice].abs().reshape(3, *site.shape)
    for row, top in enumerate(found):
        place = np.unravel_index(int(block[row].argmax()), site.shape)
        assert top is not None
        assert top == TopNeuron(
            "relu_1",
            network.index.flat("relu_1", place),
            tuple(map(int, place)),
            int(place[0]),
            float(block[row].max()),
        )
        assert bool(pathways.mask[row, top.neuron])
        assert network.index.locate(top.neuron) == ("relu_1", top.coordinates)
    # of another pathway it is the largest of those that are in it
    less = fxpath.Pathways(pathways.mask.clone(), network.index)
    for row, top in enumerate(found):
        assert top is not None
        less.mask[row, top.neuron] = False
    second = top_neurons(network, x, less, site, scores=scores)
    for row, (one, two) in enumerate(zip(found, second, strict=True)):
        assert one is not None
        assert two is not None
        assert float(block[row].flatten().sort(descending=True).values[1]) == two.score < one.score


def test_the_top_neuron_under_the_mask() -> None:
    """Without scores of its own a pathway's are s = |a · ∂Φ/∂a| in the network masked to it, not in the original."""
    model, network, x = colours()
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(1, network.index.size, generator=generator) < 0.6
    pathways = fxpath.Pathways(mask, network.index)
    with unchanged(model, network._module):
        (top,) = top_neurons(network, x, pathways, "relu_1", target=1)
    first, second = (site.shape for site in network.sites)
    a = F.relu(model.conv(x)) * mask[:, : 4 * 42].view(1, *first)
    h = (F.relu(model.then(a)) * mask[:, 4 * 42 :].view(1, *second)).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.fc(h.mean((2, 3)))[0, 1], h)
    s = (h * slope).abs().detach()[0]
    assert top is not None
    assert top.score == pytest.approx(float(s.max()), rel=1e-12)
    assert top.coordinates == tuple(map(int, np.unravel_index(int(s.argmax()), second)))
    products, _ = network.signed_products(x, 1)
    assert float(products[:, network.sites[1].slice].abs().max()) != pytest.approx(top.score, rel=1e-3)


def test_dgr_is_by_its_gates_and_greedy_by_the_mask() -> None:
    network, x = small(torch.float64), inputs()[:1].double()
    dgr = fxpath.DGR(iterations=20).select(network, x, (0.5,))
    (top,) = top_neurons(network, x, dgr[0.5], "relu_1", scores=dgr.scores)
    assert dgr.scores is not None
    site = network.index.site("relu_1")
    assert top is not None
    assert top.score == float(dgr.scores.signed[0, site.slice].max())
    greedy = fxpath.GreedyPruning().select(network, x, (0.5,))
    assert greedy.scores is None
    (top,) = top_neurons(network, x, greedy[0.5], "relu_1", scores=greedy.scores)
    with network.masked(greedy[0.5]):
        products, _ = network.signed_products(x)
    assert top is not None
    assert top.score == float(products[0, site.slice].abs().max())


def test_a_pathway_without_a_neuron_at_the_site() -> None:
    network, x = small(torch.float64), inputs()[:2].double()
    mask = torch.ones(2, network.index.size, dtype=torch.bool)
    mask[1, network.index.site("relu_1").slice] = False
    pathways = fxpath.Pathways(mask, network.index)
    scores = fxpath.NeuronMCT().scores(network, x)
    first, second = top_neurons(network, x, pathways, "relu_1", scores=scores)
    assert first is not None
    assert second is None
    assert top_neurons(network, x, pathways, "relu_1")[1] is None


def test_channels_as_neurons() -> None:
    network, x = small(granularity="channel"), inputs()[:1]
    scores = fxpath.NeuronMCT().scores(network, x)
    (top,) = top_neurons(network, x, scores.pathways(0.2), "relu_1", scores=scores)
    site = network.index.site("relu_1")
    assert top is not None
    assert top.channel == int(scores.values[0, site.slice].argmax())
    assert (top.coordinates, top.neuron) == ((top.channel,), site.start + top.channel)


def test_top_neurons_that_are_refused() -> None:
    network, x = small(), inputs()[:2]
    scores = fxpath.NeuronMCT().scores(network, x)
    pathways = scores.pathways(0.8)
    with pytest.raises(SiteError, match=r"there is no site 'relu_9'; nearest: relu"):
        top_neurons(network, x, pathways, "relu_9", scores=scores)
    with pytest.raises(RestrictionError, match="top neurons: there are 1 pathways for 2 samples"):
        top_neurons(network, x, pathways.take([0]), "relu_1", scores=scores)
    one = fxpath.NeuronMCT().scores(network, x[:1])
    with pytest.raises(RestrictionError, match="top neurons: the scores are of 1 samples and NeuronIndex"):
        top_neurons(network, x, pathways, "relu_1", scores=one)
    other = small(granularity="channel")
    foreign = fxpath.NeuronMCT().scores(other, x)
    with pytest.raises(
        RestrictionError, match=r"the scores are of 2 samples and NeuronIndex\(5 sites, 47 neurons, granul"
    ):
        top_neurons(network, x, pathways, "relu_1", scores=foreign)
    with pytest.raises(RestrictionError, match="pathways: they are of another index"):
        top_neurons(network, x, foreign.pathways(0.1), "relu_1")
    with network.masked(pathways), pytest.raises(RestrictionError, match="top neurons: the network is restricted"):
        top_neurons(network, x, pathways, "relu_1")
